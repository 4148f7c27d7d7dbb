//! What can go wrong between a caller and the engine, one enum for each moment it can.

use std::sync::Arc;

use crate::{ConstraintError, ExecutorError};

/// Why [`crate::EngineHandle::submit`] refused a request. Nothing of it was queued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// `max_tokens` is 0, and there is no prompt token to score either.
    #[error("max_tokens must be at least 1")]
    NoTokensWanted,
    /// Prompt and answer can never fit, however long the request waits.
    #[error(
        "{prompt_tokens} prompt tokens and {max_tokens} generated tokens exceed the limit of {} tokens",
        max_model_len.min(kv_cache_tokens)
    )]
    TooLong {
        /// Tokens in the prompt.
        prompt_tokens: u32,
        /// Tokens asked for.
        max_tokens: u32,
        /// The configured limit for prompt and answer together.
        max_model_len: u32,
        /// Tokens the whole KV cache holds.
        kv_cache_tokens: u32,
    },
    /// Too much waits already. [`crate::StatsSnapshot`] has the rates that tell when to come back.
    #[error(
        "the queue is full: {queued_requests} of {max_queued_requests} requests, {queued_tokens} of \
         {max_queued_tokens} prompt tokens"
    )]
    QueueFull {
        /// Requests that wait for their first step.
        queued_requests: u32,
        /// Their limit.
        max_queued_requests: u32,
        /// Prompt tokens of those requests.
        queued_tokens: u64,
        /// Their limit.
        max_queued_tokens: u64,
    },
    /// The engine drains or has shut down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The engine has died; [`crate::EngineHandle::death`] tells why.
    #[error("the engine is dead")]
    Dead,
}

/// Why a stream ended before its sequence did. Always a stream's last item.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// A step that computed for this request failed; the engine goes on with others.
    #[error("step {step} failed")]
    StepFailed {
        /// Number of the step.
        step: u64,
        /// What the executor said.
        #[source]
        source: Arc<ExecutorError>,
    },
    /// [`crate::Request::constraint`] could not be followed to its end.
    #[error("the constraint failed")]
    ConstraintFailed {
        /// Why.
        #[source]
        source: Arc<ConstraintError>,
    },
    /// [`crate::Request::deadline`] passed.
    #[error("deadline exceeded")]
    DeadlineExceeded,
    /// [`crate::Request::queue_deadline`] passed.
    #[error("deadline to leave the queue exceeded")]
    QueueDeadlineExceeded,
    /// [`crate::EngineHandle::shutdown`] cut the request off.
    #[error("the engine was shut down")]
    ShutDown,
    /// The engine panicked, lost its device, or had a step that did not end; nothing will run any more.
    #[error("the engine is dead: {reason}")]
    EngineDead {
        /// Which of them, and what is known about it.
        reason: Arc<str>,
    },
}

/// Why [`crate::Engine::spawn`] has no engine to give; `E` is the error of the caller's `build`.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError<E: std::error::Error + 'static> {
    /// The executor could not be built.
    #[error("executor could not be built")]
    Build(#[source] E),
    /// Building the executor panicked.
    #[error("building the executor panicked")]
    Panicked,
    /// The operating system refused the thread.
    #[error("engine thread could not be started")]
    Thread(#[source] std::io::Error),
}
