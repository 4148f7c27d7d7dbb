//! One line in the log, one count and one span for each request, when its last byte was handed over or its client left.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};

use crate::access::is_probe_or_metrics;
use crate::error::shorten;
use crate::metrics::{HttpRequest, Outcome};
use crate::record::RequestRecord;
use crate::request_id::RequestId;
use crate::state::AppState;
use crate::traces::{Span, TraceContext};

/// Status in the log of a request whose client left before it was answered: nginx's.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// Middleware: writes the line, counts and traces. Inside of [`request_id::assign`](crate::request_id::assign), around all else.
pub(crate) async fn log(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let Some(id) = request.extensions().get::<RequestId>().cloned() else {
        return next.run(request).await;
    };
    // The query is left out: clients put secrets there.
    let trace = state.traces.get().and_then(|tracer| tracer.begin(request.headers()));
    let mut line = Line {
        state,
        trace,
        method: request.method().clone(),
        path: shorten(request.uri().path()).into_owned(),
        record: Arc::clone(id.record()),
        id,
        arrival: Instant::now(),
        answered: None,
        num_request_bytes: length_of(request.headers()),
        num_bytes: 0,
    };
    let response = next.run(request).await;
    line.answered = Some((response.status(), Instant::now()));
    response.map(|body| Body::new(LoggedBody { body, line }))
}

/// The line and the counts of what was no HTTP, and has been refused as such.
pub(crate) fn malformed(state: &AppState, error: &hyper::Error) {
    state.metrics.malformed_request();
    state.metrics.http.count_malformed();
    tracing::info!(outcome = Outcome::Invalid.as_str(), %error, "request");
}

/// What a request says of its body; 0 where it does not say.
fn length_of(headers: &HeaderMap) -> u64 {
    let length = headers.get(header::CONTENT_LENGTH);
    length
        .and_then(|length| length.to_str().ok()?.parse().ok())
        .unwrap_or(0)
}

/// Written when dropped.
#[derive(Debug)]
struct Line {
    state: AppState,
    /// Absent unless it is traced.
    trace: Option<TraceContext>,
    id: RequestId,
    record: Arc<RequestRecord>,
    method: Method,
    path: String,
    arrival: Instant,
    /// Status, and when it was known.
    answered: Option<(StatusCode, Instant)>,
    /// Of the request's body, as far as it says.
    num_request_bytes: u64,
    /// Of the answer's body.
    num_bytes: u64,
}

/// The line as an event of one level: the level of an event has to be a constant.
macro_rules! write_line {
    ($level:expr, $line:expr) => {{
        let line: &Line = $line;
        let usage = line.record.usage();
        let ms = |until: Instant| (until - line.arrival).as_secs_f64() * 1000.0;
        let is_generation = line.record.outcome().is_some();
        let timings = line.record.timings();
        let of_part = |part: Option<Duration>| part.map(|part| part.as_secs_f64() * 1000.0);
        tracing::event!(
            $level,
            request_id = line.id.as_str(),
            method = line.method.as_str(),
            path = line.path,
            status = line.status(),
            outcome = line.record.outcome().map(|outcome| outcome.as_str()),
            prompt_tokens = is_generation.then_some(usage.prompt_tokens),
            cached_tokens = is_generation.then_some(usage.cached_tokens),
            completion_tokens = is_generation.then_some(usage.completion_tokens),
            bytes = line.num_bytes,
            queue_ms = of_part(timings.queue),
            ttft_ms = of_part(timings.to_first_token),
            tpot_ms = of_part(timings.mean_inter_token),
            head_ms = line.answered.map(|(_, when)| ms(when)),
            total_ms = ms(Instant::now()),
            trace_id = line
                .trace
                .as_ref()
                .filter(|_| is_generation)
                .map(TraceContext::trace_id_hex),
            "request"
        );
    }};
}

impl Line {
    fn status(&self) -> u16 {
        self.answered
            .map_or(CLIENT_CLOSED_REQUEST, |(status, _)| status.as_u16())
    }

    /// A span, where the request was for an endpoint that generates.
    fn trace(&mut self) {
        let (Some(context), Some(tracer)) = (self.trace.take(), self.state.traces.get()) else {
            return;
        };
        let record = &self.record;
        let (Some(endpoint), Some(outcome)) = (record.endpoint(), record.outcome()) else {
            return;
        };
        tracer.record(Span {
            context,
            request_id: self.id.as_str().to_owned(),
            model: self.state.metrics.model_name().to_owned(),
            endpoint,
            status: self.status(),
            outcome,
            usage: record.usage(),
            timings: record.timings(),
            asked: record.asked(),
            end: SystemTime::now(),
            duration: self.arrival.elapsed(),
        });
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let http = &self.state.metrics.http;
        http.count(&HttpRequest {
            method: &self.method,
            path: &self.path,
            status: self.status(),
            duration: self.arrival.elapsed(),
            num_bytes: self.num_request_bytes,
            num_answer_bytes: self.num_bytes,
        });
        // Asked every second by whoever watches the process: they would be most of the log.
        if is_probe_or_metrics(&self.path) {
            write_line!(tracing::Level::DEBUG, self);
        } else {
            write_line!(tracing::Level::INFO, self);
        }
        self.trace();
    }
}

/// Holds the line until the answer is over.
#[derive(Debug)]
struct LoggedBody {
    /// Dropped first: only then is a client that left counted as such.
    body: Body,
    line: Line,
}

impl http_body::Body for LoggedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            self.line.num_bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
