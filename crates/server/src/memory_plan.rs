//! Where a device's memory goes, for the log; and why a model does not fit, with what would help.

use std::fmt::{self, Write as _};

use lapidary_model::{BackendError, KvCacheDtype, KvCacheSize, MemoryPlan, RunnerConfig, RunnerError};

use crate::units::ByteSize;

/// More than this of a device taken before loading is worth a word.
const MAX_TAKEN_SHARE: f64 = 0.05;
/// Above it, more of the device to use is no advice.
const MAX_UTILIZATION: f64 = 0.95;

/// Writes the plan to the log, a line each.
pub(crate) fn log(plan: &MemoryPlan, kv_cache_dtype: KvCacheDtype) {
    for (what, bytes) in rows(plan) {
        tracing::info!("memory plan: {what:<20}{:>12}", ByteSize(bytes));
    }
    let (tokens, per_token) = (plan.capacity_tokens(), ByteSize(plan.kv_bytes_per_token));
    tracing::info!(blocks = plan.num_blocks, tokens, %per_token, dtype = %kv_cache_dtype, "kv cache");
}

fn rows(plan: &MemoryPlan) -> [(&'static str, u64); 8] {
    [
        ("weights", plan.weight_bytes),
        ("scratch", plan.scratch_bytes),
        ("backend", plan.backend_bytes),
        ("kv cache", plan.kv_cache_bytes),
        ("recorded steps", plan.graph_bytes),
        ("total", plan.total_bytes()),
        ("free before loading", plan.device_free_bytes),
        ("device", plan.device_total_bytes),
    ]
}

/// Why a model does not fit into a device's memory: the plan as a table, what is missing, and which settings to change.
#[derive(Debug)]
pub struct Shortage {
    plan: MemoryPlan,
    config: RunnerConfig,
    what: String,
    missing_bytes: Option<u64>,
    /// By settings, or there is no room for one that holds a sequence.
    is_cache_too_small: bool,
}

impl Shortage {
    /// `None` for errors of another kind.
    pub(crate) fn of(error: &RunnerError, config: RunnerConfig) -> Option<Self> {
        match error {
            RunnerError::OutOfMemory { plan, source } => {
                let allocation = allocation(&**source);
                Some(Self {
                    plan: *plan,
                    config,
                    what: allocation.map_or("it", |(what, _)| what).to_owned(),
                    missing_bytes: allocation.and_then(|(_, missing)| missing),
                    is_cache_too_small: false,
                })
            }
            RunnerError::KvCacheTooSmall {
                capacity_tokens,
                max_model_len,
                plan,
            } => Some(Self {
                plan: *plan,
                config,
                what: format!("keys and values of one sequence of {max_model_len} tokens (it has {capacity_tokens})"),
                missing_bytes: Some((*max_model_len as u64 - capacity_tokens) * plan.kv_bytes_per_token),
                is_cache_too_small: true,
            }),
            _ => None,
        }
    }

    /// Settings to change, most effective first, each with why.
    fn advice(&self) -> Vec<String> {
        let (plan, kv_cache) = (&self.plan, self.config.kv_cache);
        if plan.weight_bytes > plan.device_total_bytes {
            return vec!["a smaller checkpoint or one in FP8: the weights alone are larger than the memory".to_owned()];
        }
        let mut advice = Vec::new();
        if self.is_cache_too_small {
            if let KvCacheSize::Bytes(_) = kv_cache {
                let enough = ByteSize(plan.kv_cache_bytes + self.missing_bytes.unwrap_or(0));
                advice.push(format!("--kv-cache-memory-bytes of {enough} or more"));
                advice.extend(self.narrower_cache());
                advice.push(self.shorter_sequences());
                return advice;
            }
            advice.extend(self.taken_by_others());
            if let KvCacheSize::DeviceShare(share) = kv_cache
                && share < MAX_UTILIZATION
            {
                advice.push(format!(
                    "--gpu-memory-utilization above {share}: how much of the memory may be used"
                ));
            }
            advice.extend(self.narrower_cache());
            advice.push(self.shorter_sequences());
        } else {
            advice.extend(self.taken_by_others());
            // What fails once the cache is sized lacks what the cache has.
            match kv_cache {
                KvCacheSize::DeviceShare(share) if plan.num_blocks > 0 => {
                    advice.push(format!(
                        "--gpu-memory-utilization below {share}: more is left for what comes later"
                    ));
                    advice.push("--enforce-eager: no steps are recorded".to_owned());
                }
                KvCacheSize::Bytes(bytes) if plan.num_blocks > 0 => {
                    advice.push(format!("--kv-cache-memory-bytes below {}", ByteSize(bytes)));
                }
                _ => {}
            }
        }
        let (tokens, seqs) = (self.config.max_num_batched_tokens, self.config.max_num_seqs);
        advice.push(format!(
            "--max-num-seqs below {seqs}, --max-num-batched-tokens below {tokens}: less scratch"
        ));
        advice
    }

    fn taken_by_others(&self) -> Option<String> {
        let (free, total) = (self.plan.device_free_bytes, self.plan.device_total_bytes);
        let taken = total.saturating_sub(free);
        let is_much = taken as f64 > MAX_TAKEN_SHARE * total as f64;
        let taken = ByteSize(taken);
        is_much.then(|| format!("ending what else uses the memory: {taken} were taken before loading"))
    }

    fn narrower_cache(&self) -> Option<String> {
        let is_native = self.config.kv_cache_dtype == KvCacheDtype::Native;
        is_native.then(|| "--kv-cache-dtype fp8: keys and values take half the memory or less".to_owned())
    }

    fn shorter_sequences(&self) -> String {
        let most = match self.plan.capacity_tokens() {
            0 => format!("below {}", self.config.max_model_len.unwrap_or(0)),
            tokens => tokens.to_string(),
        };
        format!("--max-model-len {most}: a sequence of full length must fit the KV cache")
    }
}

/// The allocation that failed, and how much it lacked.
fn allocation<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<(&'a str, Option<u64>)> {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes
        .filter_map(<dyn std::error::Error>::downcast_ref)
        .find_map(|error| match error {
            BackendError::OutOfMemory {
                what,
                needed_bytes,
                free_bytes,
            } => Some((*what, needed_bytes.map(|needed| needed.saturating_sub(*free_bytes)))),
            _ => None,
        })
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the model does not fit: ")?;
        match self.missing_bytes.filter(|bytes| *bytes > 0) {
            Some(bytes) => write!(f, "{} are missing for {}", ByteSize(bytes), self.what)?,
            None => write!(f, "there is no room for {}", self.what)?,
        }
        for (what, bytes) in rows(&self.plan) {
            // What was not reached is not known.
            let mut size = String::from("-");
            if bytes > 0 {
                size.clear();
                write!(size, "{}", ByteSize(bytes))?;
            }
            write!(f, "\n  {what:<20}{size:>12}")?;
        }
        write!(f, "\nwhat helps:")?;
        self.advice().iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan(num_blocks: u32) -> MemoryPlan {
        MemoryPlan {
            weight_bytes: 17 * GIB,
            scratch_bytes: GIB,
            kv_cache_bytes: u64::from(num_blocks) * 16 * (GIB >> 10),
            backend_bytes: GIB / 2,
            graph_bytes: 0,
            num_blocks,
            block_size: 16,
            kv_bytes_per_token: GIB >> 10,
            device_free_bytes: 23 * GIB,
            device_total_bytes: 24 * GIB,
        }
    }

    fn config() -> RunnerConfig {
        RunnerConfig {
            max_num_batched_tokens: 4096,
            max_num_seqs: 256,
            max_model_len: Some(8192),
            block_size: 16,
            kv_cache: KvCacheSize::DeviceShare(0.9),
            kv_cache_dtype: KvCacheDtype::Native,
        }
    }

    fn out_of_memory(plan: MemoryPlan, what: &'static str, needed_bytes: Option<u64>, free_bytes: u64) -> RunnerError {
        RunnerError::OutOfMemory {
            plan,
            source: Box::new(BackendError::OutOfMemory {
                what,
                needed_bytes,
                free_bytes,
            }),
        }
    }

    fn text(error: &RunnerError) -> String {
        Shortage::of(error, config()).expect("it is a shortage").to_string()
    }

    #[test]
    fn a_cache_that_is_too_small_names_the_plan_what_is_missing_and_the_settings() {
        let error = RunnerError::KvCacheTooSmall {
            capacity_tokens: 2048,
            max_model_len: 8192,
            plan: plan(128),
        };
        assert_eq!(
            text(&error),
            "the model does not fit: 6.00 GiB are missing for keys and values of one sequence of 8192 tokens (it has 2048)
  weights                17.00 GiB
  scratch                 1.00 GiB
  backend               512.00 MiB
  kv cache                2.00 GiB
  recorded steps                 -
  total                  20.50 GiB
  free before loading    23.00 GiB
  device                 24.00 GiB
what helps:
  --gpu-memory-utilization above 0.9: how much of the memory may be used
  --kv-cache-dtype fp8: keys and values take half the memory or less
  --max-model-len 2048: a sequence of full length must fit the KV cache
  --max-num-seqs below 256, --max-num-batched-tokens below 4096: less scratch"
        );
    }

    #[test]
    fn recorded_steps_without_room_need_less_of_everything_else() {
        let text = text(&out_of_memory(plan(512), "recording a step", None, 7));
        assert!(text.contains("there is no room for recording a step"), "{text}");
        assert!(text.contains("--gpu-memory-utilization below 0.9"), "{text}");
        assert!(text.contains("--enforce-eager"), "{text}");
        assert!(!text.contains("--max-model-len"), "{text}");
    }

    #[test]
    fn a_cache_of_a_given_size_is_told_the_size_it_needs() {
        let error = RunnerError::KvCacheTooSmall {
            capacity_tokens: 2048,
            max_model_len: 8192,
            plan: plan(128),
        };
        let config = RunnerConfig {
            kv_cache: KvCacheSize::Bytes(2 * GIB),
            ..config()
        };
        let text = Shortage::of(&error, config).expect("it is a shortage").to_string();
        let (_, advice) = text.split_once("what helps:").expect("there is advice");
        let lines: Vec<_> = advice.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert_eq!(lines[0], "--kv-cache-memory-bytes of 8.00 GiB or more");
        assert!(lines[1].starts_with("--kv-cache-dtype fp8"), "{text}");
        assert!(lines[2].starts_with("--max-model-len 2048"), "{text}");
        let narrow = RunnerConfig {
            kv_cache_dtype: KvCacheDtype::Fp8E4m3,
            ..config
        };
        let text = Shortage::of(&error, narrow).expect("it is a shortage").to_string();
        assert!(!text.contains("--kv-cache-dtype"), "{text}");
    }

    #[test]
    fn who_else_has_the_memory_is_told_from_a_model_that_is_too_large() {
        let taken = MemoryPlan {
            device_free_bytes: 10 * GIB,
            ..plan(0)
        };
        let text = |plan| {
            text(&out_of_memory(
                plan,
                "the model without its KV cache",
                Some(18 * GIB),
                10 * GIB,
            ))
        };
        assert!(
            text(taken).contains("8.00 GiB are missing for the model"),
            "{}",
            text(taken)
        );
        assert!(
            text(taken).contains("14.00 GiB were taken before loading"),
            "{}",
            text(taken)
        );
        let too_large = MemoryPlan {
            weight_bytes: 50 * GIB,
            ..plan(0)
        };
        let text = text(too_large);
        assert!(
            text.contains("a smaller checkpoint") && !text.contains("--max"),
            "{text}"
        );
    }

    #[test]
    fn other_errors_are_no_shortage() {
        let error = RunnerError::Backend(BackendError::Unsupported("a shape".to_owned()));
        assert!(Shortage::of(&error, config()).is_none());
    }
}
