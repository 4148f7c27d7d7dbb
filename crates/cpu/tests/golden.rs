//! Agreement with Hugging Face transformers on every checkpoint format (`tests/fixtures/golden/README.md`).
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use lapidary_cpu::{Cpu, CpuConfig, Isa};
use lapidary_model::{Checkpoint, ConfigOverrides, KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};

/// Fewer would mean that fixtures got lost.
const MIN_CASES: usize = 15;

/// What transformers computes for one prompt.
struct Prompt {
    tokens: Vec<u32>,
    /// `[tokens, vocab]`
    logprobs: Vec<f32>,
    greedy: Vec<u32>,
    greedy_gaps: Vec<f32>,
}

struct Golden {
    bound: f32,
    prompts: Vec<Prompt>,
}

#[test]
fn logprobs_and_greedy_tokens_are_those_of_transformers() {
    let cases = cases();
    assert!(
        cases.len() >= MIN_CASES,
        "{} golden cases, expected {MIN_CASES}",
        cases.len()
    );
    let isas: Vec<_> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    let mut failures = Vec::new();
    for case in cases {
        let golden = Golden::read(&case.join("golden.safetensors"));
        for isa in &isas {
            let name = format!("{} ({isa:?})", case.file_name().unwrap().to_string_lossy());
            let outcome = compare(&golden, &mut runner(&case, *isa));
            println!(
                "{name:44} largest log-probability error {:.2e} of {:.0e}",
                outcome.error, golden.bound
            );
            if outcome.error.is_nan() || outcome.error > golden.bound {
                failures.push(format!("{name}: log-probabilities are off by {}", outcome.error));
            }
            failures.extend(outcome.wrong_tokens.map(|what| format!("{name}: {what}")));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

struct Outcome {
    error: f32,
    wrong_tokens: Option<String>,
}

fn compare(golden: &Golden, runner: &mut ModelRunner<Cpu>) -> Outcome {
    let mut outcome = Outcome {
        error: 0.0,
        wrong_tokens: None,
    };
    let vocab = runner.config().vocab_size;
    for (index, prompt) in golden.prompts.iter().enumerate() {
        let logits = runner.forward_logits(&prompt.tokens).unwrap();
        for (logits, expected) in logits.chunks(vocab).zip(prompt.logprobs.chunks(vocab)) {
            let errors = log_softmax(logits).zip(expected).map(|(got, want)| (got - want).abs());
            // NaN must not get lost in a maximum.
            outcome.error = errors.fold(outcome.error, |max, error| if error <= max { max } else { error });
        }
        let steady = prompt
            .greedy_gaps
            .iter()
            .take_while(|gap| **gap > 2.0 * golden.bound)
            .count();
        let mut tokens = prompt.tokens.clone();
        for step in 0..steady {
            let logits = runner.forward_logits(&tokens).unwrap();
            let last = &logits[logits.len() - vocab..];
            let best = (0..vocab)
                .reduce(|best, token| if last[token] > last[best] { token } else { best })
                .unwrap();
            if best as u32 != prompt.greedy[step] {
                let wanted = prompt.greedy[step];
                outcome.wrong_tokens = Some(format!("prompt {index}, step {step}: token {best} instead of {wanted}"));
                break;
            }
            tokens.push(best as u32);
        }
    }
    outcome
}

fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits
        .iter()
        .map(move |logit| (f64::from(logit - max) - total.ln()) as f32)
}

fn runner(case: &Path, isa: Isa) -> ModelRunner<Cpu> {
    let backend = Cpu::new(CpuConfig {
        threads: 2,
        isa,
        ..CpuConfig::default()
    })
    .unwrap();
    let checkpoint = Checkpoint::open_dir(case, ConfigOverrides::default()).unwrap();
    let config = RunnerConfig {
        max_num_batched_tokens: 32,
        max_num_seqs: 32,
        max_model_len: Some(128),
        block_size: 16,
        kv_cache: KvCacheSize::Blocks(8),
        kv_cache_dtype: KvCacheDtype::Native,
    };
    ModelRunner::load(backend, &checkpoint, config, &mut |_| ()).unwrap()
}

fn cases() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    let folders = std::fs::read_dir(&fixtures).expect("the golden fixtures are part of the repository");
    let mut cases: Vec<_> = folders.map(|folder| folder.unwrap().path()).collect();
    cases.retain(|folder| folder.join("golden.safetensors").is_file());
    cases.sort();
    cases
}

impl Golden {
    fn read(path: &Path) -> Self {
        let tensors = words(path);
        let ints = |name: String| tensors[&name].clone();
        let floats = |name: String| {
            tensors[&name]
                .iter()
                .map(|bits| f32::from_bits(*bits))
                .collect::<Vec<_>>()
        };
        let prompts = (0..)
            .take_while(|index| tensors.contains_key(&format!("prompt_{index}")))
            .map(|index| Prompt {
                tokens: ints(format!("prompt_{index}")),
                logprobs: floats(format!("logprobs_{index}")),
                greedy: ints(format!("greedy_{index}")),
                greedy_gaps: floats(format!("greedy_gap_{index}")),
            });
        let prompts: Vec<_> = prompts.collect();
        assert!(!prompts.is_empty(), "no prompts in {}", path.display());
        Self {
            bound: floats("bound".to_owned())[0],
            prompts,
        }
    }
}

/// Every tensor of a safetensors file as 32-bit words, which all of them are made of.
fn words(path: &Path) -> HashMap<String, Vec<u32>> {
    let bytes = std::fs::read(path).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(header_len);
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let read = |(name, info): (String, serde_json::Value)| {
        let offset = |end: usize| info["data_offsets"][end].as_u64().unwrap() as usize;
        let words = data[offset(0)..offset(1)].as_chunks::<4>().0;
        (name, words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    };
    tensors.map(read).collect()
}
