//! One span for each request on a generation endpoint, sent to a collector by OTLP over HTTP.
//!
//! A request gives its span to a bounded queue and goes on; a thread of its own gathers and sends. What the queue or the
//! collector does not take is dropped and counted: traces never hold up what they describe.

mod context;
mod exporter;
mod span;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;
use std::{io, thread};

use axum::http::HeaderMap;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

pub(crate) use self::context::TraceContext;
use self::exporter::Exporter;
pub(crate) use self::span::{Asked, Span};
use crate::config::{Sampler, TraceConfig};

/// Spans that wait to be sent: several seconds of a busy server, some megabytes.
const MAX_QUEUED_SPANS: usize = 4096;

/// Between two looks at a full queue of a process that is about to end.
const FLUSH_RETRY: Duration = Duration::from_millis(10);

/// Why traces cannot be exported at all.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A file with authorities to trust cannot be used.
    #[error("cannot read the authorities to trust (OTEL_EXPORTER_OTLP_CERTIFICATE, SSL_CERT_FILE)")]
    Certificates(#[source] io::Error),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Takes spans, from any thread.
#[derive(Debug)]
pub struct Tracer {
    queue: SyncSender<Message>,
    sampler: Sampler,
    counts: Arc<Counts>,
}

/// What became of all spans so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) exported: AtomicU64,
    pub(crate) dropped: AtomicU64,
}

enum Message {
    Span(Box<Span>),
    /// Everything before it is to be sent now.
    Flush(oneshot::Sender<()>),
}

impl Tracer {
    /// Starts the thread that sends.
    ///
    /// # Errors
    /// See [`TraceError`]. A collector that is not there is none.
    pub fn start(config: TraceConfig) -> Result<Self, TraceError> {
        Self::with_queue(config, MAX_QUEUED_SPANS)
    }

    fn with_queue(config: TraceConfig, max_queued: usize) -> Result<Self, TraceError> {
        let (queue, messages) = sync_channel(max_queued);
        let counts = Arc::<Counts>::default();
        let sampler = config.sampler;
        let exporter = Exporter::new(config, Arc::clone(&counts))?;
        thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || exporter.run(&messages))
            .map_err(TraceError::Thread)?;
        Ok(Self { queue, sampler, counts })
    }

    /// The place of a request in a trace, if it is to be traced.
    pub(crate) fn begin(&self, headers: &HeaderMap) -> Option<TraceContext> {
        TraceContext::of_request(headers, self.sampler)
    }

    /// Hands over a span, or drops it.
    pub(crate) fn record(&self, span: Span) {
        if self.queue.try_send(Message::Span(Box::new(span))).is_err() {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Waits until all spans so far are sent or dropped, `limit` at most.
    pub async fn flush(&self, limit: Duration) {
        let flushed = async {
            let (done, flushed) = oneshot::channel();
            let mut message = Message::Flush(done);
            while let Err(TrySendError::Full(refused)) = self.queue.try_send(message) {
                message = refused;
                sleep(FLUSH_RETRY).await;
            }
            // An error says that the thread is gone, and with it what it had.
            let _ = flushed.await;
        };
        if timeout(limit, flushed).await.is_err() {
            tracing::warn!("the last traces were not exported in time");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::SystemTime;

    use super::*;
    use crate::generate::{Timings, Usage};
    use crate::metrics::Outcome;
    use crate::openai::Endpoint;

    fn span() -> Span {
        Span {
            context: TraceContext::of_request(&HeaderMap::new(), Sampler::default()).unwrap(),
            request_id: String::new(),
            model: String::new(),
            endpoint: Endpoint::Chat,
            status: 200,
            outcome: Outcome::Stop,
            usage: Usage::default(),
            timings: Timings::default(),
            asked: None,
            end: SystemTime::now(),
            duration: Duration::ZERO,
        }
    }

    #[test]
    fn a_collector_that_does_not_answer_holds_up_nobody() {
        let collector = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = TraceConfig {
            endpoint: format!("http://{}/v1/traces", collector.local_addr().unwrap()),
            headers: Vec::new(),
            resource: Vec::new(),
            sampler: Sampler::default(),
            ca_bundle: None,
        };
        let tracer = Tracer::with_queue(config, 2).unwrap();
        tracer.record(span());
        // Now it is out of the queue, and waits for an answer.
        let (mut connection, _) = collector.accept().unwrap();
        connection.read_exact(&mut [0]).unwrap();
        for _ in 0..5 {
            tracer.record(span());
        }
        // Whoever waited for the queue would have lost none.
        assert_eq!(tracer.counts().dropped.load(Relaxed), 3);
    }
}
