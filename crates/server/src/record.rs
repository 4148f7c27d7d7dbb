//! What becomes known of a request while it is served: for its line in the log and the limits of
//! its API key.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::access::KeyPermit;
use crate::generate::{Timings, Usage};
use crate::metrics::Outcome;
use crate::openai::Endpoint;
use crate::traces::Asked;

/// Filled by whoever knows, read when the request is over. Counts as it goes: a client that leaves has used tokens too.
#[derive(Debug, Default)]
pub(crate) struct RequestRecord {
    endpoint: OnceLock<Endpoint>,
    asked: OnceLock<Asked>,
    timings: OnceLock<Timings>,
    outcome: OnceLock<Outcome>,
    prompt_tokens: AtomicU32,
    cached_tokens: AtomicU32,
    completion_tokens: AtomicU32,
    /// Of prompts whose answers never began.
    unanswered_tokens: AtomicU32,
    /// Of the API key it came with.
    permit: OnceLock<KeyPermit>,
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let usage = self.usage();
        if let Some(permit) = self.permit.get_mut() {
            let num_tokens = [
                usage.prompt_tokens,
                usage.completion_tokens,
                *self.unanswered_tokens.get_mut(),
            ];
            permit.num_tokens = num_tokens.into_iter().map(u64::from).sum();
        }
    }
}

impl RequestRecord {
    /// It is for this endpoint.
    pub(crate) fn begin(&self, endpoint: Endpoint) {
        let _ = self.endpoint.set(endpoint);
    }

    /// It was understood, and asks for this.
    pub(crate) fn ask(&self, asked: Asked) {
        let _ = self.asked.set(asked);
    }

    /// Nothing more is generated for it.
    pub(crate) fn time(&self, timings: Timings) {
        let _ = self.timings.set(timings);
    }

    /// A prompt was computed, or found in the cache.
    pub(crate) fn prompt(&self, num_tokens: u32, num_cached: u32) {
        self.prompt_tokens.fetch_add(num_tokens, Relaxed);
        self.cached_tokens.fetch_add(num_cached, Relaxed);
    }

    /// A prompt was handed to the engine, and nobody waits for its answer any more, of which nothing came. It is charged
    /// all the same, since it may have been computed, and is no part of the usage, since it may not.
    pub(crate) fn unanswered_prompt(&self, num_tokens: u32) {
        self.unanswered_tokens.fetch_add(num_tokens, Relaxed);
    }

    /// A token was generated.
    pub(crate) fn token(&self) {
        self.completion_tokens.fetch_add(1, Relaxed);
    }

    /// The request ended, and used at least so much. The first outcome counts.
    pub(crate) fn end(&self, outcome: Outcome, usage: Usage) {
        let _ = self.outcome.set(outcome);
        self.prompt_tokens.fetch_max(usage.prompt_tokens, Relaxed);
        self.cached_tokens.fetch_max(usage.cached_tokens, Relaxed);
        self.completion_tokens.fetch_max(usage.completion_tokens, Relaxed);
    }

    /// Gives the permit back, charged with what was used, once nobody knows the request any more.
    pub(crate) fn hold(&self, permit: KeyPermit) {
        let _ = self.permit.set(permit);
    }

    /// How it ended; `None` where only generations are told apart.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome.get().copied()
    }

    /// The endpoint it was for; `None` where only generations are told apart.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        self.endpoint.get().copied()
    }

    /// What it asked for, if it was understood.
    pub(crate) fn asked(&self) -> Option<Asked> {
        self.asked.get().copied()
    }

    /// How long its parts took, as far as it came.
    pub(crate) fn timings(&self) -> Timings {
        self.timings.get().copied().unwrap_or_default()
    }

    /// What was used so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            completion_tokens: self.completion_tokens.load(Relaxed),
            cached_tokens: self.cached_tokens.load(Relaxed),
        }
    }
}
