//! Who may come in: what is refused before a handler sees it.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::ApiError;
use crate::state::AppState;

/// Answered on every connection, whoever asks: orchestrators and load balancers decide by them.
const PROBES: [&str; 3] = ["/live", "/ready", "/health"];
const METRICS: &str = "/metrics";

/// In the extensions of requests on connections beyond `max-connections`: only probes and metrics are answered there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SpareConnection;

/// Whether a request to this path comes from whoever watches the process.
pub(crate) fn is_probe_or_metrics(path: &str) -> bool {
    PROBES.contains(&path) || path == METRICS
}

/// Middleware: refuses, or passes on.
pub(crate) async fn admit(State(_state): State<AppState>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !is_probe_or_metrics(path) && request.extensions().get::<SpareConnection>().is_some() {
        let mut response = ApiError::TooManyConnections.into_response();
        // The next request may find room, on another connection.
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
        return response;
    }
    next.run(request).await
}
