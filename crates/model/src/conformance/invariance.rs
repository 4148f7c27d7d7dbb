//! A sequence gets the same logits whoever shares its steps and however its prompt is cut.

use lapidary_engine::{Executor, SampleRow, SampledToken, SamplingParams, TokenId};

use super::Bounds;
use super::rig::{BLOCK_SIZE, SequenceStep, batch_of};
use crate::backend::{Backend, KvCacheDtype, KvScales};
use crate::runner::{KvCacheSize, ModelRunner, RunnerConfig};
use crate::testing::{TinyModel, TinyShape, TinyWeights};

const ALL_WEIGHTS: [TinyWeights; 7] = [
    TinyWeights::Dense("BF16"),
    TinyWeights::Dense("F16"),
    TinyWeights::Dense("F32"),
    TinyWeights::AutoFp8Static,
    TinyWeights::AutoFp8Dynamic,
    TinyWeights::CompressedChannel,
    TinyWeights::CompressedWeightOnly,
];
/// Of the tiny model's keys and values, some of which they clip.
pub(super) const KV_SCALES: KvScales = KvScales {
    key: 0.0021,
    value: 0.0034,
};
/// Blocks each sequence of a check owns.
pub(super) const BLOCKS_EACH: usize = 8;
pub(super) const MAX_SEQS: usize = 8;

/// Of a check over an e4m3 cache: what is stored does not depend on how the weights are.
const FP8_CACHE_WEIGHTS: [TinyWeights; 2] = [TinyWeights::Dense("BF16"), TinyWeights::AutoFp8Static];

/// Long prompts, cut into chunks of every awkward size, give the logits of the uncut prompt: bit by bit, or closely.
pub fn chunks_do_not_change_logits<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    compare_chunks(make, bounds, &ALL_WEIGHTS, KvCacheDtype::Native);
}

/// The same over an e4m3 cache: a chunk's own keys and values are read as rounded as those of chunks before it.
pub fn chunks_do_not_change_logits_over_fp8_cache<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    compare_chunks(make, bounds, &FP8_CACHE_WEIGHTS, KvCacheDtype::Fp8E4m3);
}

fn compare_chunks<B: Backend>(
    make: &dyn Fn() -> B,
    bounds: &Bounds,
    all_weights: &[TinyWeights],
    kv_cache_dtype: KvCacheDtype,
) {
    const LENGTH: usize = 70;
    let tokens = prompt(0, LENGTH);
    for weights in all_weights {
        let mut large = load(make, *weights, kv_cache_dtype, [LENGTH, LENGTH]);
        let mut reference: Option<Vec<f32>> = None;
        for chunk in [LENGTH, 1, 7, 16, 33, 64] {
            // The smallest runners there can be have a say, too.
            let mut small = (chunk < 10).then(|| load(make, *weights, kv_cache_dtype, [chunk, chunk]));
            let runner = small.as_mut().unwrap_or(&mut large);
            overwrite(runner, LENGTH);
            let logits = runner
                .forward_logits_in_chunks(&tokens, chunk)
                .expect("the prompt fits");
            let reference = reference.get_or_insert_with(|| logits.clone());
            let what = format!("{weights:?} in chunks of {chunk}");
            assert_same(&what, &logits, reference, bounds.bit_exact_chunks);
        }
    }
}

/// Puts keys and values of other tokens where a sequence's first ones were, so that what is not written again is noticed.
fn overwrite<B: Backend>(runner: &mut ModelRunner<B>, length: usize) {
    runner.forward_logits(&prompt(3, length)).expect("the prompt fits");
}

/// Log-probabilities of a greedy continuation, alone and among neighbours that come, grow and go.
pub fn neighbours_do_not_change_logits<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    compare_neighbours(make, bounds, &ALL_WEIGHTS, KvCacheDtype::Native);
}

/// The same over an e4m3 cache.
pub fn neighbours_do_not_change_logits_over_fp8_cache<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    compare_neighbours(make, bounds, &FP8_CACHE_WEIGHTS, KvCacheDtype::Fp8E4m3);
}

fn compare_neighbours<B: Backend>(
    make: &dyn Fn() -> B,
    bounds: &Bounds,
    all_weights: &[TinyWeights],
    kv_cache_dtype: KvCacheDtype,
) {
    for weights in all_weights {
        let mut runner = load(make, *weights, kv_cache_dtype, [128, MAX_SEQS]);
        let mut run = |neighbours| {
            // In all, prompt and continuation have so many.
            overwrite(&mut runner, 50);
            continuation(&mut runner, neighbours)
        };
        let alone = run(0);
        for neighbours in [1, 2, MAX_SEQS - 1] {
            let crowded = run(neighbours);
            let what = format!("{weights:?} with {neighbours} neighbours");
            assert_eq!(alone.0, crowded.0, "{what}: tokens");
            assert_same(&what, &crowded.1, &alone.1, bounds.bit_exact_neighbours);
        }
    }
}

/// Twenty greedy tokens after a prompt of thirty, and the log-probabilities of all alternatives shown.
fn continuation<B: Backend>(runner: &mut ModelRunner<B>, neighbours: usize) -> (Vec<TokenId>, Vec<f32>) {
    let mut tokens = prompt(0, 30);
    let (mut computed, mut chosen, mut logprobs) = (0, Vec::new(), Vec::new());
    for step in 0..20 {
        // Neighbours stand before and after, in prompts of changing length that end at changing times.
        let mut sequences = Vec::new();
        for neighbour in 0..neighbours {
            let length = 1 + (neighbour * 5 + step * 3) % 11;
            let tokens = prompt(neighbour + 1, length);
            sequences.push(SequenceStep::new(tokens, 0, (neighbour + 1) * BLOCKS_EACH));
        }
        let ours = neighbours / 2;
        sequences.insert(ours, SequenceStep::new(tokens[computed..].to_vec(), computed, 0));
        computed = tokens.len();
        let mut batch = batch_of(&sequences);
        batch.step = step as u64;
        batch.samples = (0..sequences.len())
            .map(|index| greedy(batch.query_start[index + 1] - 1))
            .collect();
        runner.launch(&batch).expect("the step runs");
        let sampled: Vec<SampledToken> = runner.collect().expect("the step ran");
        let token = sampled[ours].token;
        let shown = sampled[ours]
            .logprobs
            .as_ref()
            .expect("log-probabilities were asked for");
        logprobs.extend(shown.top.iter().map(|(_, logprob)| *logprob));
        chosen.push(token);
        tokens.push(token);
    }
    (chosen, logprobs)
}

pub(super) fn greedy(row: u32) -> SampleRow {
    let params = SamplingParams {
        temperature: 0.0,
        logprobs: Some(10),
        ..SamplingParams::default()
    };
    SampleRow {
        row,
        position: row + 1,
        given: None,
        params: params.into(),
        banned: None,
        mask: None,
        history: None,
    }
}

pub(super) fn prompt(salt: usize, length: usize) -> Vec<TokenId> {
    (0..length)
        .map(|index| ((index * 37 + salt * 11 + index * index) % 150 + 4) as TokenId)
        .collect()
}

pub(super) fn runner<B: Backend>(
    make: &dyn Fn() -> B,
    weights: TinyWeights,
    max_num_batched_tokens: usize,
    max_num_seqs: usize,
) -> ModelRunner<B> {
    load(
        make,
        weights,
        KvCacheDtype::Native,
        [max_num_batched_tokens, max_num_seqs],
    )
}

fn load<B: Backend>(
    make: &dyn Fn() -> B,
    weights: TinyWeights,
    kv_cache_dtype: KvCacheDtype,
    [max_num_batched_tokens, max_num_seqs]: [usize; 2],
) -> ModelRunner<B> {
    let mut model = TinyModel::with_shape(weights, TinyShape::ALIGNED);
    if kv_cache_dtype == KvCacheDtype::Fp8E4m3 {
        model.add_kv_scales(KV_SCALES);
    }
    let checkpoint = model.checkpoint().expect("the tiny model is whole");
    let config = RunnerConfig {
        kv_cache_dtype,
        ..tiny_config(max_num_batched_tokens, max_num_seqs)
    };
    ModelRunner::load(make(), &checkpoint, config, &mut |_| ()).expect("the tiny model loads")
}

pub(super) fn tiny_config(max_num_batched_tokens: usize, max_num_seqs: usize) -> RunnerConfig {
    RunnerConfig {
        max_num_batched_tokens,
        max_num_seqs,
        max_model_len: Some(BLOCKS_EACH * BLOCK_SIZE),
        block_size: BLOCK_SIZE as u32,
        kv_cache: KvCacheSize::Blocks((BLOCKS_EACH * MAX_SEQS) as u32),
        kv_cache_dtype: KvCacheDtype::Native,
    }
}

fn assert_same(what: &str, got: &[f32], want: &[f32], is_exact: bool) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        if is_exact {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{what}: value {index} is {got}, expected {want} exactly"
            );
        } else {
            // Near-random models amplify one FP8 rounding: only gross errors are caught this way.
            assert!(
                (got - want).abs() < 0.5,
                "{what}: value {index} is {got}, expected about {want}"
            );
        }
    }
}
