//! What `/metrics` shows: vLLM's names, labels and buckets for all that applies, older aliases of some, and our own.
//!
//! Counting costs relaxed additions and never a lock; a scrape reads atomics and never waits for the engine. No label
//! value comes from a request.

mod exposition;
mod histogram;
mod http;
mod outcome;
mod process;
mod render;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use self::http::HttpMetrics;
pub(crate) use self::http::HttpRequest;
pub(crate) use self::outcome::{Outcome, RequestOutcome};

use self::histogram::{CountHistogram, DurationHistogram};
use crate::openai::Endpoint;

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// A GPU decodes in 1 to 10 ms a token: all of that is vLLM's first bucket.
const PER_TOKEN_FINE: &[f64] = &[
    0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004, 0.0045, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01,
    0.0125, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0,
];
/// vLLM's first bucket ends at 0.3 s, where short answers are long done.
const REQUEST_FINE: &[f64] = &[
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0,
];
/// Shown as far as the model's context goes, as vLLM does.
const TOKENS: &[u64] = &[
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000,
];
const ANSWERS: &[u64] = &[1, 2, 5, 10, 20];

/// Label values of [`Endpoint`]; the last is for what could not be read far enough to tell.
const ENDPOINTS: [&str; 4] = [
    Endpoint::Chat.as_str(),
    Endpoint::Completions.as_str(),
    Endpoint::Responses.as_str(),
    "unknown",
];
const UNKNOWN_ENDPOINT: usize = ENDPOINTS.len() - 1;

/// All counters the front end keeps.
#[derive(Debug)]
pub struct Metrics {
    /// Label value: the name answers carry.
    model_name: String,
    started_seconds: f64,
    /// Every request, by what HTTP says of it.
    pub(crate) http: HttpMetrics,
    received: [AtomicU64; ENDPOINTS.len()],
    outcomes: [[AtomicU64; Outcome::ALL.len()]; ENDPOINTS.len()],
    sequences: [AtomicU64; SequenceEnd::ALL.len()],
    prompt_tokens: AtomicU64,
    prompt_tokens_cached: AtomicU64,
    generation_tokens: AtomicU64,
    time_to_first_token: DurationHistogram,
    inter_token_latency: DurationHistogram,
    inter_token_latency_fine: DurationHistogram,
    time_per_output_token: DurationHistogram,
    e2e_latency: DurationHistogram,
    e2e_latency_fine: DurationHistogram,
    queue_time: DurationHistogram,
    queue_fine: DurationHistogram,
    inference_time: DurationHistogram,
    prefill_time: DurationHistogram,
    decode_time: DurationHistogram,
    sequence_prompt_tokens: CountHistogram,
    sequence_generation_tokens: CountHistogram,
    prompt_computed_tokens: CountHistogram,
    longest_generation_tokens: CountHistogram,
    params_max_tokens: CountHistogram,
    params_n: CountHistogram,
}

/// How one answer ended, as vLLM counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SequenceEnd {
    /// At a stop token or string.
    Stop,
    /// At `max_tokens`.
    Length,
    /// The client went away.
    Abort,
    /// The engine failed it.
    Error,
}

impl SequenceEnd {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// What is observed when an answer is complete.
#[derive(Debug)]
pub(crate) struct FinishedSequence {
    pub(crate) end: SequenceEnd,
    pub(crate) prompt_tokens: u32,
    /// Of the prompt tokens, those it found in the cache.
    pub(crate) cached_tokens: u32,
    pub(crate) generated_tokens: u32,
    pub(crate) max_tokens: u32,
    /// The request reached the front end.
    pub(crate) arrival: Instant,
    /// The engine took it up.
    pub(crate) scheduled: Instant,
    /// From submission to `scheduled`.
    pub(crate) queue_time: Duration,
    /// `None`: nothing was generated.
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Instant,
}

impl Metrics {
    /// What answers call the model.
    pub(crate) fn model_name(&self) -> &str {
        &self.model_name
    }

    /// All zero. `model_name` is what answers call the model.
    pub fn new(model_name: impl Into<String>) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            model_name: model_name.into(),
            started_seconds: process::now_seconds(),
            http: HttpMetrics::default(),
            received: [const { AtomicU64::new(0) }; _],
            outcomes: [const { [const { AtomicU64::new(0) }; _] }; _],
            sequences: [const { AtomicU64::new(0) }; _],
            prompt_tokens: zero(),
            prompt_tokens_cached: zero(),
            generation_tokens: zero(),
            time_to_first_token: DurationHistogram::new(TTFT),
            inter_token_latency: DurationHistogram::new(PER_TOKEN),
            inter_token_latency_fine: DurationHistogram::new(PER_TOKEN_FINE),
            time_per_output_token: DurationHistogram::new(PER_TOKEN),
            e2e_latency: DurationHistogram::new(REQUEST),
            e2e_latency_fine: DurationHistogram::new(REQUEST_FINE),
            queue_time: DurationHistogram::new(REQUEST),
            queue_fine: DurationHistogram::new(REQUEST_FINE),
            inference_time: DurationHistogram::new(REQUEST),
            prefill_time: DurationHistogram::new(REQUEST),
            decode_time: DurationHistogram::new(REQUEST),
            sequence_prompt_tokens: CountHistogram::new(TOKENS),
            sequence_generation_tokens: CountHistogram::new(TOKENS),
            prompt_computed_tokens: CountHistogram::new(TOKENS),
            longest_generation_tokens: CountHistogram::new(TOKENS),
            params_max_tokens: CountHistogram::new(TOKENS),
            params_n: CountHistogram::new(ANSWERS),
        }
    }

    /// A request reached a generation endpoint. Each gets exactly one [`Metrics::request_ended`].
    fn request_received(&self, endpoint: Endpoint) {
        self.received[endpoint as usize].fetch_add(1, Relaxed);
    }

    fn request_ended(&self, endpoint: Endpoint, outcome: Outcome) {
        self.outcomes[endpoint as usize][outcome as usize].fetch_add(1, Relaxed);
    }

    /// What came was no HTTP: it is refused before anybody could see which endpoint it was meant for.
    pub(crate) fn malformed_request(&self) {
        self.received[UNKNOWN_ENDPOINT].fetch_add(1, Relaxed);
        self.outcomes[UNKNOWN_ENDPOINT][Outcome::Invalid as usize].fetch_add(1, Relaxed);
    }

    /// A request was handed to the engine.
    pub(crate) fn request_submitted(&self, n: u32) {
        self.params_n.observe(u64::from(n));
    }

    /// A prompt was computed, or found in the cache.
    pub(crate) fn prompt_tokens(&self, num_tokens: u32, num_cached: u32) {
        self.prompt_tokens.fetch_add(u64::from(num_tokens), Relaxed);
        self.prompt_tokens_cached.fetch_add(u64::from(num_cached), Relaxed);
    }

    /// An answer's first token came, so long after its request.
    pub(crate) fn first_token(&self, after: Duration) {
        self.generation_tokens.fetch_add(1, Relaxed);
        self.time_to_first_token.observe(after);
    }

    /// Another token of an answer came.
    pub(crate) fn next_token(&self, since_last: Duration) {
        self.generation_tokens.fetch_add(1, Relaxed);
        self.inter_token_latency.observe(since_last);
        self.inter_token_latency_fine.observe(since_last);
    }

    /// All answers to a prompt are complete; the longest has so many tokens.
    pub(crate) fn prompt_finished(&self, longest_generation_tokens: u32) {
        self.longest_generation_tokens
            .observe(u64::from(longest_generation_tokens));
    }

    /// Answers ended before they were complete.
    pub(crate) fn sequences_lost(&self, end: SequenceEnd, count: usize) {
        self.sequences[end as usize].fetch_add(count as u64, Relaxed);
    }

    /// An answer is complete.
    pub(crate) fn sequence_finished(&self, sequence: &FinishedSequence) {
        self.sequences[sequence.end as usize].fetch_add(1, Relaxed);
        self.sequence_prompt_tokens.observe(u64::from(sequence.prompt_tokens));
        self.sequence_generation_tokens
            .observe(u64::from(sequence.generated_tokens));
        self.prompt_computed_tokens
            .observe(u64::from(sequence.prompt_tokens - sequence.cached_tokens));
        self.params_max_tokens.observe(u64::from(sequence.max_tokens));
        let e2e = sequence.last_token.saturating_duration_since(sequence.arrival);
        self.e2e_latency.observe(e2e);
        self.e2e_latency_fine.observe(e2e);
        let Some(first_token) = sequence.first_token else {
            return;
        };
        let decode = sequence.last_token.saturating_duration_since(first_token);
        self.queue_time.observe(sequence.queue_time);
        self.queue_fine.observe(sequence.queue_time);
        self.prefill_time
            .observe(first_token.saturating_duration_since(sequence.scheduled));
        self.inference_time
            .observe(sequence.last_token.saturating_duration_since(sequence.scheduled));
        self.decode_time.observe(decode);
        if sequence.generated_tokens > 1 {
            self.time_per_output_token
                .observe(decode / (sequence.generated_tokens - 1));
        }
    }
}
