//! CPU time of one thread, as others read it while the thread works.

use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::param::clock_ticks_per_second;
use rustix::thread::gettid;

/// How long one thread has computed. How long it took by the clock on the wall says on a busy machine what others had to do.
#[derive(Debug, Default)]
pub struct ThreadClock {
    thread: OnceLock<Thread>,
    /// A thread that has ended can't be looked up, and another may have its number.
    total: OnceLock<Duration>,
}

#[derive(Debug)]
struct Thread {
    id: i32,
    since: Instant,
}

impl ThreadClock {
    /// Does `work`, and runs meanwhile: once, and as time of the thread that this is called on.
    pub(crate) fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let id = gettid().as_raw_nonzero().get();
        let thread = self.thread.get_or_init(|| Thread {
            id,
            since: Instant::now(),
        });
        let done = work();
        self.total.get_or_init(|| thread.used());
        done
    }

    /// CPU time so far, to 10 ms: zero before the work has begun, all of it since it ended.
    #[must_use]
    pub fn used(&self) -> Duration {
        let Some(thread) = self.thread.get() else {
            return Duration::ZERO;
        };
        // Looked at second: what was looked up may be another thread's by then.
        let used = thread.used();
        self.total.get().copied().unwrap_or(used)
    }
}

impl Thread {
    /// Where the system does not say, all the time since the start: too much rather than no end.
    fn used(&self) -> Duration {
        self.cpu_time().unwrap_or_else(|| self.since.elapsed())
    }

    fn cpu_time(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/self/task/{}/stat", self.id)).ok()?;
        // The second field is the thread's name in parentheses and may hold anything.
        let fields = stat.rsplit_once(')')?.1;
        let ticks = fields.split_ascii_whitespace().skip(11).take(2);
        let ticks = ticks.map(str::parse::<u64>).sum::<Result<u64, _>>().ok()?;
        Some(Duration::from_millis(
            ticks.checked_mul(1000)? / clock_ticks_per_second(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    /// Computes until this thread's own count says so.
    fn compute(clock: &ThreadClock, at_least: Duration) {
        while clock.used() < at_least {
            (0..1000_u64).for_each(|number| {
                black_box(number);
            });
        }
    }

    #[test]
    fn work_counts_and_waiting_does_not() {
        let (works, waits) = (ThreadClock::default(), ThreadClock::default());
        assert_eq!(works.used(), Duration::ZERO, "nothing has begun");
        thread::scope(|scope| {
            let (begun, has_begun) = channel();
            let (end, ended) = channel::<()>();
            let waits = &waits;
            scope.spawn(move || {
                waits.time(|| {
                    begun.send(()).unwrap();
                    ended.recv().unwrap();
                });
            });
            has_begun.recv().unwrap();
            works.time(|| compute(&works, Duration::from_millis(200)));
            // It has been there for 200 ms and more.
            assert!(waits.used() <= Duration::from_millis(50), "{:?}", waits.used());
            end.send(()).unwrap();
        });
        assert!(works.used() >= Duration::from_millis(200));
        assert!(waits.used() <= Duration::from_millis(50), "of a thread that is no more");
    }

    #[test]
    fn others_see_the_time_while_the_work_goes_on() {
        let clock = ThreadClock::default();
        thread::scope(|scope| {
            let (seen, is_seen) = channel();
            let clock = &clock;
            let worker = scope.spawn(move || {
                clock.time(|| {
                    while is_seen.try_recv().is_err() {
                        black_box(0);
                    }
                });
            });
            while clock.used() < Duration::from_millis(30) {
                assert!(!worker.is_finished());
                thread::yield_now();
            }
            seen.send(()).unwrap();
        });
    }
}
