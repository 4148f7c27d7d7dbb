//! Probes, metrics and the version: answered from atomics, in microseconds, whatever the engine does.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::lifecycle::Phase;
use crate::state::AppState;

/// The status of a server whose engine has not ended a step for long.
pub(crate) const STALLED: &str = "stalled";

/// What `/ready` says, and the others when they fail.
#[derive(Serialize)]
struct Readiness {
    status: &'static str,
    progress: Option<f64>,
    /// What is wrong with the engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Readiness {
    fn of(state: &AppState) -> Self {
        let phase = state.lifecycle.phase();
        let (status, error) = if let Some(reason) = state.engine_death() {
            (Phase::Failed.as_str(), Some(reason.to_owned()))
        } else if let Some(since) = state.engine_stall().filter(|_| phase == Phase::Ready) {
            (STALLED, Some(format!("no step has ended for {since:.0?}")))
        } else {
            (phase.as_str(), None)
        };
        let progress = match phase {
            _ if error.is_some() => None,
            Phase::Ready => Some(1.0),
            _ => state.lifecycle.progress(),
        };
        Self {
            status,
            progress,
            error,
        }
    }

    fn is_ready(&self) -> bool {
        self.status == Phase::Ready.as_str()
    }

    fn refuse(self) -> Response {
        (StatusCode::SERVICE_UNAVAILABLE, Json(self)).into_response()
    }
}

/// `GET /live`: would a restart help? Loading and draining are alive, and a stall may end by itself.
pub(crate) async fn live(State(state): State<AppState>) -> Response {
    let readiness = Readiness::of(&state);
    match readiness.status == Phase::Failed.as_str() {
        true => readiness.refuse(),
        false => StatusCode::OK.into_response(),
    }
}

/// `GET /ready`: should traffic come here?
pub(crate) async fn ready(State(state): State<AppState>) -> Response {
    let readiness = Readiness::of(&state);
    match readiness.is_ready() {
        true => Json(readiness).into_response(),
        false => readiness.refuse(),
    }
}

/// `GET /health`: 200 only if requests are served and the engine makes progress. The one probe that peers have.
pub(crate) async fn health(State(state): State<AppState>) -> Response {
    let readiness = Readiness::of(&state);
    match readiness.is_ready() {
        true => StatusCode::OK.into_response(),
        false => readiness.refuse(),
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
