//! What a sequence may say, decided outside of the engine: a [`TokenConstraint`] names the tokens that may come next.
//!
//! A mask depends on the token before it, so a constrained sequence never runs ahead of a token that was not read. Masks
//! are computed by a few threads of their own while the device works; the engine waits for them, but not for long.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{RequestId, TokenId};

/// Allowed tokens: bit `t % 32` of word `t / 32` stands for token `t`; as many words as hold the vocabulary.
pub type TokenMask = Arc<[u32]>;

/// Threads that compute masks: at 50 us a mask, two keep 256 sequences within the shortest step of a large model.
const NUM_MASK_THREADS: usize = 2;

/// A step waits this long for masks. Sequences whose masks take longer sit that step out, so that an expensive grammar
/// slows nobody else down by more than this a step.
pub(crate) const MASK_PATIENCE: Duration = Duration::from_millis(2);

/// Holds one sequence to a form, token by token.
pub trait TokenConstraint: fmt::Debug + Send {
    /// Takes in the token that was generated, one of those last allowed.
    ///
    /// # Errors
    /// The constraint cannot go on; the request fails.
    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError>;

    /// The tokens that may come next, at least one: a stop token where the form may end here. The constraint is dropped
    /// once its answer holds for all that follows.
    ///
    /// # Errors
    /// The constraint cannot go on; the request fails.
    fn allowed_tokens(&mut self) -> Result<Allowed, ConstraintError>;

    /// Another one in the same state that goes on by itself.
    fn fork(&self) -> Box<dyn TokenConstraint>;
}

/// Which tokens may come.
#[derive(Debug, Clone)]
pub enum Allowed {
    /// Anything, from now on.
    Anything,
    /// Tokens of the mask, from now on. Nothing has to be read before the next one is sampled.
    Always(TokenMask),
    /// Tokens of the mask; what comes after depends on which.
    Next(TokenMask),
}

impl Allowed {
    /// The mask of the next token, if there is one.
    #[must_use]
    pub fn mask(&self) -> Option<&TokenMask> {
        match self {
            Self::Anything => None,
            Self::Always(mask) | Self::Next(mask) => Some(mask),
        }
    }
}

/// Why a constraint cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConstraintError {
    /// It says why.
    #[error("the constraint cannot be followed any further")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing may come next, not even an end.
    #[error("the constraint allows no token")]
    NoToken,
    /// It panicked.
    #[error("the constraint panicked")]
    Panicked,
}

impl Clone for Box<dyn TokenConstraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// A mask to compute, perhaps after taking a token in.
#[derive(Debug)]
pub struct MaskJob {
    /// For whom.
    pub id: RequestId,
    /// Comes back with the mask.
    pub constraint: Box<dyn TokenConstraint>,
    /// The newest token; `None` before the first.
    pub token: Option<TokenId>,
}

/// What may come, and the constraint that said so.
pub type MaskOutcome = Result<(Box<dyn TokenConstraint>, Allowed), ConstraintError>;

impl MaskJob {
    /// Computes the mask.
    ///
    /// # Errors
    /// The constraint failed or allows nothing.
    pub fn run(self) -> MaskOutcome {
        let Self {
            mut constraint, token, ..
        } = self;
        let compute = || {
            if let Some(token) = token {
                constraint.advance(token)?;
            }
            let allowed = constraint.allowed_tokens()?;
            if allowed.mask().is_some_and(|mask| mask.iter().all(|word| *word == 0)) {
                return Err(ConstraintError::NoToken);
            }
            Ok((constraint, allowed))
        };
        catch_unwind(AssertUnwindSafe(compute)).unwrap_or(Err(ConstraintError::Panicked))
    }
}

/// Whether `mask` allows no token but those of `banned`.
pub(crate) fn allows_only(mask: &[u32], banned: &[TokenId]) -> bool {
    let is_banned = |token: u32| banned.contains(&token);
    mask.iter().zip(0_u32..).all(|(&word, index)| {
        let mut left = word;
        while left != 0 && is_banned(index * 32 + left.trailing_zeros()) {
            left &= left - 1;
        }
        left == 0
    })
}

/// Threads that compute masks. They start with the first job.
#[derive(Debug)]
pub(crate) struct MaskPool {
    /// Taken when the pool is dropped, which ends the threads.
    jobs: Option<mpsc::Sender<MaskJob>>,
    unclaimed: Arc<Mutex<mpsc::Receiver<MaskJob>>>,
    results: mpsc::Receiver<(RequestId, MaskOutcome)>,
    finished: mpsc::Sender<(RequestId, MaskOutcome)>,
    threads: Vec<JoinHandle<()>>,
    /// Jobs that were submitted and have not come back: at most one a sequence.
    num_outstanding: usize,
}

impl MaskPool {
    pub(crate) fn new() -> Self {
        let (jobs, unclaimed) = mpsc::channel();
        let (finished, results) = mpsc::channel();
        Self {
            jobs: Some(jobs),
            unclaimed: Arc::new(Mutex::new(unclaimed)),
            results,
            finished,
            threads: Vec::new(),
            num_outstanding: 0,
        }
    }

    pub(crate) fn num_outstanding(&self) -> usize {
        self.num_outstanding
    }

    pub(crate) fn submit(&mut self, job: MaskJob) {
        if self.threads.is_empty() {
            self.start();
        }
        let Some(jobs) = self.jobs.as_ref().filter(|_| !self.threads.is_empty()) else {
            return self.run_here(job);
        };
        match jobs.send(job) {
            Ok(()) => self.num_outstanding += 1,
            Err(mpsc::SendError(job)) => self.run_here(job),
        }
    }

    /// Hands out what was computed, waiting for what was not, but no longer than [`MASK_PATIENCE`].
    pub(crate) fn take(&mut self, mut each: impl FnMut(RequestId, MaskOutcome)) {
        if self.num_outstanding == 0 {
            return;
        }
        let until = Instant::now() + MASK_PATIENCE;
        while self.num_outstanding > 0 {
            let left = until.saturating_duration_since(Instant::now());
            let Ok((id, outcome)) = self.results.recv_timeout(left) else {
                return;
            };
            self.num_outstanding -= 1;
            each(id, outcome);
        }
    }

    fn start(&mut self) {
        for _ in 0..NUM_MASK_THREADS {
            let (unclaimed, finished) = (Arc::clone(&self.unclaimed), self.finished.clone());
            let thread = std::thread::Builder::new().name("masks".to_owned());
            match thread.spawn(move || work(&unclaimed, &finished)) {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "no thread for masks"),
            }
        }
    }

    /// There are no threads: slower, not wrong.
    fn run_here(&mut self, job: MaskJob) {
        let id = job.id;
        self.num_outstanding += usize::from(self.finished.send((id, job.run())).is_ok());
    }
}

impl Drop for MaskPool {
    fn drop(&mut self) {
        self.jobs = None;
        // Nobody waits for what is left: only masks that are being computed are waited for.
        while self
            .unclaimed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_recv()
            .is_ok()
        {}
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread for masks panicked");
            }
        }
    }
}

fn work(unclaimed: &Mutex<mpsc::Receiver<MaskJob>>, finished: &mpsc::Sender<(RequestId, MaskOutcome)>) {
    loop {
        let job = unclaimed.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        let id = job.id;
        if finished.send((id, job.run())).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its mask is computed once the gate is dropped. Tells when it begins, and when it ends with or without it.
    #[derive(Debug)]
    struct Held {
        begun: mpsc::Sender<()>,
        ended: mpsc::Sender<()>,
        gate: Arc<Mutex<mpsc::Receiver<()>>>,
    }

    impl TokenConstraint for Held {
        fn advance(&mut self, _: TokenId) -> Result<(), ConstraintError> {
            Ok(())
        }

        fn allowed_tokens(&mut self) -> Result<Allowed, ConstraintError> {
            self.begun.send(()).unwrap();
            assert!(self.gate.lock().unwrap().recv().is_err());
            Ok(Allowed::Anything)
        }

        fn fork(&self) -> Box<dyn TokenConstraint> {
            unreachable!("nobody forks it")
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            // Nobody listens any more to those that were computed.
            let _ = self.ended.send(());
        }
    }

    #[test]
    fn a_pool_that_is_dropped_leaves_its_jobs_undone() {
        const NUM_JOBS: usize = 200;
        let (begun, beginnings) = mpsc::channel();
        let (ended, ends) = mpsc::channel();
        let (open, gate) = mpsc::channel();
        let gate = Arc::new(Mutex::new(gate));
        let mut pool = MaskPool::new();
        for id in 0..NUM_JOBS {
            let held = Held {
                begun: begun.clone(),
                ended: ended.clone(),
                gate: Arc::clone(&gate),
            };
            pool.submit(MaskJob {
                id: RequestId(id as u64),
                constraint: Box::new(held),
                token: None,
            });
        }
        for _ in 0..NUM_MASK_THREADS {
            beginnings.recv().unwrap();
        }
        // The threads are held up while all other jobs are thrown away. Where they are not, it has to end all the same.
        let opening = std::thread::spawn(move || {
            let is_thrown_away = |_: &usize| ends.recv_timeout(Duration::from_secs(60)).is_ok();
            let num_thrown_away = (NUM_MASK_THREADS..NUM_JOBS).take_while(is_thrown_away).count();
            drop(open);
            num_thrown_away
        });
        drop(pool);
        assert_eq!(opening.join().unwrap(), NUM_JOBS - NUM_MASK_THREADS);
        assert_eq!(beginnings.try_iter().count(), 0, "masks that nobody waits for");
    }

    #[test]
    fn a_mask_of_banned_tokens_alone_is_recognised() {
        let mask = [1 << 1, 0, 1 << 31 | 1];
        assert!(allows_only(&mask, &[1, 64, 95]));
        assert!(allows_only(&mask, &[95, 7, 64, 1]));
        assert!(!allows_only(&mask, &[1, 64]));
        assert!(!allows_only(&mask, &[64, 95]));
        assert!(allows_only(&[0], &[]));
    }
}
