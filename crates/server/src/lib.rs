//! HTTP in, SSE out; wires the rest together.
//!
//! | module | hides |
//! |---|---|
//! | `openai` | the request: reading, checking, prompts; the answer's bytes |
//! | `generate` | submitting to the engine, tokens to text, stop strings, usage |
//! | [`grammar`], `constraint` | compiling grammars off the async threads, within limits; what an answer is held to |
//! | `sse` | streaming: when the status is sent, frames, keep-alive |
//! | `tokenize`, `probes`, `page`, `openapi` | the small endpoints; the page at `/`; what all of them take and give |
//! | `access`, `access_log`, `record` | who may come in; a line in the log for each request; what it says |
//! | `error`, `extract`, `lenient`, `bounded`, `request_id` | every error; bodies; JSON as clients send it, and how much of it; `x-request-id` |
//! | [`traces`] | a span for each request, to a collector |
//! | [`metrics`] | what `/metrics` shows, and that every request is counted once |
//! | [`cli`], [`config`], `units` | what can be typed; what it means |
//! | `hub`, `https`, [`load`], `demo`, `progress` | from a model's name to a running engine |
//! | [`check`] | what is wrong with a checkpoint |
//! | [`mod@bench`] | a load generator, which shares nothing with the rest |
//! | [`serve`], [`logging`] | the listener, signals, the end of the process; log lines |
//! | [`state`], [`lifecycle`] | what handlers share; where the process stands |

pub mod access;
mod access_log;
pub mod bench;
mod bounded;
pub mod check;
pub mod cli;
pub mod config;
mod constraint;
mod demo;
mod device;
mod error;
mod extract;
mod fingerprint;
mod generate;
pub mod grammar;
mod https;
mod hub;
mod json;
mod lenient;
pub mod lifecycle;
pub mod load;
pub mod logging;
pub mod memory_plan;
pub mod metrics;
mod openai;
mod openapi;
mod page;
mod probes;
mod progress;
mod record;
mod request_id;
pub mod serve;
mod sse;
pub mod state;
mod tokenize;
pub mod traces;
pub mod units;

pub use crate::grammar::Grammars;
pub use crate::lifecycle::{Lifecycle, Phase};
pub use crate::metrics::Metrics;
pub use crate::state::{AppState, Limits, SamplingDefaults, ServedModel};

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::Request;
use axum::http::Uri;
use axum::middleware;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use tower::util::MapRequest;
use tower_http::catch_panic::{CatchPanicLayer, ResponseForPanic};

use crate::error::ApiError;

/// All routes and layers.
pub fn router(state: AppState) -> Router {
    let root_path = state.access.root_path.clone();
    let routes = routes(state);
    match root_path.as_str() {
        "" => routes,
        // Proxies may strip the prefix or not.
        prefix => Router::new()
            .nest(prefix, routes.clone())
            // What is nested has no path for the slash alone, which is how browsers write the address of a folder.
            .route_service(&format!("{prefix}/"), MapRequest::new(routes.clone(), to_root))
            .fallback_service(routes),
    }
}

fn to_root(mut request: Request) -> Request {
    *request.uri_mut() = Uri::from_static("/");
    request
}

fn page_routes(state: &AppState) -> Router<AppState> {
    match state.access.has_page {
        true => Router::new().route(page::PATH, get(page::page)),
        false => Router::new(),
    }
}

/// Every path and what answers there. The document of `/openapi.json` has the same ones.
fn table(state: &AppState) -> [(&'static str, MethodRouter<AppState>); 24] {
    [
        ("/v1/chat/completions", post(openai::chat)),
        ("/v1/completions", post(openai::completions)),
        ("/v1/responses", post(openai::responses)),
        ("/v1/chat/completions/render", post(openai::render::chat)),
        ("/v1/completions/render", post(openai::render::completions)),
        ("/invocations", post(openai::invocations)),
        ("/v1/models", get(openai::models::list)),
        ("/v1/models/{*id}", get(openai::models::get)),
        ("/tokenize", post(tokenize::tokenize)),
        ("/detokenize", post(tokenize::detokenize)),
        ("/tokenizer_info", get(tokenize::tokenizer_info)),
        ("/openapi.json", openapi::route(&state.access)),
        ("/version", get(probes::version)),
        ("/live", get(probes::live)),
        ("/ready", get(probes::ready)),
        ("/health", get(probes::health)),
        ("/load", get(probes::load)),
        ("/metrics", get(probes::metrics)),
        // The same probes by other platforms' names: SageMaker's, NIM's, KServe's, vLLM's.
        ("/ping", get(probes::health).post(probes::health)),
        ("/v1/health/live", get(probes::live)),
        ("/v1/health/ready", get(probes::ready)),
        ("/v2/health/live", get(probes::live)),
        ("/v2/health/ready", get(probes::ready)),
        ("/is_sleeping", get(probes::is_sleeping)),
    ]
}

fn routes(state: AppState) -> Router {
    let cors = state.access.cors.layer();
    let router = table(&state)
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods));
    router
        .merge(page_routes(&state))
        .fallback(unknown_url)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(state.clone())
        // Later layers wrap earlier ones: errors of all of them carry an id and are readable across origins.
        .layer(middleware::from_fn_with_state(state.clone(), access::admit))
        .layer(CatchPanicLayer::custom(PanicResponse))
        .layer(cors)
        .layer(middleware::from_fn_with_state(state, access_log::log))
        .layer(middleware::from_fn(request_id::assign))
}

async fn unknown_url(request: Request) -> ApiError {
    ApiError::UnknownUrl {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
    }
}

async fn method_not_allowed(request: Request) -> ApiError {
    ApiError::MethodNotAllowed {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
    }
}

/// A handler's panic is a bug of ours; its connection goes on.
#[derive(Clone, Copy)]
struct PanicResponse;

impl ResponseForPanic for PanicResponse {
    type ResponseBody = axum::body::Body;

    fn response_for_panic(&mut self, _panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
        // The panic hook has logged it.
        axum::response::IntoResponse::into_response(ApiError::Internal { is_deterministic: true })
    }
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
