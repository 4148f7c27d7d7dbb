//! Every HTTP request but probes and scrapes, as the instrumentation that vLLM's front end carries counts them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use axum::http::Method;

use super::exposition::{Exposition, Labels, number};
use super::histogram::DurationHistogram;
use crate::access::is_probe_or_metrics;

/// Label values. What a client made up is `none`, so that nobody can add to them.
const HANDLERS: [&str; 15] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/invocations",
    "/v1/models",
    "/v1/models/{id}",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/is_sleeping",
    "/openapi.json",
    "/",
    "none",
];
/// Index of the handler of what has none.
const NONE: usize = HANDLERS.len() - 1;
const METHODS: [&str; 5] = ["GET", "POST", "HEAD", "OPTIONS", "other"];
const CLASSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

/// Asked by those who watch the process, beside probes and `/metrics`.
const NOT_COUNTED: [&str; 2] = ["/load", "/version"];

const DURATION: &[f64] = &[0.1, 0.5, 1.0];
const DURATION_FINE: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
];

/// A request that is over.
#[derive(Debug)]
pub(crate) struct HttpRequest<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) status: u16,
    /// From its head to the last byte of its answer.
    pub(crate) duration: Duration,
    /// Of its body, as far as it said.
    pub(crate) num_bytes: u64,
    /// Of the answer's body.
    pub(crate) num_answer_bytes: u64,
}

/// Counts by handler, method and class of status; durations by handler and method; sizes by handler.
#[derive(Debug)]
pub(crate) struct HttpMetrics {
    requests: [[[AtomicU64; CLASSES.len()]; METHODS.len()]; HANDLERS.len()],
    durations: [[DurationHistogram; METHODS.len()]; HANDLERS.len()],
    durations_fine: DurationHistogram,
    sizes: [Sizes; HANDLERS.len()],
}

/// Of bodies, in bytes.
#[derive(Debug, Default)]
struct Sizes {
    count: AtomicU64,
    requests: AtomicU64,
    answers: AtomicU64,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        Self {
            requests: [const { [const { [const { AtomicU64::new(0) }; _] }; _] }; _],
            durations: std::array::from_fn(|_| std::array::from_fn(|_| DurationHistogram::new(DURATION))),
            durations_fine: DurationHistogram::new(DURATION_FINE),
            sizes: Default::default(),
        }
    }
}

impl HttpMetrics {
    /// A request is over.
    pub(crate) fn count(&self, request: &HttpRequest<'_>) {
        if !is_counted(request.path) {
            return;
        }
        let (handler, method) = (handler(request.path), index(&METHODS, request.method.as_str()));
        self.requests[handler][method][class(request.status)].fetch_add(1, Relaxed);
        self.durations[handler][method].observe(request.duration);
        self.durations_fine.observe(request.duration);
        let sizes = &self.sizes[handler];
        sizes.count.fetch_add(1, Relaxed);
        sizes.requests.fetch_add(request.num_bytes, Relaxed);
        sizes.answers.fetch_add(request.num_answer_bytes, Relaxed);
    }

    /// Something was refused that had neither a method nor a path.
    pub(crate) fn count_malformed(&self) {
        self.requests[NONE][METHODS.len() - 1][class(400)].fetch_add(1, Relaxed);
    }

    /// Combinations that occurred.
    pub(super) fn write(&self, out: &mut Exposition) {
        self.write_counts(out);
        self.write_durations(out);
        self.write_sizes(out);
    }

    // A family without samples cannot be written: before the first request there is none.
    fn write_counts(&self, out: &mut Exposition) {
        let none = Labels::default();
        let mut counts = Vec::new();
        for (handler, by_method) in HANDLERS.iter().zip(&self.requests) {
            for (method, by_class) in METHODS.iter().zip(by_method) {
                let labels = none.with("handler", *handler).with("method", *method);
                for (class, count) in CLASSES.iter().zip(by_class) {
                    let count = count.load(Relaxed);
                    if count > 0 {
                        counts.push((labels.with("status", *class), number(count)));
                    }
                }
            }
        }
        if !counts.is_empty() {
            let help = "HTTP requests by handler, method and class of status, probes left out.";
            out.counters("http_requests_total", help, counts);
        }
    }

    fn write_durations(&self, out: &mut Exposition) {
        let none = Labels::default();
        let mut durations = Vec::new();
        for (handler, by_method) in HANDLERS.iter().zip(&self.durations) {
            for (method, duration) in METHODS.iter().zip(by_method) {
                if !duration.is_empty() {
                    let labels = none.with("handler", *handler).with("method", *method);
                    durations.push((labels, duration.snapshot()));
                }
            }
        }
        if !durations.is_empty() {
            let help = "From a request's head to the last byte of its answer.";
            out.histograms("http_request_duration_seconds", help, durations);
        }
        let help = "From a request's head to the last byte of its answer, all requests, in finer buckets.";
        let fine = self.durations_fine.snapshot();
        out.histogram("http_request_duration_highr_seconds", help, &none, fine);
    }

    fn write_sizes(&self, out: &mut Exposition) {
        let of_each = |sum: fn(&Sizes) -> &AtomicU64| -> Vec<(Labels, u64, f64)> {
            let seen = HANDLERS.iter().zip(&self.sizes);
            seen.filter_map(|(handler, sizes)| {
                let count = sizes.count.load(Relaxed);
                let labels = Labels::default().with("handler", *handler);
                (count > 0).then(|| (labels, count, number(sum(sizes).load(Relaxed))))
            })
            .collect()
        };
        let requests = of_each(|sizes| &sizes.requests);
        if !requests.is_empty() {
            out.summaries("http_request_size_bytes", "Bodies of HTTP requests.", requests);
            let answers = of_each(|sizes| &sizes.answers);
            out.summaries("http_response_size_bytes", "Bodies of answers.", answers);
        }
    }
}

fn is_counted(path: &str) -> bool {
    !is_probe_or_metrics(path) && !NOT_COUNTED.contains(&path)
}

fn handler(path: &str) -> usize {
    match path.strip_prefix("/v1/models/") {
        Some(_) => index(&HANDLERS, "/v1/models/{id}"),
        None => index(&HANDLERS, path),
    }
}

/// Of `name`, or of the last one.
fn index(names: &[&str], name: &str) -> usize {
    names.iter().position(|known| *known == name).unwrap_or(names.len() - 1)
}

/// Nothing answers 1xx.
fn class(status: u16) -> usize {
    usize::from(status / 100).saturating_sub(2).min(CLASSES.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::{AppState, Limits};

    #[test]
    fn every_path_there_is_has_a_label() {
        let state = AppState::new(Limits::default(), Metrics::new("test"));
        let paths = crate::table(&state).map(|(path, _)| path.replace("{*", "{"));
        for path in paths.iter().filter(|path| is_counted(path)) {
            assert!(HANDLERS.contains(&path.as_str()), "{path}");
        }
    }
}
