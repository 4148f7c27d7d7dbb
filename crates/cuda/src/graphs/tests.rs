use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lapidary_engine::{BlockId, Executor, FedToken, RequestId, SampleRow, SampledToken, SamplingParams, TokenHistory};
use lapidary_model::testing::{TinyModel, TinyShape, TinyWeights};
use lapidary_model::{KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};

use super::*;
use crate::device::Emulator;
use crate::testing::{device, emulator};
use crate::{Cuda, CudaConfig};

const BLOCK_SIZE: u32 = 16;
/// KV blocks of a sequence.
const BLOCKS_EACH: u32 = 4;
const MAX_SEQS: usize = 48;
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

/// With what counts its launches, if it is emulated.
fn load(graphs: bool, kv_cache_dtype: KvCacheDtype) -> (ModelRunner<Cuda>, Option<Arc<AtomicUsize>>) {
    let model = TinyModel::with_shape(TinyWeights::AutoFp8Dynamic, TinyShape::ALIGNED);
    let checkpoint = model.checkpoint().expect("the tiny model is whole");
    let emulator = emulator();
    let launches = emulator.as_ref().map(Emulator::launches);
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
    (runner.expect("the tiny model loads"), launches)
}

/// What a step is expected to run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum As {
    Whole,
    Layers,
    Eager,
}

/// Steps of a serving model, of which each leaves keys and values to those after it.
fn steps() -> Vec<(&'static str, As, Batch)> {
    use Choice::{Drawn, Given, Logprobs, Masked, None, Penalised, Plain};
    let crowd: Vec<_> = (0..20).map(|seq| rows(seq, 0, 2, Plain)).collect();
    vec![
        (
            "prompts",
            As::Layers,
            batch(&[rows(0, 0, 20, Plain), rows(1, 0, 3, Logprobs)], false),
        ),
        (
            "a prompt beside tokens",
            As::Layers,
            batch(
                &[rows(0, 20, 1, Plain), rows(1, 3, 1, Masked), rows(2, 0, 5, Drawn)],
                true,
            ),
        ),
        (
            "tokens chosen in every way",
            As::Layers,
            batch(
                &[rows(2, 5, 1, Penalised), rows(0, 21, 1, Masked), rows(1, 4, 1, Given)],
                false,
            ),
        ),
        (
            "plain tokens",
            As::Whole,
            batch(&[rows(0, 22, 1, Plain), rows(1, 5, 1, Drawn)], true),
        ),
        (
            "a part of a prompt that chooses nothing",
            As::Layers,
            batch(&[rows(3, 0, 33, None)], false),
        ),
        (
            "a token that chooses nothing",
            As::Layers,
            batch(&[rows(3, 33, 1, None)], false),
        ),
        (
            "the prompt's end",
            As::Layers,
            batch(&[rows(3, 34, 20, Logprobs), rows(0, 23, 1, Logprobs)], false),
        ),
        ("more prompts than there is room for", As::Eager, batch(&crowd, false)),
        (
            "more tokens than are recorded",
            As::Eager,
            batch(&[rows(4, 0, 60, Logprobs), rows(5, 0, 20, Plain)], false),
        ),
        ("alone again", As::Whole, batch(&[rows(4, 60, 1, Plain)], true)),
    ]
}

fn run(runner: &mut ModelRunner<Cuda>, batch: &Batch) -> Vec<SampledToken> {
    runner.launch(batch).expect("the step is within its limits");
    runner.collect().expect("the device does not fail")
}

/// Launches of single kernels so far.
fn count(launches: Option<&AtomicUsize>) -> usize {
    launches.map_or(0, |launches| launches.load(Relaxed))
}

#[test]
fn recorded_steps_choose_what_others_do() {
    for dtype in [KvCacheDtype::Native, KvCacheDtype::Fp8E4m3] {
        let (mut plain, one_by_one) = load(false, dtype);
        let (mut recording, behind) = load(true, dtype);
        for (name, runs_as, batch) in steps() {
            let counts = || [&one_by_one, &behind].map(|launches| count(launches.as_deref()));
            let before = counts();
            let [want, got] = [&mut plain, &mut recording].map(|runner| run(runner, &batch));
            assert_eq!(want.len(), batch.samples.len());
            assert_eq!(got, want, "{name}, cache {dtype}");
            let [all, single] = [counts()[0] - before[0], counts()[1] - before[1]];
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
