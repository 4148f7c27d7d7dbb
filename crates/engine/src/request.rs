//! What a caller asks for: an immutable [`Request`], and what comes back for it, token by token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::TokenConstraint;

/// A vocabulary index.
pub type TokenId = u32;

/// Names a request for its whole life; never reused within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One sequence to generate. A client's `n > 1` is `n` requests that share blocks through the prefix cache.
#[derive(Debug, Clone)]
pub struct Request {
    /// Prompt token ids, at least one.
    pub prompt: Arc<[TokenId]>,
    /// How the next token is chosen.
    pub sampling: Arc<SamplingParams>,
    /// When generation ends.
    pub stop: StopCriteria,
    /// `Some(k)`: report the log-probability of every prompt token but the first, and the `k` most likely alternatives.
    pub prompt_logprobs: Option<u32>,
    /// Lower runs first; equal priorities run in order of arrival.
    pub priority: i32,
    /// Requests share cached blocks only with requests of the same salt (a tenant, say).
    pub cache_salt: u128,
    /// The request fails with `EngineError::DeadlineExceeded` at this time, wherever it is.
    pub deadline: Option<Instant>,
    /// Says which tokens may come next.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// It fails with `EngineError::QueueDeadlineExceeded` if no step was launched for it until this time.
    pub queue_deadline: Option<Instant>,
}

impl Request {
    /// Prompt tokens whose log-probability is reported.
    #[must_use]
    pub fn num_scores(&self) -> usize {
        self.prompt_logprobs.map_or(0, |_| self.prompt.len().saturating_sub(1))
    }
}

/// How a token is chosen from logits. Defaults leave the distribution untouched.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Most likely tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Tokens below this share of the most likely token's probability are dropped; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of each token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a logit for each time its token was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// With the token's position, the only source of randomness.
    pub seed: u64,
    /// `Some(k)`: report the sampled token's log-probability and the `k` most likely alternatives.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether choosing a token needs the tokens before it.
    #[must_use]
    pub fn needs_history(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }
}

/// When a sequence ends. Stop strings are text and live above the engine: whoever matches one drops the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopCriteria {
    /// Generated tokens at most; 0 only where a prompt of two tokens or more is to be scored.
    pub max_tokens: u32,
    /// No token of `stop_token_ids` can be sampled before this many tokens were generated, unless the request's
    /// constraint allows nothing else.
    pub min_tokens: u32,
    /// Sampling one of these ends the sequence; the token is reported with the finish reason.
    pub stop_token_ids: Arc<[TokenId]>,
}

/// Why a sequence ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// This token of `stop_token_ids` was sampled.
    Stop(TokenId),
    /// `max_tokens`, or the model's context, is used up.
    Length,
}

/// A token the executor chose, or was given to score.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub token: TokenId,
    /// Present when [`SamplingParams::logprobs`] asked for it.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Log-probabilities under the model's own distribution: after the soft-cap, before penalties and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// One token on its way to the caller.
#[derive(Debug, Clone)]
pub struct TokenEvent {
    /// The token.
    pub sampled: SampledToken,
    /// It was not generated: it is the prompt's next one, from the second on, with what [`Request::prompt_logprobs`] asked
    /// for. All of the prompt comes before the first generated token.
    pub is_prompt: bool,
    /// Set on the last event of a stream.
    pub finish: Option<FinishReason>,
    /// Prompt tokens that came from the prefix cache.
    pub num_cached_tokens: u32,
    /// From `submit` to the first step that computed anything for the request.
    pub queue_time: Duration,
    /// When the step that computed it was over, however late its stream is read.
    pub sampled_at: Instant,
}
