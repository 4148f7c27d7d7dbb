//! Every request on a generation endpoint ends in exactly one counted outcome, whatever becomes of it.

use axum::response::{IntoResponse, Response};
use lapidary_engine::EngineError;

use crate::error::ApiError;
use crate::generate::{Generation, Usage};
use crate::openai::Endpoint;
use crate::request_id::RequestId;
use crate::state::AppState;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All answers complete.
    Stop,
    /// Complete; some answer was cut off at `max_tokens`.
    Length,
    /// The client went away first.
    ClientAbort,
    /// A deadline passed.
    Timeout,
    /// Refused: no API key of ours.
    Unauthorized,
    /// Refused: the API key has used what it may.
    RateLimited,
    /// Refused: no room in the queue.
    QueueFull,
    /// Refused: the client's mistake.
    Invalid,
    /// Refused: the model is not loaded.
    NotReady,
    /// Refused or cut off: the server ends.
    Shutdown,
    /// Our fault.
    EngineError,
}

impl Outcome {
    pub(super) const ALL: [Self; 11] = [
        Self::Stop,
        Self::Length,
        Self::ClientAbort,
        Self::Timeout,
        Self::Unauthorized,
        Self::RateLimited,
        Self::QueueFull,
        Self::Invalid,
        Self::NotReady,
        Self::Shutdown,
        Self::EngineError,
    ];

    /// Label value.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ClientAbort => "client_abort",
            Self::Timeout => "timeout",
            Self::Unauthorized => "unauthorized",
            Self::RateLimited => "rate_limited",
            Self::QueueFull => "queue_full",
            Self::Invalid => "invalid",
            Self::NotReady => "not_ready",
            Self::Shutdown => "shutdown",
            Self::EngineError => "engine_error",
        }
    }

    /// Of a generation that is complete.
    pub(crate) fn of(generation: &Generation) -> Self {
        if generation.was_cut_off() {
            Self::Length
        } else {
            Self::Stop
        }
    }
}

impl From<&ApiError> for Outcome {
    fn from(error: &ApiError) -> Self {
        match error {
            ApiError::InvalidRequest { .. }
            | ApiError::ModelNotFound { .. }
            | ApiError::UnknownUrl { .. }
            | ApiError::MethodNotAllowed { .. }
            | ApiError::BodyTooLarge { .. } => Self::Invalid,
            ApiError::BodyTimeout { .. }
            | ApiError::BodyStalled { .. }
            | ApiError::DeadlineExceeded
            | ApiError::QueueTimeout { .. } => Self::Timeout,
            ApiError::Unauthorized { .. } => Self::Unauthorized,
            ApiError::RateLimited { .. } => Self::RateLimited,
            ApiError::QueueFull { .. } | ApiError::TooManyConnections => Self::QueueFull,
            ApiError::ModelLoading { .. } => Self::NotReady,
            ApiError::ShuttingDown => Self::Shutdown,
            ApiError::EngineDead | ApiError::Internal { .. } => Self::EngineError,
        }
    }
}

/// Follows one request. Dropped without a word, it counts a client that went away.
#[derive(Debug)]
pub(crate) struct RequestOutcome {
    state: AppState,
    /// `None` until it is known, and the request counted as received.
    endpoint: Option<Endpoint>,
    request_id: RequestId,
    is_recorded: bool,
}

impl RequestOutcome {
    /// Counts the request as received.
    pub(crate) fn new(state: &AppState, endpoint: Endpoint, request_id: RequestId) -> Self {
        let mut outcome = Self::of_undecided(state, request_id);
        outcome.decide(endpoint);
        outcome
    }

    /// Of a request whose body tells which endpoint it is for. It is counted as received when that is known, or when it
    /// ends before, and then as a chat.
    pub(crate) fn of_undecided(state: &AppState, request_id: RequestId) -> Self {
        Self {
            state: state.clone(),
            endpoint: None,
            request_id,
            is_recorded: false,
        }
    }

    /// The request is for this endpoint, if that was not known before.
    pub(crate) fn decide(&mut self, endpoint: Endpoint) -> Endpoint {
        *self.endpoint.get_or_insert_with(|| {
            self.state.metrics.request_received(endpoint);
            self.request_id.record().begin(endpoint);
            endpoint
        })
    }

    /// The request ended; `usage` is what it used.
    pub(crate) fn record(&mut self, outcome: Outcome, usage: Usage) {
        if std::mem::replace(&mut self.is_recorded, true) {
            return;
        }
        let endpoint = self.decide(Endpoint::Chat);
        self.state.metrics.request_ended(endpoint, outcome);
        self.request_id.record().end(outcome, usage);
    }

    /// The request is refused before the engine had it.
    pub(crate) fn refuse(mut self, error: ApiError) -> Response {
        self.record(Outcome::from(&error), Usage::default());
        tracing::debug!(request_id = self.request_id.as_str(), error = %error, "request refused");
        error.into_response()
    }

    /// The engine gave up on the request before anything was sent.
    pub(crate) fn fail(self, error: &EngineError) -> Response {
        self.fail_stream(error).into_response()
    }

    /// The engine gave up on the request after the status was sent: the error is for the stream.
    pub(crate) fn fail_stream(mut self, error: &EngineError) -> ApiError {
        let stats = self.state.model.get().map(|model| model.engine.stats());
        let api_error = ApiError::failed(error, &stats.unwrap_or_default());
        self.record(Outcome::from(&api_error), Usage::default());
        match error {
            // The engine has logged it.
            EngineError::ConstraintFailed { .. } | EngineError::EngineDead { .. } => {}
            EngineError::DeadlineExceeded | EngineError::QueueDeadlineExceeded | EngineError::ShutDown => {}
            EngineError::StepFailed { .. } => tracing::error!(
                request_id = self.request_id.as_str(),
                error = error as &dyn std::error::Error,
                "engine failed the request"
            ),
        }
        api_error
    }
}

impl Drop for RequestOutcome {
    fn drop(&mut self) {
        let outcome = if std::thread::panicking() {
            Outcome::EngineError
        } else {
            Outcome::ClientAbort
        };
        self.record(outcome, Usage::default());
    }
}
