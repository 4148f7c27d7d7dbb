//! A generation as server-sent events: polled by the connection straight from the engine's streams, no task between.
//!
//! The status line waits for the engine's first output, so that whatever goes wrong before it is a plain HTTP error. A
//! request that is queued for longer than the keep-alive interval gets its 200 and a comment then, lest a proxy gives
//! up; later errors are events of the stream.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use crate::generate::Generation;
use crate::metrics::{Outcome, RequestOutcome};
use crate::openai::answer::StreamWriter;

/// Events are gathered into one frame up to this size when the client is slower than the engine.
const MAX_FRAME_BYTES: usize = 16 << 10;

/// A comment: clients skip it, proxies see traffic.
const PING: &[u8] = b": ping\n\n";

const HEADERS: [(HeaderName, HeaderValue); 3] = [
    (
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    ),
    (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    // nginx would hold tokens back otherwise.
    (
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    ),
];

/// Waits for the first output, then streams.
pub(crate) async fn respond(
    mut generation: Generation,
    mut writer: Box<dyn StreamWriter>,
    keep_alive: Duration,
    outcome: RequestOutcome,
) -> Response {
    let mut buffer = BytesMut::with_capacity(1024);
    let first = poll_fn(|context| generation.poll_next(context));
    let first = match keep_alive.is_zero() {
        true => Ok(first.await),
        false => tokio::time::timeout(keep_alive, first).await,
    };
    match first {
        Ok(Some(Ok(index))) => writer.write_delta(&mut buffer, &generation, index),
        Ok(Some(Err(error))) => return outcome.fail(&error),
        // No choices: `Generation` never has none.
        Ok(None) => {}
        Err(_elapsed) => buffer.extend_from_slice(PING),
    }
    let body = SseBody {
        generation,
        writer,
        buffer,
        keep_alive: (!keep_alive.is_zero()).then(|| KeepAlive::new(keep_alive)),
        outcome: Some(outcome),
    };
    (HEADERS, Body::new(body)).into_response()
}

/// The body of a streamed answer. Dropped with the connection, which aborts the generation.
#[derive(Debug)]
struct SseBody {
    generation: Generation,
    writer: Box<dyn StreamWriter>,
    /// Events not handed out yet. Its memory is reused once the connection has written them.
    buffer: BytesMut,
    keep_alive: Option<KeepAlive>,
    /// `None` once the end mark was written.
    outcome: Option<RequestOutcome>,
}

impl SseBody {
    /// Gathers what is ready; `false` when more could be.
    fn fill(&mut self, context: &mut Context<'_>) -> bool {
        while self.buffer.len() < MAX_FRAME_BYTES && self.outcome.is_some() {
            match self.generation.poll_next(context) {
                Poll::Pending => return true,
                Poll::Ready(Some(Ok(index))) => {
                    self.writer.write_delta(&mut self.buffer, &self.generation, index);
                }
                Poll::Ready(Some(Err(error))) => {
                    if let Some(outcome) = self.outcome.take() {
                        let error = outcome.fail_stream(&error);
                        self.writer.write_error(&mut self.buffer, &error);
                    }
                }
                Poll::Ready(None) => {
                    let usage = self.generation.usage();
                    self.writer.write_end(&mut self.buffer, &self.generation, usage);
                    if let Some(mut outcome) = self.outcome.take() {
                        outcome.record(Outcome::of(&self.generation), usage);
                    }
                }
            }
        }
        false
    }
}

impl http_body::Body for SseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        let is_silent = this.fill(context) && this.buffer.is_empty();
        if is_silent
            && this
                .keep_alive
                .as_mut()
                .is_some_and(|keep_alive| keep_alive.poll_due(context))
        {
            this.buffer.extend_from_slice(PING);
        }
        if !this.buffer.is_empty() {
            if let Some(keep_alive) = &mut this.keep_alive {
                keep_alive.wrote();
            }
            return Poll::Ready(Some(Ok(Frame::data(this.buffer.split().freeze()))));
        }
        if this.outcome.is_none() {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    fn is_end_stream(&self) -> bool {
        self.outcome.is_none() && self.buffer.is_empty()
    }
}

/// Tells when a stream was silent for too long. The timer is not touched for each token: when it fires it looks at how
/// long ago the last one was.
#[derive(Debug)]
struct KeepAlive {
    interval: Duration,
    last_write: Instant,
    timer: Pin<Box<Sleep>>,
}

impl KeepAlive {
    fn new(interval: Duration) -> Self {
        Self {
            interval,
            last_write: Instant::now(),
            timer: Box::pin(tokio::time::sleep(interval)),
        }
    }

    fn wrote(&mut self) {
        self.last_write = Instant::now();
    }

    fn poll_due(&mut self, context: &mut Context<'_>) -> bool {
        while self.timer.as_mut().poll(context).is_ready() {
            let due = self.last_write + self.interval;
            let is_due = due <= Instant::now();
            let next = if is_due { Instant::now() + self.interval } else { due };
            self.timer.as_mut().reset(next);
            if is_due {
                return true;
            }
        }
        false
    }
}
