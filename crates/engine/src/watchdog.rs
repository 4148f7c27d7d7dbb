//! Gives up an engine whose executor does not return: a kernel that hangs would hold every request for ever.
//!
//! The engine thread notes when it enters and leaves its executor: two stores a call. A thread of its own looks at the
//! note once in a timeout, and more often only while a call is close to it.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// What the engine thread can be waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// Of [`crate::Executor::launch`].
    Launch,
    /// Of [`crate::Executor::collect`].
    Collect,
}

/// Since when the engine thread is inside its executor.
#[derive(Debug)]
pub(crate) struct StepClock {
    epoch: Instant,
    /// Microseconds after `epoch`, times two, plus 1 for a collect; [`OUTSIDE`].
    entered: AtomicU64,
}

const OUTSIDE: u64 = u64::MAX;

/// A call that takes long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Overdue {
    call: Call,
    limit: Duration,
}

impl StepClock {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            entered: AtomicU64::new(OUTSIDE),
        }
    }

    /// Runs a call of the executor.
    pub(crate) fn time<T>(&self, call: Call, run: impl FnOnce() -> T) -> T {
        let micros = u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(0);
        self.entered
            .store(micros * 2 + u64::from(call == Call::Collect), Release);
        let result = run();
        self.entered.store(OUTSIDE, Release);
        result
    }

    /// The call that is under way, and for how long it has been.
    fn running(&self) -> Option<(Call, Duration)> {
        let entered = self.entered.load(Acquire);
        let call = match entered % 2 {
            0 => Call::Launch,
            _ => Call::Collect,
        };
        let since = Duration::from_micros(entered / 2);
        (entered != OUTSIDE).then(|| (call, self.epoch.elapsed().saturating_sub(since)))
    }

    /// Waits for a call that takes longer than `limit`; `None` when the other end of `engine` is gone before that.
    fn watch(&self, limit: Duration, engine: &Receiver<()>) -> Option<Overdue> {
        loop {
            let wait = match self.running() {
                Some((call, elapsed)) if elapsed >= limit => return Some(Overdue { call, limit }),
                Some((_, elapsed)) => limit - elapsed,
                None => limit,
            };
            match engine.recv_timeout(wait) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
}

/// Calls `give_up` once if a call of the executor takes longer than `limit`, for as long as what it returns is kept.
pub(crate) fn start(
    clock: std::sync::Arc<StepClock>,
    limit: Duration,
    give_up: impl FnOnce(Overdue) + Send + 'static,
) -> std::io::Result<Sender<()>> {
    let (alive, engine) = channel();
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
        if let Some(overdue) = clock.watch(limit, &engine) {
            give_up(overdue);
        }
    })?;
    Ok(alive)
}

impl fmt::Display for Overdue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.call {
            Call::Launch => "launching a step",
            Call::Collect => "waiting for a step",
        };
        let limit = self.limit;
        write!(
            f,
            "{what} took longer than the step timeout of {limit:?}: the device hangs, or the timeout is too short for it"
        )
    }
}
