//! Whole models on the kernels against the CPU backend: the demo model, golden fixtures, and any checkpoint named in
//! `LAPIDARY_CHECKPOINTS` (folders, separated by colons; for a GPU). The device is chosen as in `conformance.rs`.
//!
//! The kernels are compared with a CPU backend that computes as they do, to the bit, up to the last hidden state: FP8 models
//! turn one rounding into many, and two backends that differ in one of a million values differ in the third digit of all
//! logits some layers later. A fault of that size could not be told from it. So the logits may differ by what the kernels'
//! soft-cap of logits errs, and by nothing else. How far both are from f32 is printed beside it.
#![allow(clippy::print_stdout, reason = "the agreement found is worth reading")]
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::path::{Path, PathBuf};

use lapidary_cpu::{Cpu, CpuConfig, Storage, Sums};
use lapidary_cuda::{Cuda, CudaConfig};
use lapidary_model::{Backend, Checkpoint, ConfigOverrides, KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};
use lapidary_text::Tokenizer;

/// What cosines may lack to 1, of the logits of one position on the kernels and on the CPU that computes alike. With f32
/// sums they lack 8e-4 and more (the demo model), 2.5e-4 (of the golden ones the one in FP8).
const MISSES: f64 = 1e-10;
/// Where the two largest logits are further apart than this, both backends must choose the same token.
const DECIDED_GAP: f32 = 1e-3;
/// How much further from f32 storage than the CPU with bf16 storage the kernels may be.
const MAX_EXCESS: f64 = 1.5;
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

fn cpu(storage: Storage, sums: Sums) -> Cpu {
    Cpu::new(CpuConfig {
        storage,
        sums,
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

/// Logits of the CPU that computes as the kernels do, and theirs.
fn check_alike((name, vocab): (&str, usize), alike: &[f32], cuda: &[f32]) {
    let kernels = compare(alike, cuda, vocab);
    println!("{name}\n  kernels from the CPU that computes alike: {kernels:?}");
    let cosine = kernels.min_cosine;
    assert!(cosine >= 1.0 - MISSES, "{name}: cosine {cosine} of the worst position");
    assert_eq!(kernels.wrong, 0, "{name}: decided tokens that differ");
}

/// Models of random weights, and many of them, in which nothing that was turned is ever forgotten.
///
/// One backend after the other: two copies of a large model may be too much for the machine.
fn check_large(folder: &Path) {
    let checkpoint = Checkpoint::open_dir(folder, ConfigOverrides::default()).unwrap();
    let config = checkpoint.config();
    let vocab = config.vocab_size;
    let tokens: Vec<u32> = (0..PROMPT_TOKENS).map(|i| (i * 7919 + 13) % 250_000).collect();
    let how = (MAX_TOKENS, KvCacheDtype::Native);
    let cuda = runner(cuda(), &checkpoint, how).forward_logits(&tokens).unwrap();
    let [alike, with_f32_sums] = [Sums::TensorCore, Sums::F32].map(|sums| {
        let cpu = cpu(Storage::Bf16, sums);
        runner(cpu, &checkpoint, how).forward_logits(&tokens).unwrap()
    });
    let name = format!("{}, {} layers", folder.display(), config.num_layers);
    let sums = compare(&alike, &with_f32_sums, vocab);
    println!("{name}\n  f32 sums from those of tensor cores, CPU: {sums:?}");
    check_alike((&name, vocab), &alike, &cuda);
}

/// A checkpoint on the kernels, and on the CPU: as they compute, with f32 sums, and with f32 between operations too.
struct Models {
    name: String,
    vocab: usize,
    cuda: ModelRunner<Cuda>,
    alike: ModelRunner<Cpu>,
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
            alike: runner(cpu(Storage::Bf16, Sums::TensorCore), &checkpoint, how),
            bf16: runner(cpu(Storage::Bf16, Sums::F32), &checkpoint, how),
            f32: runner(cpu(Storage::F32, Sums::F32), &checkpoint, how),
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
        let alike = self.alike.forward_logits(tokens).unwrap();
        let bf16 = self.bf16.forward_logits(tokens).unwrap();
        let f32 = self.f32.forward_logits(tokens).unwrap();
        check_alike((name, vocab), &alike, &cuda);
        let sums = compare(&bf16, &alike, vocab);
        let [storage, both] = [&bf16, &cuda].map(|logits| compare(&f32, logits, vocab));
        println!("  tensor cores' sums from f32 sums, CPU:    {sums:?}");
        println!("  bf16 storage from f32 storage, CPU:       {storage:?}");
        println!("  kernels from the CPU with f32 throughout: {both:?}");
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
            check_large(Path::new(folder));
        }
    }
}
