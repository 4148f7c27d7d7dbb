//! The life of a serving process: listen, load, serve, drain.
//!
//! The listener is up before the model is loaded, so that probes are answered from the first second. The end comes in
//! one of four ways: a signal and a drain (exit 0), a drain that ran out of time or was cut short by a second signal,
//! a model that cannot be loaded, or an engine that died; the last three exit non-zero, so that an orchestrator
//! restarts the process. [`ServeError::exit_code`] tells an engine's death from the others.

mod listener;
mod reload;
mod stall;
mod tls;

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::middleware::map_response_with_state;
use axum::response::Response;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep, timeout};

use crate::config::{Config, ConfigError, HttpConfig};
use crate::lifecycle::Phase;
use crate::load::{LoadError, load};
use crate::metrics::Metrics;
use crate::state::{AppState, ServedModel};
use crate::traces::{TraceError, Tracer};
use listener::Connections;
pub use listener::Listener;
use tls::Tls;
pub use tls::TlsError;

/// How often the engine's health is looked at. Its death is rare; clients hear of it at once through their streams.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// Time for answers to be written once the engine is gone: they are errors of a few hundred bytes.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the last traces to be exported: a collector that is there takes milliseconds.
const LAST_TRACES_TIMEOUT: Duration = Duration::from_secs(3);

/// Why the process must end with a failure.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Port taken, address not ours, no permission.
    #[error("cannot listen on {address}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The API keys cannot be read.
    #[error("cannot tell who may come in")]
    Access(#[source] ConfigError),
    /// Certificate or key cannot be used.
    #[error("cannot serve HTTPS")]
    Tls(#[source] TlsError),
    /// No traces, though they were asked for.
    #[error("cannot export traces")]
    Traces(#[source] TraceError),
    /// The system refused to deliver signals.
    #[error("cannot handle signals")]
    Signals(#[source] io::Error),
    /// No model, nothing to serve.
    #[error("cannot serve the model")]
    Load(#[source] Box<LoadError>),
    /// A bug in loading.
    #[error("loading the model panicked")]
    LoadPanicked,
    /// A step of the warm-up does not end.
    #[error("a step of the warm-up took longer than the step timeout: the device hangs")]
    WarmUpHangs,
    /// Nothing will run any more.
    #[error("the engine died: {reason}")]
    EngineDied {
        /// Device error, panic or step that did not end.
        reason: String,
    },
    /// Requests were still running when the time was up, or a second signal came.
    #[error("the drain was cut short: requests in flight were ended with an error")]
    CutShort,
}

/// The device or the engine failed, which another process may have better luck with.
const ENGINE_DIED: u8 = 3;

impl ServeError {
    /// What the process should exit with: 3 where the engine died or hangs, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::EngineDied { .. } | Self::WarmUpHangs => ENGINE_DIED,
            _ => 1,
        }
    }
}

/// Serves until a signal ends it.
///
/// # Errors
/// See [`ServeError`]: the process should exit non-zero.
pub async fn serve(config: Config) -> Result<(), ServeError> {
    let access = config.access.open().map_err(ServeError::Access)?;
    let metrics = Metrics::new(config.load.names[0].clone());
    let state = AppState::with_access(config.limits.clone(), metrics, access);
    if let Some(traces) = config.traces.clone() {
        let tracer = Tracer::start(traces).map_err(ServeError::Traces)?;
        state.traces.get_or_init(|| tracer);
    }
    let listener = Listener::bind(&config.http).await?;
    let http = config.http.clone();
    let ended = serve_on(listener, &http, state.clone(), move |state| load(&config, state)).await;
    if let Some(tracer) = state.traces.get() {
        tracer.flush(LAST_TRACES_TIMEOUT).await;
    }
    ended
}

/// [`serve`] on a socket that is bound already, with whatever `load` comes up with.
///
/// # Errors
/// As [`serve`].
pub async fn serve_on(
    listener: Listener,
    http: &HttpConfig,
    state: AppState,
    load: impl FnOnce(&AppState) -> Result<ServedModel, LoadError> + Send + 'static,
) -> Result<(), ServeError> {
    let started = Instant::now();
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    let tls = match &http.tls {
        Some(tls) => Some(Arc::new(Tls::open(tls).map_err(ServeError::Tls)?)),
        None => None,
    };
    let scheme = if tls.is_some() { "https" } else { "http" };
    tracing::info!(url = format!("{scheme}://{}", listener.local_address()), "listening");
    let _reloading = reload::start(&state, tls.as_ref()).map_err(ServeError::Signals)?;
    let router = crate::router(state.clone());
    let router = router.layer(map_response_with_state(state.clone(), close_while_draining));
    let connections = listener.start(&state, router, http, tls);

    let loading = {
        let state = state.clone();
        tokio::task::spawn_blocking(move || load(&state))
    };
    let loaded = tokio::select! {
        loaded = loading => loaded,
        _ = signals.next() => {
            tracing::info!("stopped before the model was loaded");
            return Ok(());
        }
        () = overdue(&state) => {
            state.lifecycle.enter(Phase::Failed);
            return Err(ServeError::WarmUpHangs);
        }
    };
    match loaded {
        Ok(Ok(model)) => run(&state, publish(&state, model, started), connections, &mut signals, http).await,
        Ok(Err(error)) => {
            state.lifecycle.enter(Phase::Failed);
            Err(ServeError::Load(Box::new(error)))
        }
        Err(_) => Err(ServeError::LoadPanicked),
    }
}

/// Clients with open connections must go elsewhere too. Told with an answer, they do so at no cost; a connection that is
/// closed while the next request is under way costs them that request.
async fn close_while_draining(State(state): State<AppState>, mut response: Response) -> Response {
    if state.lifecycle.phase() == Phase::Draining {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Makes the model visible to handlers and says so.
fn publish(state: &AppState, model: ServedModel, started: Instant) -> &ServedModel {
    let model = state.model.get_or_init(|| model);
    state.lifecycle.enter(Phase::Ready);
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(
        model = model.names[0],
        max_model_len = model.max_model_len,
        seconds,
        "ready"
    );
    model
}

async fn run(
    state: &AppState,
    model: &ServedModel,
    connections: Connections,
    signals: &mut Signals,
    http: &HttpConfig,
) -> Result<(), ServeError> {
    tokio::select! {
        signal = signals.next() => drain(state, model, connections, signals, Grace::after(signal, http)).await,
        reason = engine_death(model) => {
            state.lifecycle.enter(Phase::Failed);
            tracing::info!(code = ENGINE_DIED, "exiting, so that the process is restarted");
            // Clients whose streams just failed get to read so.
            let _ = timeout(LAST_WORDS_TIMEOUT, connections.close()).await;
            Err(ServeError::EngineDied { reason })
        }
    }
}

async fn engine_death(model: &ServedModel) -> String {
    loop {
        if let Some(reason) = model.engine.death() {
            return reason.to_owned();
        }
        sleep(WATCH_INTERVAL).await;
    }
}

/// Waits for a step of the warm-up that does not end.
async fn overdue(state: &AppState) {
    while !state.lifecycle.is_overdue() {
        sleep(WATCH_INTERVAL).await;
    }
}

/// The two times of a drain.
struct Grace {
    /// Before the listener closes.
    accept: Duration,
    /// After it closed.
    finish: Duration,
}

impl Grace {
    /// A person at a terminal has no load balancer that must notice first.
    fn after(signal: SignalKind, http: &HttpConfig) -> Self {
        let accept = if signal == SignalKind::interrupt() {
            Duration::ZERO
        } else {
            http.drain_grace
        };
        Self {
            accept,
            finish: http.shutdown_timeout,
        }
    }
}

async fn drain(
    state: &AppState,
    model: &ServedModel,
    connections: Connections,
    signals: &mut Signals,
    grace: Grace,
) -> Result<(), ServeError> {
    state.lifecycle.enter(Phase::Draining);
    let stats = model.engine.stats();
    tracing::info!(running = stats.num_running, waiting = stats.num_waiting, accept = ?grace.accept, finish = ?grace.finish, "draining");
    let mut impatient = tokio::select! {
        () = sleep(grace.accept) => false,
        _ = signals.next() => true,
    };
    // No request is refused from here on: those that got in run, and no new one can get in.
    let mut closed = pin!(connections.close());
    if !impatient {
        tokio::select! {
            () = &mut closed => return drained(state, model),
            () = sleep(grace.finish) => tracing::warn!("shutdown-timeout is over: ending requests in flight"),
            _ = signals.next() => impatient = true,
        }
    }
    if impatient {
        tracing::warn!("second signal: ending requests in flight");
    }
    let engine = model.engine.clone();
    // Waits for the step in flight; the streams' errors do not.
    let ending = tokio::task::spawn_blocking(move || engine.shutdown());
    let _ = timeout(LAST_WORDS_TIMEOUT, async { tokio::join!(ending, closed) }).await;
    Err(ServeError::CutShort)
}

/// All connections are closed. Where the engine died, that is because their requests failed.
fn drained(state: &AppState, model: &ServedModel) -> Result<(), ServeError> {
    if let Some(reason) = model.engine.death() {
        state.lifecycle.enter(Phase::Failed);
        let reason = reason.to_owned();
        return Err(ServeError::EngineDied { reason });
    }
    tracing::info!("drained");
    Ok(())
}

/// SIGTERM from an orchestrator, SIGINT from a terminal.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
        }
    }
}
