use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use lapidary_engine::{BlockId, Executor, FedToken, RequestId, SampleRow, SampledToken, SamplingParams, TokenHistory};
use lapidary_model::testing::{TinyModel, TinyShape, TinyWeights};
use lapidary_model::{KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};

use super::*;
use crate::device::{Counts, Emulator};
use crate::testing::{device, emulator};
use crate::{Cuda, CudaConfig};

const BLOCK_SIZE: u32 = 16;
/// KV blocks of a sequence: more tokens than a unit of decode attention takes, so that some have parts to merge.
const BLOCKS_EACH: u32 = 20;
const MAX_SEQS: usize = 26;
const VOCAB: u32 = TinyShape::ALIGNED.vocab as u32;

/// Launches of the last norm, of logits, and of what chooses in every way.
const MAX_BEHIND_LAYERS: usize = 8;

/// Rows of one sequence in a step.
#[derive(Debug, Clone)]
struct Rows {
    seq: u32,
    /// Position of the first.
    start: u32,
    len: u32,
    choice: Choice,
}

/// What becomes of the last of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    /// Nothing: the prompt goes on.
    None,
    Plain,
    Drawn,
    Logprobs,
    Masked,
    Penalised,
    Given,
}

const fn rows(seq: u32, start: u32, len: u32, choice: Choice) -> Rows {
    Rows {
        seq,
        start,
        len,
        choice,
    }
}

fn sample(rows: &Rows, row: u32) -> Option<SampleRow> {
    let greedy = SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let params = match rows.choice {
        Choice::None => return None,
        Choice::Plain => greedy,
        Choice::Drawn => SamplingParams {
            top_p: 0.9,
            seed: 7,
            ..SamplingParams::default()
        },
        Choice::Logprobs | Choice::Given | Choice::Masked => SamplingParams {
            logprobs: Some(3),
            ..greedy
        },
        Choice::Penalised => SamplingParams {
            repetition_penalty: 1.3,
            logit_bias: vec![(9, 2.0), (11, -3.0)],
            logprobs: Some(1),
            ..greedy
        },
    };
    let history = params.needs_history().then(|| TokenHistory {
        prompt: (0..rows.start).collect(),
        output: vec![3, 5],
    });
    Some(SampleRow {
        row,
        position: rows.start + rows.len,
        given: (rows.choice == Choice::Given).then_some(21),
        params: Arc::new(params),
        banned: None,
        mask: (rows.choice == Choice::Masked)
            .then(|| (0..VOCAB.div_ceil(32)).map(|word| 0x1111_1111 << (word % 4)).collect()),
        history,
    })
}

/// A step of these rows. `fed`: the first takes the first token of the step before.
fn batch(step: &[Rows], fed: bool) -> Batch {
    let mut batch = Batch {
        query_start: vec![0],
        block_start: vec![0],
        ..Batch::default()
    };
    for rows in step {
        let Rows { seq, start, len, .. } = *rows;
        let blocks = seq * BLOCKS_EACH..seq * BLOCKS_EACH + (start + len).div_ceil(BLOCK_SIZE);
        batch.request_ids.push(RequestId(u64::from(seq)));
        let positions = start..start + len;
        let token = |position: u32| (31 * seq + 17 * position + position * position) % (VOCAB - 8) + 4;
        batch.token_ids.extend(positions.clone().map(token));
        batch.positions.extend(positions.clone());
        batch
            .slot_mapping
            .extend(positions.map(|position| seq * BLOCKS_EACH * BLOCK_SIZE + position));
        batch.query_start.push(batch.token_ids.len() as u32);
        batch.context_lens.push(start + len);
        batch.block_ids.extend(blocks.map(BlockId));
        batch.block_start.push(batch.block_ids.len() as u32);
        batch.samples.extend(sample(rows, batch.token_ids.len() as u32 - 1));
    }
    if fed {
        batch.token_ids[0] = 0;
        batch.fed = vec![FedToken { row: 0, prev_sample: 0 }];
    }
    batch
}

/// With what is counted of it, if it is emulated.
fn load(graphs: bool, kv_cache_dtype: KvCacheDtype) -> (ModelRunner<Cuda>, Option<Arc<Counts>>) {
    let model = TinyModel::with_shape(TinyWeights::AutoFp8Dynamic, TinyShape::ALIGNED);
    let checkpoint = model.checkpoint().expect("the tiny model is whole");
    let emulator = emulator();
    let counts = emulator.as_ref().map(Emulator::counts);
    let device = emulator.map_or_else(device, |emulator| Box::new(emulator));
    let backend = Cuda::on(device, CudaConfig { graphs }).expect("the device has every kernel");
    let config = RunnerConfig {
        max_num_batched_tokens: 200,
        max_num_seqs: MAX_SEQS,
        max_model_len: Some((BLOCKS_EACH * BLOCK_SIZE) as usize),
        block_size: BLOCK_SIZE,
        kv_cache: KvCacheSize::Blocks(MAX_SEQS as u32 * BLOCKS_EACH),
        kv_cache_dtype,
    };
    let runner = ModelRunner::load(backend, &checkpoint, config, &mut |_| ());
    (runner.expect("the tiny model loads"), counts)
}

/// What a step is expected to run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum As {
    Whole,
    Layers,
    Eager,
}

type Step = (&'static str, As, Batch);

/// Steps of a serving model, of which each leaves keys and values to those after it.
fn steps() -> Vec<Step> {
    short_steps().into_iter().chain(long_steps()).collect()
}

fn step(name: &'static str, runs_as: As, rows: &[Rows], fed: bool) -> Step {
    (name, runs_as, batch(rows, fed))
}

fn short_steps() -> [Step; 8] {
    use As::{Eager, Layers, Whole};
    use Choice::{Drawn, Given, Logprobs, Masked, None, Penalised, Plain};
    let prompts = [rows(0, 0, 20, Plain), rows(1, 0, 3, Logprobs)];
    let beside = [rows(0, 20, 1, Plain), rows(1, 3, 1, Masked), rows(2, 0, 5, Drawn)];
    let every_way = [rows(2, 5, 1, Penalised), rows(0, 21, 1, Masked), rows(1, 4, 1, Given)];
    let plain = [rows(0, 22, 1, Plain), rows(1, 5, 1, Drawn)];
    let end = [rows(3, 34, 20, Logprobs), rows(0, 23, 1, Logprobs)];
    let crowd: Vec<_> = (0..MAX_SEQS as u32).map(|seq| rows(seq, 0, 2, Plain)).collect();
    [
        step("prompts", Layers, &prompts, false),
        step("a prompt beside tokens", Layers, &beside, true),
        step("tokens chosen in every way", Layers, &every_way, false),
        step("plain tokens", Whole, &plain, true),
        step("a part that chooses nothing", Layers, &[rows(3, 0, 33, None)], false),
        step("a token that chooses nothing", Layers, &[rows(3, 33, 1, None)], false),
        step("the prompt's end", Layers, &end, false),
        step("more prompts than there is room for", Eager, &crowd, false),
    ]
}

/// Some see more than a unit of decode attention covers.
fn long_steps() -> [Step; 6] {
    use As::{Layers, Whole};
    use Choice::{Logprobs, Masked, Plain};
    let many = [rows(4, 0, 170, Logprobs), rows(5, 0, 20, Plain)];
    let end = [rows(4, 170, 110, Logprobs), rows(5, 20, 1, Logprobs)];
    let beside = [rows(4, 280, 1, Masked), rows(6, 0, 6, Logprobs)];
    let prompts = [rows(4, 281, 12, Logprobs), rows(6, 6, 9, Logprobs)];
    let tokens = [rows(6, 15, 1, Logprobs), rows(4, 293, 1, Logprobs)];
    let plain = [rows(4, 294, 1, Plain), rows(6, 16, 1, Plain)];
    [
        step("as many tokens as there may be", Layers, &many, false),
        step("a long prompt's end", Layers, &end, false),
        step("parts to merge beside a prompt", Layers, &beside, true),
        step("nothing to merge behind a long context", Layers, &prompts, false),
        step("parts to merge", Layers, &tokens, true),
        step("parts to merge and plain choices", Whole, &plain, true),
    ]
}

/// What all steps choose, each launched before the one before it is collected; and how many launches each was.
fn run(runner: &mut ModelRunner<Cuda>, counts: Option<&Counts>) -> (Vec<Vec<SampledToken>>, Vec<usize>) {
    let launches = || counts.map_or(0, |counts| counts.launches.load(Relaxed));
    let (mut chosen, mut launched) = (Vec::new(), Vec::new());
    let mut collect = |runner: &mut ModelRunner<Cuda>| chosen.push(runner.collect().expect("the device does not fail"));
    for (index, (_, _, batch)) in steps().iter().enumerate() {
        let before = launches();
        runner.launch(batch).expect("the step is within its limits");
        launched.push(launches() - before);
        if index > 0 {
            collect(runner);
        }
    }
    collect(runner);
    (chosen, launched)
}

#[test]
fn recorded_steps_choose_what_others_do() {
    for dtype in [KvCacheDtype::Native, KvCacheDtype::Fp8E4m3] {
        let (mut plain, counts) = load(false, dtype);
        let (want, all) = run(&mut plain, counts.as_deref());
        let (mut recording, counts) = load(true, dtype);
        let recordings = || counts.as_ref().map_or(0, |counts| counts.recordings.load(Relaxed));
        let at_start = recordings();
        let (got, single) = run(&mut recording, counts.as_deref());
        assert_eq!(recordings(), at_start, "all was recorded before the first step");
        for (index, (name, runs_as, batch)) in steps().iter().enumerate() {
            assert_eq!(want[index].len(), batch.samples.len());
            assert_eq!(got[index], want[index], "{name}, cache {dtype}");
            let (single, all) = (single[index], all[index]);
            let is_as_expected = match runs_as {
                As::Whole => single == 0,
                As::Layers if batch.samples.is_empty() => single == 0,
                As::Layers => single <= MAX_BEHIND_LAYERS,
                As::Eager => single == all,
            };
            assert!(
                is_as_expected,
                "{name}, cache {dtype}: {single} of {all} launches, expected {runs_as:?}"
            );
        }
    }
}

#[test]
fn the_warm_up_has_every_recording() {
    let step = |num_seqs: u32, len: u32, choice| {
        let all: Vec<_> = (0..num_seqs).map(|seq| rows(seq, 0, len, choice)).collect();
        batch(&all, false)
    };
    for (max_tokens, max_seqs, max_model_len) in
        [(1, 1, 1), (3, 7, 64), (48, 5, 9), (200, 100, 4096), (4096, 300, 4096)]
    {
        let limits = StepLimits {
            max_tokens,
            max_seqs,
            max_model_len,
        };
        let mut graphs = Graphs::new();
        let unasked = graphs.recording(&step(1, 1, Choice::Plain), true, |_| true);
        assert_eq!(unasked, None, "nobody promised that operations repeat");
        let rehearsed: Vec<_> = graphs
            .enable(limits)
            .into_iter()
            .map(|rehearsal| match rehearsal {
                Rehearsal::Decode { num_seqs, logprobs } => {
                    assert!(num_seqs <= max_seqs.min(max_tokens));
                    graphs.recording(&step(num_seqs as u32, 1, Choice::Plain), !logprobs, |_| true)
                }
                Rehearsal::Prompt { num_tokens } => {
                    assert!(num_tokens <= max_model_len.min(max_tokens));
                    graphs.recording(&step(1, num_tokens as u32, Choice::Plain), true, |_| true)
                }
            })
            .collect();
        let largest = graphs.recording(&step(2, 2, Choice::Plain), true, |size| size > 4);
        assert_eq!(
            largest.is_some(),
            max_model_len.min(max_tokens) > 4,
            "a larger one may have room"
        );
        for num_seqs in 1..=max_seqs.min(max_tokens) as u32 {
            for (len, choice, is_plain) in [
                (1, Choice::Plain, true),
                (1, Choice::Logprobs, false),
                (1, Choice::None, true),
                (2, Choice::Plain, true),
            ] {
                let batch = step(num_seqs, len, choice);
                let recording = graphs.recording(&batch, is_plain, |_| true);
                let most = if len == 1 { max_seqs } else { max_model_len }.min(max_tokens);
                if batch.num_tokens() > most.min(MAX_RECORDED) {
                    assert_eq!(recording, None, "{} tokens within {limits:?}", batch.num_tokens());
                    continue;
                }
                let size = recording.map_or(0, Recording::max_tokens);
                assert!(
                    (batch.num_tokens()..=most).contains(&size),
                    "{recording:?} within {limits:?}"
                );
                assert!(rehearsed.contains(&recording), "{recording:?} within {limits:?}");
                let without_room = graphs.recording(&batch, is_plain, |_| false);
                assert_eq!(without_room, recording.filter(|_| len == 1));
            }
        }
    }
}
