//! Whole models on the kernels against the CPU backend: the demo model, golden fixtures, and any checkpoint named in
//! `LAPIDARY_CHECKPOINTS` (folders, separated by colons; for a GPU). The device is chosen as in `conformance.rs`.
//!
//! The kernels are compared with a CPU backend that rounds to bf16 where they do. How far both are from f32 between all
//! operations is printed beside it: that distance is the storage's, and the kernels may not add much to it.
#![allow(clippy::print_stdout, reason = "the agreement found is worth reading")]
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::path::{Path, PathBuf};

use lapidary_cpu::{Cpu, CpuConfig, Storage};
use lapidary_cuda::{Cuda, CudaConfig};
use lapidary_model::{Backend, Checkpoint, ConfigOverrides, KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};
use lapidary_text::Tokenizer;

/// Of the logits of one position on both backends; less only on a GPU, where the model itself is so sensitive that the CPU's
/// two storage formats agree no better ([`MAX_COSINE_EXCESS`]).
const MIN_COSINE: f64 = 0.999;
/// Where the two largest logits are further apart than this, both backends must choose the same token: sums of another
/// order turn a bf16 rounding now and then, which turns an FP8 rounding now and then.
const DECIDED_GAP: f32 = 0.5;
/// How much further from f32 storage than the CPU with bf16 storage the kernels may be.
const MAX_EXCESS: f64 = 1.5;
/// The same of what a cosine lacks to 1, from the CPU with bf16 storage. Tensor cores add e4m3 products with fewer bits than
/// f32 has: on a GPU, unlike on the emulator, other roundings turn than on the CPU. Of two results that lie equally far from
/// a third, each its own way, the squares of distances add up to 2; and a quarter more for the worst of few positions.
const MAX_COSINE_EXCESS: f64 = 2.5;
/// Of the checkpoints that are too large to keep, whose vocabulary is Gemma's.
const PROMPT_TOKENS: u32 = 48;
/// Tokens of a step.
const MAX_TOKENS: usize = 32;

fn on_gpu() -> bool {
    std::env::var("LAPIDARY_TEST_DEVICE").as_deref() == Ok("gpu")
}

fn cuda() -> Cuda {
    if on_gpu() {
        let device = lapidary_cuda::devices().expect("a GPU was asked for").swap_remove(0);
        return Cuda::open(device, CudaConfig::default()).unwrap();
    }
    Cuda::emulated(90, CudaConfig::default()).unwrap()
}

fn cpu(storage: Storage) -> Cpu {
    Cpu::new(CpuConfig {
        storage,
        ..CpuConfig::default()
    })
    .unwrap()
}

fn runner<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    (max_tokens, kv_cache_dtype): (usize, KvCacheDtype),
) -> ModelRunner<B> {
    let config = RunnerConfig {
        max_num_batched_tokens: max_tokens,
        max_num_seqs: max_tokens,
        max_model_len: Some(256),
        block_size: 16,
        kv_cache: KvCacheSize::Blocks(16),
        kv_cache_dtype,
    };
    ModelRunner::load(backend, checkpoint, config, &mut |_| ()).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures")
        .join(name)
}

/// What two backends make of the same tokens.
#[derive(Debug)]
struct Agreement {
    /// Of all logits' difference, by the length of the first's.
    distance: f64,
    min_cosine: f64,
    mean_kl: f64,
    max_kl: f64,
    /// Positions where the choice differs although it was decided.
    wrong: usize,
    /// Positions where it differs at all.
    differ: usize,
    positions: usize,
}

fn compare(want: &[f32], got: &[f32], vocab: usize) -> Agreement {
    assert_eq!(want.len(), got.len());
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let difference = length(&mut want.iter().zip(got).map(|(want, got)| want - got));
    let mut found = Agreement {
        distance: difference / length(&mut want.iter().copied()),
        min_cosine: 1.0,
        mean_kl: 0.0,
        max_kl: 0.0,
        wrong: 0,
        differ: 0,
        positions: want.len() / vocab,
    };
    for (want, got) in want.chunks(vocab).zip(got.chunks(vocab)) {
        assert!(got.iter().all(|logit| logit.is_finite()), "logits are numbers");
        found.min_cosine = found.min_cosine.min(cosine(want, got));
        let kl = divergence(want, got);
        found.mean_kl += kl / found.positions as f64;
        found.max_kl = found.max_kl.max(kl);
        let (best, gap) = best(want);
        if self::best(got).0 != best {
            found.differ += 1;
            found.wrong += usize::from(gap > DECIDED_GAP);
        }
    }
    found
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Of the distribution of `b` from that of `a`, in nats.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let logprobs = |logits: &[f32]| {
        let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        logits
            .iter()
            .map(|logit| f64::from(*logit) - total.ln())
            .collect::<Vec<_>>()
    };
    logprobs(a)
        .iter()
        .zip(logprobs(b))
        .map(|(a, b)| a.exp() * (a - b))
        .sum()
}

/// The largest logit's index and its distance from the next.
fn best(logits: &[f32]) -> (usize, f32) {
    let index = (0..logits.len())
        .reduce(|best, i| if logits[i] > logits[best] { i } else { best })
        .unwrap();
    let others = logits.iter().enumerate().filter(|(i, _)| *i != index);
    let next = others.fold(f32::NEG_INFINITY, |next, (_, logit)| next.max(*logit));
    (index, logits[index] - next)
}

/// A checkpoint on the kernels, and on the CPU with either storage.
struct Models {
    name: String,
    vocab: usize,
    cuda: ModelRunner<Cuda>,
    bf16: ModelRunner<Cpu>,
    f32: ModelRunner<Cpu>,
}

impl Models {
    fn load(folder: &Path, max_tokens: usize, kv_cache_dtype: KvCacheDtype) -> Self {
        let checkpoint = Checkpoint::open_dir(folder, ConfigOverrides::default()).unwrap();
        let how = (max_tokens, kv_cache_dtype);
        Self {
            name: format!("{}, cache {kv_cache_dtype}", folder.display()),
            vocab: checkpoint.config().vocab_size,
            cuda: runner(cuda(), &checkpoint, how),
            bf16: runner(cpu(Storage::Bf16), &checkpoint, how),
            f32: runner(cpu(Storage::F32), &checkpoint, how),
        }
    }

    /// Answers greedily on the CPU.
    fn answer(&mut self, tokens: &mut Vec<u32>, num_tokens: usize) {
        for _ in 0..num_tokens {
            let logits = self.f32.forward_logits(tokens).unwrap();
            tokens.push(best(&logits[logits.len() - self.vocab..]).0 as u32);
        }
    }

    fn check(&mut self, tokens: &[u32]) {
        let (name, vocab) = (&self.name, self.vocab);
        let cuda = self.cuda.forward_logits(tokens).unwrap();
        let bf16 = self.bf16.forward_logits(tokens).unwrap();
        let f32 = self.f32.forward_logits(tokens).unwrap();
        let kernels = compare(&bf16, &cuda, vocab);
        let [storage, both] = [&bf16, &cuda].map(|logits| compare(&f32, logits, vocab));
        println!("{name}");
        println!("  kernels from the CPU with bf16 storage: {kernels:?}");
        println!("  bf16 storage from f32 storage, CPU:     {storage:?}");
        println!("  kernels from the CPU with f32 storage:  {both:?}");
        let of_roundings = MAX_COSINE_EXCESS * (1.0 - storage.min_cosine);
        let most = (1.0 - MIN_COSINE).max(if on_gpu() { of_roundings } else { 0.0 });
        assert!(
            1.0 - kernels.min_cosine <= most,
            "{name}: cosine {}, of the storage formats {}",
            kernels.min_cosine,
            storage.min_cosine
        );
        assert_eq!(kernels.wrong, 0, "{name}: decided tokens that differ");
        assert!(
            both.distance <= MAX_EXCESS * storage.distance,
            "{name}: bf16 storage is {} from f32, the kernels are {}",
            storage.distance,
            both.distance
        );
    }
}

fn ask_the_demo_model(questions: &[&str], kv_cache_dtype: KvCacheDtype) {
    let files = fixture("demo");
    let tokenizer = Tokenizer::load(&files).unwrap();
    let mut models = Models::load(&files, 64, kv_cache_dtype);
    for question in questions {
        let text = format!("<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n");
        let mut tokens = tokenizer.encode(&text, true).unwrap();
        models.answer(&mut tokens, 8);
        models.check(&tokens);
    }
}

#[test]
fn the_demo_model_answers_alike() {
    let questions = ["What is 12 + 7?", "Sort 9, 4, 7.", "My name is Ada. What is my name?"];
    ask_the_demo_model(&questions, KvCacheDtype::Native);
}

#[test]
fn the_demo_model_answers_alike_over_an_fp8_cache() {
    ask_the_demo_model(&["What is 12 + 7?"], KvCacheDtype::Fp8E4m3);
}

#[test]
fn golden_checkpoints_agree() {
    for name in ["golden/bf16-head-dim-256", "golden/fp8-autofp8-dynamic"] {
        let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + i * i) % 150 + 4).collect();
        Models::load(&fixture(name), MAX_TOKENS, KvCacheDtype::Native).check(&tokens);
    }
    // Those that are too large to keep: only a GPU can run them, and there they must be named.
    if on_gpu() {
        let folders = std::env::var("LAPIDARY_CHECKPOINTS").expect("LAPIDARY_CHECKPOINTS names checkpoints to compare");
        for folder in folders.split(':') {
            let tokens: Vec<u32> = (0..PROMPT_TOKENS).map(|i| (i * 7919 + 13) % 250_000).collect();
            Models::load(Path::new(folder), MAX_TOKENS, KvCacheDtype::Native).check(&tokens);
        }
    }
}
