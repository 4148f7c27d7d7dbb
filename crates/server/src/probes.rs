//! Probes, metrics and the version: answered from atomics, in microseconds, whatever the engine does.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::lifecycle::Phase;
use crate::state::AppState;

/// What `/ready` says.
#[derive(Serialize)]
struct Readiness {
    status: &'static str,
    progress: Option<f64>,
}

/// `GET /live`: would a restart help? Loading and draining are alive.
pub(crate) async fn live(State(state): State<AppState>) -> StatusCode {
    if state.lifecycle.phase() == Phase::Failed || state.is_engine_dead() {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    }
}

/// `GET /ready`: should traffic come here?
pub(crate) async fn ready(State(state): State<AppState>) -> Response {
    let phase = if state.is_engine_dead() {
        Phase::Failed
    } else {
        state.lifecycle.phase()
    };
    let progress = match phase {
        Phase::Ready => Some(1.0),
        _ => state.lifecycle.progress(),
    };
    (
        health(State(state)).await,
        Json(Readiness {
            status: phase.as_str(),
            progress,
        }),
    )
        .into_response()
}

/// `GET /health`: 200 only if requests are served and the engine makes progress. The one probe that peers have.
pub(crate) async fn health(State(state): State<AppState>) -> StatusCode {
    if state.lifecycle.phase() == Phase::Ready && state.is_engine_well() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// `GET /version`.
pub(crate) async fn version() -> Response {
    #[derive(Serialize)]
    struct Version {
        version: &'static str,
    }
    Json(Version {
        version: env!("CARGO_PKG_VERSION"),
    })
    .into_response()
}

/// `GET /load`: requests that run or wait.
pub(crate) async fn load(State(state): State<AppState>) -> Response {
    #[derive(Serialize)]
    struct Load {
        server_load: u64,
    }
    let stats = state.model.get().map(|model| model.engine.stats());
    Json(Load {
        server_load: stats.map_or(0, |stats| stats.num_running + stats.num_waiting),
    })
    .into_response()
}

/// `GET /is_sleeping`: routers ask before they send anything. Nothing here sleeps.
pub(crate) async fn is_sleeping() -> Response {
    #[derive(Serialize)]
    struct Sleep {
        is_sleeping: bool,
    }
    Json(Sleep { is_sleeping: false }).into_response()
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(state): State<AppState>) -> Response {
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    match state
        .metrics
        .render(&state.lifecycle, state.model.get(), state.traces.get())
    {
        Ok(text) => ([(header::CONTENT_TYPE, content_type)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot encode the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}
