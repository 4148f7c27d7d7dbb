//! Fork/join over a handful of threads that spin briefly between jobs, then park.
//!
//! A decode step of a small model is hundreds of operations of a few microseconds. Waking a parked thread costs more
//! than most of them, so workers stay awake between operations, and whoever submits a job never waits for a worker that
//! has not joined it: with everything claimed, the job closes and late workers find nothing.
#![expect(
    unsafe_code,
    reason = "a job is a borrowed closure that worker threads call while its owner waits"
)]

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for the next job before it parks: longer than the gaps inside a step, far shorter than a
/// person would notice in `top`.
const SPIN: Duration = Duration::from_micros(150);

/// Looks between two readings of the clock.
const SPINS_PER_CLOCK_READ: u32 = 64;

/// Looks before a waiting submitter offers its core to the worker it waits for.
const SPINS_BEFORE_YIELD: u32 = 4096;

// `Shared::state` is `(epoch << EPOCH_SHIFT) | OPEN? | workers inside the job`.
const OPEN: u64 = 1 << 16;
const JOINED: u64 = OPEN - 1;
const EPOCH_SHIFT: u32 = 17;

/// `task(worker, index)`, type-erased and stripped of its lifetime.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize, usize) + Sync),
    num_tasks: usize,
}

struct Shared {
    state: AtomicU64,
    /// Written only while the state is closed with nobody inside, read only by workers inside.
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panicked: AtomicBool,
    shutdown: AtomicBool,
    num_parked: AtomicUsize,
    parked: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only field that is not Sync by itself. `Pool::run` writes it only under `Pool::submit`, with no
// worker inside (see `Closing`); workers read it only after joining, which acquires what `run` released. The pointer in
// it points to a Sync closure that outlives the job, because `run` does not return before every worker has left.
unsafe impl Sync for Shared {}
// SAFETY: as for Sync; nothing in it is tied to a thread.
unsafe impl Send for Shared {}

/// A fixed set of threads; the caller of [`Pool::run`] is one of them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    submit: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("num_threads", &self.num_threads())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `num_threads` threads, the caller's included.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub(crate) fn new(num_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            shutdown: AtomicBool::new(false),
            num_parked: AtomicUsize::new(0),
            parked: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
            submit: Mutex::new(()),
        };
        for worker in 1..num_threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("cpu-{worker}"));
            pool.workers.push(thread.spawn(move || shared.work(worker))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included. Worker numbers are below it.
    pub(crate) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(worker, index)` once for each index below `num_tasks` and returns when all are done. Two calls with
    /// the same `worker` never overlap.
    ///
    /// # Panics
    /// When a task panicked, or when a task calls `run` on its own pool.
    pub(crate) fn run(&self, num_tasks: usize, task: impl Fn(usize, usize) + Sync) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(|index| task(0, index));
            return;
        }
        let _submitting = self.submit.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let erased: *const (dyn Fn(usize, usize) + Sync + '_) = &raw const task;
        // SAFETY: only the lifetime changes; `Closing` keeps `task` borrowed until no worker can call it any more.
        let erased: *const (dyn Fn(usize, usize) + Sync + 'static) = unsafe { std::mem::transmute(erased) };
        // SAFETY: `submit` is held and the state is closed and empty: nobody else touches the cell.
        unsafe {
            *shared.job.get() = Some(Job {
                task: erased,
                num_tasks,
            })
        };
        shared.next_task.store(0, Ordering::Relaxed);
        let closing = Closing(shared);
        let epoch = (shared.state.load(Ordering::Relaxed) >> EPOCH_SHIFT) + 1;
        shared.state.store((epoch << EPOCH_SHIFT) | OPEN, Ordering::SeqCst);
        if shared.num_parked.load(Ordering::SeqCst) > 0 {
            let _parked = shared.parked.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        claim(&shared.next_task, num_tasks, |index| task(0, index));
        drop(closing);
        assert!(
            !shared.panicked.swap(false, Ordering::Relaxed),
            "a worker thread panicked"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        {
            let _parked = self.shared.parked.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            if let Err(panic) = worker.join()
                && !std::thread::panicking()
            {
                resume_unwind(panic);
            }
        }
    }
}

/// Ends a job when dropped, on the way out of a panic too: nobody may join any more, and whoever is inside is waited
/// for.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut spins = 0u32;
        while state & JOINED != 0 {
            spins += 1;
            if spins > SPINS_BEFORE_YIELD {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        while let Some(state) = self.wait_for_job(seen) {
            if self
                .state
                .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            seen = state >> EPOCH_SHIFT;
            // SAFETY: this thread is inside the job, so `run` does not write the cell.
            let job = unsafe { *self.job.get() };
            if let Some(Job { task, num_tasks }) = job {
                // SAFETY: `run` keeps the closure alive until this thread has left the job.
                let task = unsafe { &*task };
                let work = AssertUnwindSafe(|| claim(&self.next_task, num_tasks, |index| task(worker, index)));
                if catch_unwind(work).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The state of an open job other than `seen`, or nothing at shutdown.
    fn wait_for_job(&self, seen: u64) -> Option<u64> {
        let is_new = |state: u64| state & OPEN != 0 && state >> EPOCH_SHIFT != seen;
        let mut since = Instant::now();
        let mut spins = 0u32;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if is_new(state) {
                return Some(state);
            }
            if self.shutdown.load(Ordering::Relaxed) {
                return None;
            }
            spins += 1;
            if spins.is_multiple_of(SPINS_PER_CLOCK_READ) && since.elapsed() > SPIN {
                self.park(is_new);
                since = Instant::now();
            }
            std::hint::spin_loop();
        }
    }

    fn park(&self, is_new: impl Fn(u64) -> bool) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.num_parked.fetch_add(1, Ordering::SeqCst);
        while !is_new(self.state.load(Ordering::SeqCst)) && !self.shutdown.load(Ordering::SeqCst) {
            parked = self.wake.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        self.num_parked.fetch_sub(1, Ordering::SeqCst);
    }
}

fn claim(next_task: &AtomicUsize, num_tasks: usize, task: impl Fn(usize)) {
    loop {
        let index = next_task.fetch_add(1, Ordering::Relaxed);
        if index >= num_tasks {
            return;
        }
        task(index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_number_of_threads() {
        for num_threads in 1..=4 {
            let pool = Pool::new(num_threads).unwrap();
            for num_tasks in [0, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(num_tasks, |worker, index| {
                        assert!(worker < num_threads);
                        counts[index].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn parked_workers_wake_for_the_next_job() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            while pool.shared.num_parked.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            // Neither task ends before both have begun, so a second thread must have come.
            let begun = AtomicUsize::new(0);
            pool.run(2, |_, _| {
                begun.fetch_add(1, Ordering::SeqCst);
                while begun.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panicking_task_panics_the_submitter_and_leaves_the_pool_usable() {
        let pool = Pool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, |_, index| assert!(index != 5, "task failed"))
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, |_, _| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }
}
