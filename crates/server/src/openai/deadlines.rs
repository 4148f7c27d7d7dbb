//! How long a request may wait and take: the shorter of what its client and what the operator wants.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use lapidary_engine::{EngineError, StatsSnapshot};
use tokio::time::timeout_at;

use super::types::GenerationBody;
use crate::error::ApiError;
use crate::lenient::Number;
use crate::state::{Limits, ServedModel};

/// A client's own limits, in seconds; the fields of the body mean the same.
const X_REQUEST_TIMEOUT: &str = "x-request-timeout";
const X_QUEUE_TIMEOUT: &str = "x-queue-timeout";

/// How long a request may wait and take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patience {
    answer: Option<Duration>,
    queue: Option<Duration>,
}

/// When patience ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Deadlines {
    /// For the whole answer.
    pub(crate) answer: Option<Instant>,
    /// For the first step.
    pub(crate) queue: Option<Instant>,
}

impl Patience {
    /// Reads headers and body.
    pub(super) fn new(headers: &HeaderMap, body: &GenerationBody, limits: &Limits) -> Result<Self, ApiError> {
        let shortest = |header, field, typed, limit: Option<Duration>| {
            let asked = [of_header(headers, header)?, of_body(field, typed)?];
            Ok(asked.into_iter().flatten().chain(limit).min())
        };
        Ok(Self {
            answer: shortest(X_REQUEST_TIMEOUT, "timeout", body.timeout, limits.request_timeout)?,
            queue: shortest(
                X_QUEUE_TIMEOUT,
                "queue_timeout",
                body.queue_timeout,
                limits.queue_timeout,
            )?,
        })
    }

    /// Refuses a request whose wait in the queue would be longer than its client or the operator wants: better now than
    /// when it has waited.
    pub(super) fn check_queue(self, model: &ServedModel, limits: &Limits) -> Result<(), ApiError> {
        if limits.allows_priority {
            // It may go before all that wait.
            return Ok(());
        }
        let max_wait = limits.max_queue_wait;
        let Some(limit) = self.queue.into_iter().chain(max_wait).min() else {
            return Ok(());
        };
        let stats = model.engine.stats();
        let wait = stats.queue_wait();
        let is_too_long = match wait {
            Some(wait) => wait > limit,
            // Nobody knows yet. A queue as long as the batch is wide waits about as long as an answer takes.
            None => stats.prompts_wait() > limit || (max_wait.is_some() && stats.num_queued >= stats.num_slots),
        };
        if is_too_long {
            return Err(ApiError::overloaded(stats.num_queued, wait, limit));
        }
        Ok(())
    }

    /// Of a request that came at `arrival`, with all of its body there at `read`: what a client waits for begins with its
    /// request, but it waits in no queue while it sends.
    pub(super) fn from(self, arrival: Instant, read: Instant) -> Deadlines {
        let after = |since: Instant, timeout: Option<Duration>| timeout.and_then(|timeout| since.checked_add(timeout));
        Deadlines {
            answer: after(arrival, self.answer),
            queue: after(read, self.queue),
        }
    }
}

impl Deadlines {
    /// Waits for `work` that comes before the engine's: compiling a grammar may take long on a busy machine. From then on
    /// the engine sees to the deadlines.
    pub(super) async fn bound<T>(
        self,
        work: impl Future<Output = Result<T, ApiError>>,
        stats: impl FnOnce() -> StatsSnapshot,
    ) -> Result<T, ApiError> {
        let answer = self.answer.map(|at| (at, EngineError::DeadlineExceeded));
        let queue = self.queue.map(|at| (at, EngineError::QueueDeadlineExceeded));
        let Some((at, error)) = answer.into_iter().chain(queue).min_by_key(|(at, _)| *at) else {
            return work.await;
        };
        timeout_at(at.into(), work)
            .await
            .unwrap_or_else(|_elapsed| Err(ApiError::failed(&error, &stats())))
    }
}

fn of_header(headers: &HeaderMap, name: &'static str) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    match seconds.and_then(timeout) {
        Some(timeout) => Ok(Some(timeout)),
        None => Err(ApiError::invalid(
            name,
            format!("The header {name} must be a positive number of seconds."),
        )),
    }
}

fn of_body(field: &'static str, typed: Option<Number>) -> Result<Option<Duration>, ApiError> {
    let Some(Number(seconds)) = typed else { return Ok(None) };
    match timeout(seconds) {
        Some(timeout) => Ok(Some(timeout)),
        None => Err(ApiError::invalid(
            field,
            format!("{field} must be a positive number of seconds, got {seconds:?}."),
        )),
    }
}

fn timeout(seconds: f64) -> Option<Duration> {
    let timeout = Duration::try_from_secs_f64(seconds).ok();
    timeout.filter(|timeout| !timeout.is_zero())
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_comes_before_the_engine_is_bound_by_the_nearest_deadline() {
        let now = Instant::now();
        let later = now.checked_add(Duration::from_secs(3600));
        for (answer, queue, status, code) in [
            (Some(now), None, 408, "request_timeout"),
            (None, Some(now), 429, "queue_timeout"),
            (Some(now), later, 408, "request_timeout"),
            (later, Some(now), 429, "queue_timeout"),
        ] {
            let bound = Deadlines { answer, queue }.bound(pending::<Result<(), _>>(), StatsSnapshot::default);
            let error = bound.await.unwrap_err();
            assert_eq!((error.status().as_u16(), error.code()), (status, Some(code)));
        }
    }

    #[tokio::test]
    async fn work_that_is_done_is_the_engines_to_refuse() {
        for deadline in [None, Some(Instant::now())] {
            let deadlines = Deadlines {
                answer: deadline,
                queue: deadline,
            };
            let done = deadlines.bound(ready(Ok(7)), StatsSnapshot::default).await;
            assert_eq!(done.unwrap(), 7);
        }
    }
}
