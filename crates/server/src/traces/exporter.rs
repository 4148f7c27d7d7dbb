//! Gathers spans and posts them to the collector.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;
use ureq::Agent;

use super::span::Attributes;
use super::{Counts, Message, Span, TraceError};
use crate::config::TraceConfig;
use crate::https;
use crate::logging::CauseChain;

const USER_AGENT: &str = concat!("lapidary/", env!("CARGO_PKG_VERSION"));
/// Spans of one request to the collector: some hundred kilobytes.
const MAX_BATCH: usize = 512;
/// How long the first span of a batch waits for others.
const MAX_WAIT: Duration = Duration::from_secs(1);
/// For one request to the collector, as OpenTelemetry's exporters have it.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Owns the connection to the collector.
pub(super) struct Exporter {
    agent: Agent,
    config: TraceConfig,
    resource: Value,
    counts: Arc<Counts>,
    /// The last attempt failed: one line in the log for each spell of trouble.
    is_failing: bool,
}

/// Why a batch was not taken.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("the collector cannot be reached")]
    Unreachable(#[source] Box<ureq::Error>),
    #[error("the collector answered {0}")]
    Refused(u16),
}

impl Exporter {
    pub(super) fn new(config: TraceConfig, counts: Arc<Counts>) -> Result<Self, TraceError> {
        let tls = https::trusting(config.ca_bundle.as_deref()).map_err(TraceError::Certificates)?;
        let agent = Agent::config_builder()
            .tls_config(tls)
            .user_agent(USER_AGENT)
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(TIMEOUT))
            .build()
            .new_agent();
        let mut attributes = Attributes::default();
        for (key, value) in &config.resource {
            attributes.text(key, value);
        }
        Ok(Self {
            agent,
            resource: json!({ "attributes": attributes.0 }),
            config,
            counts,
            is_failing: false,
        })
    }

    /// Until nobody can send any more.
    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        let mut batch = Vec::new();
        while let Ok(message) = messages.recv() {
            let flushed = gather(message, messages, &mut batch);
            self.export(&batch);
            batch.clear();
            if let Some(flushed) = flushed {
                // Whoever asked may have stopped waiting.
                let _ = flushed.send(());
            }
        }
    }

    fn export(&mut self, batch: &[Span]) {
        if batch.is_empty() {
            return;
        }
        let counter = match self.post(batch) {
            Ok(()) => {
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("traces are exported again");
                }
                &self.counts.exported
            }
            Err(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    let endpoint = &self.config.endpoint;
                    let error = format!("{:#}", CauseChain(&error));
                    tracing::warn!(
                        endpoint,
                        error,
                        "cannot export traces; they are dropped until that works"
                    );
                }
                &self.counts.dropped
            }
        };
        counter.fetch_add(batch.len() as u64, Relaxed);
    }

    fn post(&self, batch: &[Span]) -> Result<(), ExportError> {
        let spans: Vec<Value> = batch.iter().map(Span::to_json).collect();
        let scope = json!({ "name": "lapidary", "version": env!("CARGO_PKG_VERSION") });
        let body = json!({
            "resourceSpans": [{ "resource": self.resource, "scopeSpans": [{ "scope": scope, "spans": spans }] }]
        });
        let mut request = self
            .agent
            .post(&self.config.endpoint)
            .header("content-type", "application/json");
        for (name, value) in &self.config.headers {
            request = request.header(name, value.expose());
        }
        let mut response = request
            .send(body.to_string())
            .map_err(|error| ExportError::Unreachable(Box::new(error)))?;
        let status = response.status();
        // Read to its end, so that the connection can be used again; of no interest otherwise.
        let _ = response.body_mut().read_to_vec();
        match status.is_success() {
            true => Ok(()),
            false => Err(ExportError::Refused(status.as_u16())),
        }
    }
}

/// Adds to `batch` what comes until it is full or old enough, or somebody wants it sent.
fn gather(first: Message, messages: &Receiver<Message>, batch: &mut Vec<Span>) -> Option<oneshot::Sender<()>> {
    let deadline = Instant::now() + MAX_WAIT;
    let mut next = Ok(first);
    loop {
        match next {
            Ok(Message::Span(span)) => batch.push(*span),
            Ok(Message::Flush(done)) => return Some(done),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        }
        if batch.len() == MAX_BATCH {
            return None;
        }
        next = messages.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}
