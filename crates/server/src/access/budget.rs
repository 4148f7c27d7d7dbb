//! What one key may use: requests at the same time, and tokens a minute.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::clamp_retry_after;

/// Limits of each key; absent ones are none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests at the same time.
    pub max_concurrent_requests: Option<u32>,
    /// Prompt tokens and generated ones together. A minute's worth may be used at once.
    pub tokens_per_minute: Option<u64>,
}

/// What a key uses at present.
#[derive(Debug, Default)]
pub(super) struct Budget(Mutex<Use>);

#[derive(Debug, Default)]
struct Use {
    num_running: u32,
    /// Tokens used and not yet forgiven, as of `updated`. They are counted when a request ends, since nobody knows
    /// before how many it will take: this can exceed a minute's worth by what is running.
    tokens: f64,
    updated: Option<Instant>,
}

/// Why a key has to wait.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("This API key has {limit} requests running, as many as it may have at the same time.")]
    Concurrency { limit: u32 },
    #[error("This API key has used up its {limit} tokens per minute. Please try again in {} seconds.", .wait.as_secs_f64().ceil())]
    Tokens { limit: u64, wait: Duration },
}

impl Refusal {
    /// When there should be room.
    pub(super) fn retry_after(self) -> Duration {
        clamp_retry_after(match self {
            // Nobody knows when one of them ends.
            Self::Concurrency { .. } => Duration::ZERO,
            Self::Tokens { wait, .. } => wait,
        })
    }
}

impl Use {
    /// Forgives what time has earned back.
    fn update(&mut self, tokens_per_minute: u64, now: Instant) {
        let elapsed = self
            .updated
            .map_or(Duration::ZERO, |updated| now.saturating_duration_since(updated));
        self.tokens = (self.tokens - elapsed.as_secs_f64() * tokens_per_second(tokens_per_minute)).max(0.0);
        self.updated = Some(now);
    }

    fn admit(&mut self, limits: &KeyLimits, now: Instant) -> Result<(), Refusal> {
        if let Some(limit) = limits
            .max_concurrent_requests
            .filter(|limit| self.num_running >= *limit)
        {
            return Err(Refusal::Concurrency { limit });
        }
        if let Some(limit) = limits.tokens_per_minute {
            self.update(limit, now);
            let excess = self.tokens - limit as f64;
            if excess >= 0.0 {
                // One token below the limit lets the next request in.
                let wait = Duration::from_secs_f64((excess + 1.0) / tokens_per_second(limit));
                return Err(Refusal::Tokens { limit, wait });
            }
        }
        self.num_running += 1;
        Ok(())
    }

    fn release(&mut self, num_tokens: u64, limits: &KeyLimits, now: Instant) {
        self.num_running -= 1;
        if let Some(limit) = limits.tokens_per_minute {
            self.update(limit, now);
            self.tokens += num_tokens as f64;
        }
    }
}

fn tokens_per_second(tokens_per_minute: u64) -> f64 {
    tokens_per_minute as f64 / 60.0
}

impl Budget {
    /// Room for one more request.
    pub(super) fn admit(self: &Arc<Self>, limits: &KeyLimits) -> Result<KeyPermit, Refusal> {
        self.lock(|used| used.admit(limits, Instant::now()))?;
        Ok(KeyPermit {
            budget: Arc::clone(self),
            limits: *limits,
            num_tokens: 0,
        })
    }

    /// The data are plain: a poisoned lock is as good as another.
    fn lock<T>(&self, work: impl FnOnce(&mut Use) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One request of a key that is under way.
#[derive(Debug)]
pub(crate) struct KeyPermit {
    budget: Arc<Budget>,
    limits: KeyLimits,
    /// To be charged in the end.
    pub(crate) num_tokens: u64,
}

impl Drop for KeyPermit {
    fn drop(&mut self) {
        let Self { limits, num_tokens, .. } = *self;
        self.budget
            .lock(|used| used.release(num_tokens, &limits, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: KeyLimits = KeyLimits {
        max_concurrent_requests: Some(2),
        tokens_per_minute: Some(600),
    };

    #[test]
    fn a_key_has_so_many_requests_at_the_same_time() {
        let budget = Arc::new(Budget::default());
        let first = budget.admit(&LIMITS).unwrap();
        let _second = budget.admit(&LIMITS).unwrap();
        let refusal = budget.admit(&LIMITS).unwrap_err();
        assert_eq!(refusal, Refusal::Concurrency { limit: 2 });
        drop(first);
        assert!(budget.admit(&LIMITS).is_ok());
    }

    #[test]
    fn used_tokens_are_forgiven_at_the_rate_of_the_limit() {
        let mut used = Use::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        used.admit(&LIMITS, start).unwrap();
        used.release(599, &LIMITS, start);
        used.admit(&LIMITS, start).unwrap();
        used.release(101, &LIMITS, start);
        // 700 of 600, at 10 a second.
        let Err(Refusal::Tokens { wait, .. }) = used.admit(&LIMITS, start) else {
            panic!("the key has used more than its limit");
        };
        assert_eq!(wait, Duration::from_millis(10_100));
        assert!(used.admit(&LIMITS, after(10)).is_err());
        used.admit(&LIMITS, after(11)).unwrap();
        used.release(0, &LIMITS, after(11));
        // An hour later there is a minute's worth, not an hour's.
        used.admit(&LIMITS, after(3600)).unwrap();
        used.release(600, &LIMITS, after(3600));
        assert!(used.admit(&LIMITS, after(3600)).is_err());
    }
}
