//! Whole models on the kernels against the CPU backend: the demo model, golden fixtures, and any checkpoint named in
//! `LAPIDARY_CHECKPOINTS` (folders, separated by colons; for a GPU). The device is chosen as in `conformance.rs`.
#![allow(clippy::print_stdout, reason = "the agreement found is worth reading")]
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::path::{Path, PathBuf};

use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_cuda::{Cuda, CudaConfig};
use lapidary_model::{Backend, Checkpoint, ConfigOverrides, KvCacheSize, ModelRunner, RunnerConfig};
use lapidary_text::Tokenizer;

/// Of the logits of one position on both backends.
const MIN_COSINE: f64 = 0.999;
/// Where the two largest logits are further apart than this, both backends must choose the same token: FP8 roundings that
/// fall differently (CUDA keeps bf16 between operations, the CPU f32) move a logit by a few tenths.
const DECIDED_GAP: f32 = 0.5;
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

fn cpu() -> Cpu {
    Cpu::new(CpuConfig::default()).unwrap()
}

fn runner<B: Backend>(backend: B, checkpoint: &Checkpoint, max_tokens: usize) -> ModelRunner<B> {
    let config = RunnerConfig {
        max_num_batched_tokens: max_tokens,
        max_num_seqs: max_tokens,
        max_model_len: Some(256),
        block_size: 16,
        kv_cache: KvCacheSize::Blocks(16),
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
    min_cosine: f64,
    mean_kl: f64,
    max_kl: f64,
    /// Positions where the choice differs although it was decided.
    wrong: usize,
    /// Positions where it differs at all.
    differ: usize,
    positions: usize,
}

fn compare(cpu: &[f32], cuda: &[f32], vocab: usize) -> Agreement {
    assert_eq!(cpu.len(), cuda.len());
    let mut found = Agreement {
        min_cosine: 1.0,
        mean_kl: 0.0,
        max_kl: 0.0,
        wrong: 0,
        differ: 0,
        positions: cpu.len() / vocab,
    };
    for (want, got) in cpu.chunks(vocab).zip(cuda.chunks(vocab)) {
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

fn check(name: &str, found: &Agreement) {
    println!("{name}: {found:?}");
    assert!(found.min_cosine >= MIN_COSINE, "{name}: cosine {}", found.min_cosine);
    assert_eq!(found.wrong, 0, "{name}: decided tokens that differ");
}

#[test]
fn the_demo_model_answers_alike() {
    let files = fixture("demo");
    let checkpoint = Checkpoint::open_dir(&files, ConfigOverrides::default()).unwrap();
    let tokenizer = Tokenizer::load(&files).unwrap();
    let questions = ["What is 12 + 7?", "Sort 9, 4, 7.", "My name is Ada. What is my name?"];
    let (mut cpu, mut cuda) = (runner(cpu(), &checkpoint, 64), runner(cuda(), &checkpoint, 64));
    let vocab = checkpoint.config().vocab_size;
    for question in questions {
        let text = format!("<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n");
        let mut tokens = tokenizer.encode(&text, true).unwrap();
        // Greedy on the CPU; the kernels then judge the same positions.
        for _ in 0..8 {
            let logits = cpu.forward_logits(&tokens).unwrap();
            tokens.push(best(&logits[logits.len() - vocab..]).0 as u32);
        }
        let (want, got) = (
            cpu.forward_logits(&tokens).unwrap(),
            cuda.forward_logits(&tokens).unwrap(),
        );
        check(question, &compare(&want, &got, vocab));
    }
}

#[test]
fn golden_checkpoints_agree() {
    for name in ["golden/bf16-head-dim-256", "golden/fp8-autofp8-dynamic"] {
        let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + i * i) % 150 + 4).collect();
        compare_checkpoint(&fixture(name), &tokens);
    }
    // Those that are too large to keep: only a GPU can run them, and there they must be named.
    if on_gpu() {
        let folders = std::env::var("LAPIDARY_CHECKPOINTS").expect("LAPIDARY_CHECKPOINTS names checkpoints to compare");
        for folder in folders.split(':') {
            let tokens: Vec<u32> = (0..PROMPT_TOKENS).map(|i| (i * 7919 + 13) % 250_000).collect();
            compare_checkpoint(Path::new(folder), &tokens);
        }
    }
}

fn compare_checkpoint(folder: &Path, tokens: &[u32]) {
    let checkpoint = Checkpoint::open_dir(folder, ConfigOverrides::default()).unwrap();
    let got = runner(cuda(), &checkpoint, MAX_TOKENS).forward_logits(tokens).unwrap();
    let want = runner(cpu(), &checkpoint, MAX_TOKENS).forward_logits(tokens).unwrap();
    check(
        &folder.to_string_lossy(),
        &compare(&want, &got, checkpoint.config().vocab_size),
    );
}
