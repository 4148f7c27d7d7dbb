//! Log-probabilities over HTTP are those of Hugging Face transformers (`tests/fixtures/golden/README.md`), asked for as
//! evaluation harnesses do: batches of token prompts, `echo` with `logprobs`; and in `prompt_logprobs`.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lapidary_cpu::{Cpu, CpuConfig, Isa};
use lapidary_engine::{Engine, EngineConfig};
use lapidary_model::{Checkpoint, ConfigOverrides, KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};
use lapidary_server::{AppState, Limits, Metrics, Phase};
use serde_json::{Value, json};

use crate::support::{MODEL, Server, served, tokenizer};

/// What transformers computes for one prompt.
struct Prompt {
    tokens: Vec<u32>,
    /// `[tokens, vocab]`
    logprobs: Vec<f32>,
}

impl Prompt {
    /// Of token `position`, after those before it.
    fn logprob(&self, position: usize, token: usize) -> f64 {
        let vocab = self.logprobs.len() / self.tokens.len();
        f64::from(self.logprobs[(position - 1) * vocab + token])
    }

    /// Of the tokens from `start` on, given those before.
    fn loglikelihood(&self, start: usize) -> f64 {
        let tokens = self.tokens.iter().enumerate().skip(start);
        tokens
            .map(|(position, token)| self.logprob(position, *token as usize))
            .sum()
    }
}

/// Steps and sampled rows so small that every prompt is scored in pieces.
fn serve(case: &Path) -> Server {
    let checkpoint = Checkpoint::open_dir(case, ConfigOverrides::default()).unwrap();
    let vocab_size = u32::try_from(checkpoint.config().vocab_size).unwrap();
    let config = RunnerConfig {
        max_num_batched_tokens: 24,
        max_num_seqs: 5,
        max_model_len: Some(128),
        block_size: 16,
        kv_cache: KvCacheSize::Blocks(32),
        kv_cache_dtype: KvCacheDtype::Native,
    };
    let limits = EngineConfig {
        max_num_batched_tokens: 24,
        max_num_seqs: 5,
        max_model_len: 128,
        ..EngineConfig::default()
    };
    let build = move || {
        let isa = Isa::detect();
        let backend = Cpu::new(CpuConfig {
            threads: 1,
            isa,
            ..CpuConfig::default()
        })
        .unwrap();
        ModelRunner::load(backend, &checkpoint, config, &mut |_| ())
    };
    let engine = Engine::spawn(limits, build).unwrap();
    let state = AppState::new(Limits::default(), Metrics::new(MODEL));
    let mut model = served(Arc::new(tokenizer()), engine.clone());
    model.vocab_size = vocab_size;
    state.model.set(model).unwrap();
    state.lifecycle.enter(Phase::Ready);
    Server {
        router: lapidary_server::router(state.clone()),
        state,
        engine,
    }
}

#[tokio::test]
async fn echoed_and_prompt_logprobs_are_those_of_transformers() {
    for case in [
        "bf16",
        "bf16-sharded",
        "bf16-27b-geometry",
        "fp16",
        "fp8-autofp8-static",
        "fp8-ct-channel-dynamic",
    ] {
        let case = fixtures().join(case);
        let (bound, prompts) = read(&case.join("golden.safetensors"));
        let server = serve(&case);
        let tokens: Vec<_> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
        for max_tokens in [0, 1] {
            let answer = server
                .complete(json!({
                    "prompt": tokens, "max_tokens": max_tokens, "echo": true, "logprobs": 1, "temperature": 0,
                    "prompt_logprobs": 4, "return_tokens_as_token_ids": true,
                }))
                .await
                .json();
            for (index, prompt) in prompts.iter().enumerate() {
                let choice = &answer["choices"][index];
                let name = format!("{}, prompt {index}", case.display());
                check_echo(&name, choice, prompt, bound);
                check_prompt_logprobs(&name, &choice["prompt_logprobs"], prompt, bound);
            }
        }
        server.assert_idle().await;
    }
}

/// What lm-eval makes of an answer: a sum from some token on, and whether each of them was the likeliest.
fn check_echo(name: &str, choice: &Value, prompt: &Prompt, bound: f64) {
    let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
    let top = choice["logprobs"]["top_logprobs"].as_array().unwrap();
    let num_tokens = prompt.tokens.len();
    assert!(logprobs.len() >= num_tokens && logprobs[0].is_null(), "{name}");
    for start in 1..num_tokens {
        let scores = logprobs[start..num_tokens].iter().map(|score| score.as_f64().unwrap());
        let error = (scores.sum::<f64>() - prompt.loglikelihood(start)).abs();
        assert!(
            error <= bound * (num_tokens - start) as f64,
            "{name} from {start}: {error}"
        );
        let token = prompt.tokens[start] as usize;
        let error = (logprobs[start].as_f64().unwrap() - prompt.logprob(start, token)).abs();
        assert!(error <= bound, "{name} at {start}: {error}");
        let best = top[start]
            .as_object()
            .unwrap()
            .values()
            .map(|logprob| logprob.as_f64().unwrap());
        let best = best.fold(f64::MIN, f64::max);
        let vocab = prompt.logprobs.len() / num_tokens;
        let expected = (0..vocab)
            .map(|other| prompt.logprob(start, other))
            .fold(f64::MIN, f64::max);
        assert!(
            (best - expected).abs() <= bound,
            "{name} at {start}: {best} instead of {expected}"
        );
    }
}

fn check_prompt_logprobs(name: &str, prompt_logprobs: &Value, prompt: &Prompt, bound: f64) {
    let entries = prompt_logprobs.as_array().unwrap();
    assert_eq!(entries.len(), prompt.tokens.len(), "{name}");
    for (position, entry) in entries.iter().enumerate().skip(1) {
        let entry = entry.as_object().unwrap();
        assert!(
            entry.contains_key(&prompt.tokens[position].to_string()),
            "{name} at {position}"
        );
        for (token, scored) in entry {
            let expected = prompt.logprob(position, token.parse().unwrap());
            let error = (scored["logprob"].as_f64().unwrap() - expected).abs();
            assert!(error <= bound, "{name} at {position}, token {token}: {error}");
            let vocab = prompt.logprobs.len() / prompt.tokens.len();
            let others = (0..vocab).map(|other| prompt.logprob(position, other));
            // Those within rounding may stand on either side.
            let (above, near) = others.fold((0, 0), |(above, near), other| match other - expected {
                difference if difference > 2.0 * bound => (above + 1, near),
                difference if difference >= -2.0 * bound => (above, near + 1),
                _ => (above, near),
            });
            let rank = scored["rank"].as_u64().unwrap();
            assert!(
                (above + 1..=above + near).contains(&rank),
                "{name} at {position}: rank {rank}"
            );
        }
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden")
}

/// The bound of a log-probability's error, and the prompts.
fn read(path: &Path) -> (f64, Vec<Prompt>) {
    let tensors = words(path);
    let floats = |name: &str| {
        tensors[name]
            .iter()
            .map(|bits| f32::from_bits(*bits))
            .collect::<Vec<_>>()
    };
    let indices = (0..).take_while(|index| tensors.contains_key(&format!("prompt_{index}")));
    let prompts: Vec<_> = indices
        .map(|index| Prompt {
            tokens: tensors[&format!("prompt_{index}")].clone(),
            logprobs: floats(&format!("logprobs_{index}")),
        })
        .collect();
    assert!(!prompts.is_empty(), "no prompts in {}", path.display());
    (f64::from(floats("bound")[0]), prompts)
}

/// Every tensor of a safetensors file as 32-bit words, which all of them are made of.
fn words(path: &Path) -> HashMap<String, Vec<u32>> {
    let bytes = std::fs::read(path).unwrap();
    let header_len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    let (header, data) = bytes[8..].split_at(header_len);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let read = |(name, info): (String, Value)| {
        let offset = |end: usize| usize::try_from(info["data_offsets"][end].as_u64().unwrap()).unwrap();
        let words = data[offset(0)..offset(1)].as_chunks::<4>().0;
        (name, words.iter().map(|word| u32::from_le_bytes(*word)).collect())
    };
    tensors.map(read).collect()
}
