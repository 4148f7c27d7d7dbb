//! Who may come in: what is refused before a handler sees it.

mod budget;
mod cors;
mod keys;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

pub use self::budget::KeyLimits;
pub(crate) use self::budget::KeyPermit;
pub use self::cors::Cors;
pub use self::keys::{ApiKeys, KeyFileError};

use self::keys::Key;
use crate::error::ApiError;
use crate::metrics::RequestOutcome;
use crate::openai::Endpoint;
use crate::page;
use crate::request_id::RequestId;
use crate::state::AppState;

/// Answered on every connection, whoever asks: orchestrators and load balancers decide by them.
const PROBES: [&str; 8] = [
    "/live",
    "/ready",
    "/health",
    "/ping",
    "/v1/health/live",
    "/v1/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
];
const METRICS: &str = "/metrics";

/// Who may come in.
#[derive(Debug, Default)]
pub struct Access {
    /// `None`: whoever reaches the port.
    pub keys: Option<ApiKeys>,
    /// `/metrics` needs no key.
    pub open_metrics: bool,
    /// The page at `/` is there, for everybody: it has no secrets, and what it asks for needs a key.
    pub has_page: bool,
    /// Which pages may call.
    pub cors: Cors,
    /// What proxies may leave in front of paths, `/gem` for one; empty: nothing.
    pub root_path: String,
}

/// In the extensions of requests on connections beyond `max-connections`: only probes and metrics are answered there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SpareConnection;

/// Whether a request to this path comes from whoever watches the process.
pub(crate) fn is_probe_or_metrics(path: &str) -> bool {
    PROBES.contains(&path) || path == METRICS
}

/// Middleware: refuses, or passes on.
pub(crate) async fn admit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    match check(&state.access, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(&state, &request, error),
    }
}

fn check(access: &Access, request: &Request) -> Result<(), ApiError> {
    let path = request.uri().path();
    if !is_probe_or_metrics(path) && request.extensions().get::<SpareConnection>().is_some() {
        return Err(ApiError::TooManyConnections);
    }
    let is_open =
        PROBES.contains(&path) || (path == METRICS && access.open_metrics) || (path == page::PATH && access.has_page);
    let Some(keys) = access.keys.as_ref().filter(|_| !is_open) else {
        return Ok(());
    };
    let key = keys.find(bearer(request.headers()))?;
    // Reading a list costs nothing: whatever does comes as POST.
    if let Some(id) = request
        .extensions()
        .get::<RequestId>()
        .filter(|_| request.method() == Method::POST)
    {
        id.record().hold(key.admit(keys.limits())?);
    }
    Ok(())
}

/// The key of `Authorization: Bearer KEY`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// The answer, counted as every request to a generation endpoint is.
fn refuse(state: &AppState, request: &Request, error: ApiError) -> Response {
    let closes = error == ApiError::TooManyConnections;
    let id = request.extensions().get::<RequestId>();
    let endpoint = Endpoint::of(request.method(), request.uri().path());
    let mut response = match (endpoint, id) {
        (Some(endpoint), Some(id)) => RequestOutcome::new(state, endpoint, id.clone()).refuse(error),
        _ => error.into_response(),
    };
    if closes {
        // The next request may find room, on another connection.
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

impl Key {
    /// Room for one more request of this key, until the permit is dropped.
    fn admit(self: &Arc<Self>, limits: &KeyLimits) -> Result<KeyPermit, ApiError> {
        self.budget.admit(limits).map_err(|refusal| ApiError::RateLimited {
            message: refusal.to_string(),
            retry_after: refusal.retry_after(),
        })
    }
}
