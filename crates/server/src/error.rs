//! The one error a client can see. Nothing else makes a status code.

use std::borrow::Cow;
use std::time::Duration;

use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use lapidary_engine::{EngineError, StatsSnapshot, SubmitError};
use serde::Serialize;

/// Bytes of a client's own words that an error message repeats.
const MAX_ECHO_BYTES: usize = 200;

/// Bounds of `Retry-After` for what time mends: below, a client would come back before anything changed; above, openai
/// clients ignore it.
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// `x-should-retry`: openai clients retry every 5xx and 408 unless it says `false`.
const SHOULD_RETRY: &str = "x-should-retry";

/// Why a request is not answered, by what its sender can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ApiError {
    /// The request must be changed.
    #[error("{message}")]
    InvalidRequest {
        /// What is wrong, and with which value.
        message: String,
        /// JSON path of the culprit.
        param: Option<Cow<'static, str>>,
        /// OpenAI's code where it has one.
        code: Option<&'static str>,
    },
    /// No model of this name is served.
    #[error("The model `{}` does not exist.", shorten(.model))]
    ModelNotFound {
        /// The name asked for.
        model: String,
    },
    /// No such path.
    #[error("Invalid URL ({method} {})", shorten(.path))]
    UnknownUrl {
        /// Of the request.
        method: Method,
        /// Of the request.
        path: String,
    },
    /// The path exists, not for this method.
    #[error("Not allowed to {method} on {}", shorten(.path))]
    MethodNotAllowed {
        /// Of the request.
        method: Method,
        /// Of the request.
        path: String,
    },
    /// The body is larger than the server reads.
    #[error("The request body is larger than the limit of {limit_bytes} bytes.")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The body did not arrive in time.
    #[error("The request body did not arrive within {} seconds.", .limit.as_secs_f64())]
    BodyTimeout {
        /// The limit.
        limit: Duration,
    },
    /// The body arrived too slowly to keep the room that it took.
    #[error("The request body arrived too slowly: less than {num_bytes} bytes in {} seconds.", .limit.as_secs_f64())]
    BodyStalled {
        /// What would have been fast enough.
        num_bytes: usize,
        /// In so long.
        limit: Duration,
    },
    /// The answer was not complete at the deadline.
    #[error("The request was not finished before its deadline.")]
    DeadlineExceeded,
    /// No API key, or none of ours.
    #[error("{}", if *.has_key {
        "Incorrect API key provided."
    } else {
        "You didn't provide an API key. Send it in the Authorization header: `Authorization: Bearer YOUR_KEY`."
    })]
    Unauthorized {
        /// There was a key.
        has_key: bool,
    },
    /// The API key has used what it may for now.
    #[error("{message}")]
    RateLimited {
        /// Which limit, with the numbers.
        message: String,
        /// When the key should have room again.
        retry_after: Duration,
    },
    /// The queue has no room.
    #[error("{message}")]
    QueueFull {
        /// Which limit, with the numbers.
        message: String,
        /// When the queue should have room again.
        retry_after: Duration,
    },
    /// As many connections are open as may be.
    #[error("The server has as many connections open as it takes.")]
    TooManyConnections,
    /// The request was still in the queue when its patience, or the server's, ended.
    #[error("The request waited in the queue until its deadline. The server is overloaded.")]
    QueueTimeout {
        /// When the queue should be shorter.
        retry_after: Duration,
    },
    /// The model is not loaded yet.
    #[error("The model is not loaded yet ({phase}).")]
    ModelLoading {
        /// As `/ready` spells it.
        phase: &'static str,
    },
    /// The server takes no new requests.
    #[error("The server is shutting down.")]
    ShuttingDown,
    /// The engine is gone; only a restart helps.
    #[error("The engine has failed and runs no requests until the server is restarted.")]
    EngineDead,
    /// Our fault. The cause is in the log, under the request's id.
    #[error("The server had an error while processing the request.")]
    Internal {
        /// The same request would fail again.
        is_deterministic: bool,
    },
}

impl ApiError {
    /// A value of `param` that is refused.
    pub(crate) fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::InvalidRequest {
            message: message.into(),
            param: Some(param.into()),
            code: Some("invalid_value"),
        }
    }

    /// A required field that is absent.
    #[must_use]
    pub(crate) fn missing(param: &'static str) -> Self {
        Self::InvalidRequest {
            message: format!("Missing required parameter: '{param}'."),
            param: Some(param.into()),
            code: Some("missing_required_parameter"),
        }
    }

    /// Something the field's servers may know and this one does not.
    pub(crate) fn unsupported(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::InvalidRequest {
            message: message.into(),
            param: Some(param.into()),
            code: Some("unsupported_parameter"),
        }
    }

    /// Prompt and answer do not fit the model. Gateways recognise the error by the first sentence.
    #[must_use]
    pub(crate) fn context_length(param: &'static str, max_model_len: u32, detail: &str) -> Self {
        Self::InvalidRequest {
            message: format!("This model's maximum context length is {max_model_len} tokens. {detail}"),
            param: Some(param.into()),
            code: Some("context_length_exceeded"),
        }
    }

    /// What the engine's refusal means for the client.
    pub(crate) fn refused(error: &SubmitError, stats: &StatsSnapshot) -> Self {
        match error {
            SubmitError::EmptyPrompt => Self::invalid("prompt", "The prompt has no tokens."),
            SubmitError::NoTokensWanted => Self::invalid("max_tokens", "max_tokens must be at least 1, got 0."),
            SubmitError::TooLong {
                prompt_tokens,
                max_tokens,
                max_model_len,
                kv_cache_tokens,
            } => {
                let limit = (*max_model_len).min(*kv_cache_tokens);
                Self::too_long("input_tokens", limit, *prompt_tokens, Some(*max_tokens))
            }
            SubmitError::QueueFull { .. } => Self::QueueFull {
                message: format!("The server is overloaded: {error}."),
                retry_after: after_queue(stats),
            },
            SubmitError::ShuttingDown => Self::ShuttingDown,
            SubmitError::Dead => Self::EngineDead,
        }
    }

    /// A request would wait in the queue for longer than `limit`.
    pub(crate) fn overloaded(num_queued: u64, wait: Option<Duration>, limit: Duration) -> Self {
        let length = match wait {
            Some(wait) => format!("a wait of about {:.1} seconds", wait.as_secs_f64()),
            None => "no telling how long that takes".to_owned(),
        };
        Self::QueueFull {
            message: format!(
                "The server is overloaded: {num_queued} requests are queued, {length}, and the limit is {} seconds.",
                limit.as_secs_f64()
            ),
            retry_after: clamp_retry_after(wait.unwrap_or_default()),
        }
    }

    /// What it means for the client that the engine gave up on its request.
    pub(crate) fn failed(error: &EngineError, stats: &StatsSnapshot) -> Self {
        match error {
            EngineError::StepFailed { .. } => Self::Internal {
                is_deterministic: false,
            },
            EngineError::ConstraintFailed { source } => Self::InvalidRequest {
                message: format!(
                    "The answer cannot be held to what was asked for: {}.",
                    innermost(&**source)
                ),
                param: None,
                code: Some("grammar_failed"),
            },
            EngineError::DeadlineExceeded => Self::DeadlineExceeded,
            EngineError::QueueDeadlineExceeded => Self::QueueTimeout {
                retry_after: after_queue(stats),
            },
            EngineError::ShutDown => Self::ShuttingDown,
            EngineError::EngineDead { .. } => Self::EngineDead,
        }
    }

    /// Prompt and answer, or the prompt alone, do not fit.
    pub(crate) fn too_long(
        param: &'static str,
        max_model_len: u32,
        prompt_tokens: u32,
        max_tokens: Option<u32>,
    ) -> Self {
        let detail = match max_tokens {
            Some(max_tokens) => format!(
                "However, you requested {max_tokens} output tokens and your prompt contains {prompt_tokens} input \
                 tokens, for a total of {} tokens. Please reduce the length of the input prompt or the number of \
                 requested output tokens.",
                u64::from(prompt_tokens) + u64::from(max_tokens)
            ),
            None => format!(
                "However, your prompt contains {prompt_tokens} input tokens, which leaves no room for an answer. \
                 Please reduce the length of the input prompt."
            ),
        };
        Self::context_length(param, max_model_len, &detail)
    }

    /// The HTTP status.
    #[must_use]
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::InvalidRequest { .. } => StatusCode::BAD_REQUEST,
            Self::ModelNotFound { .. } | Self::UnknownUrl { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout { .. } | Self::BodyStalled { .. } | Self::DeadlineExceeded => StatusCode::REQUEST_TIMEOUT,
            Self::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Self::RateLimited { .. } | Self::QueueFull { .. } | Self::QueueTimeout { .. } => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::TooManyConnections | Self::ModelLoading { .. } | Self::ShuttingDown | Self::EngineDead => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// OpenAI's `type`.
    #[must_use]
    pub(crate) fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// OpenAI's `code`.
    #[must_use]
    pub(crate) fn code(&self) -> Option<&'static str> {
        match self {
            Self::InvalidRequest { code, .. } => *code,
            Self::ModelNotFound { .. } => Some("model_not_found"),
            Self::UnknownUrl { .. } => Some("unknown_url"),
            Self::MethodNotAllowed { .. } => Some("method_not_allowed"),
            Self::BodyTooLarge { .. } => Some("request_too_large"),
            Self::BodyTimeout { .. } | Self::BodyStalled { .. } | Self::DeadlineExceeded => Some("request_timeout"),
            Self::Unauthorized { .. } => Some("invalid_api_key"),
            Self::RateLimited { .. } => Some("rate_limit_exceeded"),
            Self::QueueFull { .. } => Some("queue_full"),
            Self::QueueTimeout { .. } => Some("queue_timeout"),
            Self::TooManyConnections => Some("too_many_connections"),
            Self::ModelLoading { .. } => Some("model_loading"),
            Self::ShuttingDown => Some("shutting_down"),
            Self::EngineDead => Some("engine_dead"),
            Self::Internal { .. } => Some("internal_error"),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidRequest { param, .. } => param.as_deref(),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// How long a client should wait before it tries again.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. }
            | Self::QueueFull { retry_after, .. }
            | Self::QueueTimeout { retry_after } => Some(*retry_after),
            Self::TooManyConnections => Some(RETRY_AFTER_MIN),
            Self::ModelLoading { .. } => Some(Duration::from_secs(2)),
            // Another replica, or this one after its restart.
            Self::ShuttingDown | Self::EngineDead => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// `{"error":{…}}` with all four keys.
    #[must_use]
    pub(crate) fn to_json(&self) -> String {
        let message = self.to_string();
        let error = ErrorObject {
            message: &message,
            r#type: self.kind(),
            param: self.param(),
            code: self.code(),
        };
        serde_json::to_string(&ErrorBody { error }).expect("strings serialise")
    }
}

/// The cause at the bottom, which says most.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(wait) = self.retry_after() {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if let Self::Unauthorized { .. } = self {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self, Self::Internal { is_deterministic: true } | Self::DeadlineExceeded) {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

/// When all that waits at present should have started.
fn after_queue(stats: &StatsSnapshot) -> Duration {
    clamp_retry_after(stats.queue_drain_time().unwrap_or_default())
}

/// A wait that clients can be told.
#[must_use]
pub(crate) fn clamp_retry_after(wait: Duration) -> Duration {
    wait.clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
}

/// The start of `text`, as much as a message can bear.
#[must_use]
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_ECHO_BYTES {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}…", &text[..text.floor_char_boundary(MAX_ECHO_BYTES)]))
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

/// All four keys are required by OpenAI's schema; typed clients fail without them.
#[derive(Serialize)]
struct ErrorObject<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

#[cfg(test)]
impl ApiError {
    /// One of each kind.
    pub(crate) fn samples() -> Vec<Self> {
        std::iter::successors(Some(Self::missing("prompt")), Self::next_sample).collect()
    }

    /// Exhaustive, so that no kind is forgotten.
    fn next_sample(&self) -> Option<Self> {
        let wait = Duration::from_secs(1);
        let (method, path) = (Method::GET, "/x".to_owned());
        Some(match self {
            Self::InvalidRequest { .. } => Self::ModelNotFound { model: "x".to_owned() },
            Self::ModelNotFound { .. } => Self::UnknownUrl { method, path },
            Self::UnknownUrl { .. } => Self::MethodNotAllowed { method, path },
            Self::MethodNotAllowed { .. } => Self::BodyTooLarge { limit_bytes: 1 },
            Self::BodyTooLarge { .. } => Self::BodyTimeout { limit: wait },
            Self::BodyTimeout { .. } => Self::BodyStalled {
                num_bytes: 1,
                limit: wait,
            },
            Self::BodyStalled { .. } => Self::DeadlineExceeded,
            Self::DeadlineExceeded => Self::Unauthorized { has_key: true },
            Self::Unauthorized { .. } => Self::RateLimited {
                message: "full".to_owned(),
                retry_after: wait,
            },
            Self::RateLimited { .. } => Self::QueueFull {
                message: "full".to_owned(),
                retry_after: wait,
            },
            Self::QueueFull { .. } => Self::TooManyConnections,
            Self::TooManyConnections => Self::QueueTimeout { retry_after: wait },
            Self::QueueTimeout { .. } => Self::ModelLoading { phase: "x" },
            Self::ModelLoading { .. } => Self::ShuttingDown,
            Self::ShuttingDown => Self::EngineDead,
            Self::EngineDead => Self::Internal { is_deterministic: true },
            Self::Internal { .. } => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_a_queue_that_does_not_move_is_to_come_back_late() {
        let stuck = StatsSnapshot {
            steps: 1,
            num_queued: 3,
            ..StatsSnapshot::default()
        };
        let unmeasured = StatsSnapshot { steps: 0, ..stuck };
        for (stats, expected) in [(stuck, RETRY_AFTER_MAX), (unmeasured, RETRY_AFTER_MIN)] {
            let refused = ApiError::failed(&EngineError::QueueDeadlineExceeded, &stats);
            assert_eq!(refused.retry_after(), Some(expected));
        }
    }
}
