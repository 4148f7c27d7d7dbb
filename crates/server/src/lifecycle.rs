//! Where the process stands between exec and exit, readable from any probe without a lock that work could hold.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What `/ready` answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Files are being fetched from the hub.
    Downloading,
    /// The checkpoint is being checked and its weights uploaded.
    LoadingWeights,
    /// A first forward pass proves that the loaded model gives finite logits.
    WarmingUp,
    /// Requests are served.
    Ready,
    /// The end has begun: `/ready` says so, and requests are served until the engine takes no more.
    Draining,
    /// The engine died or the model could not be loaded.
    Failed,
}

impl Phase {
    /// All phases.
    pub(crate) const ALL: [Self; 6] = [
        Self::Downloading,
        Self::LoadingWeights,
        Self::WarmingUp,
        Self::Ready,
        Self::Draining,
        Self::Failed,
    ];

    /// As `/ready` spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Downloading => "downloading",
            Self::LoadingWeights => "loading_weights",
            Self::WarmingUp => "warming_up",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failed => "failed",
        }
    }
}

/// The current [`Phase`] and how far it is.
#[derive(Debug)]
pub struct Lifecycle {
    phase: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
    epoch: Instant,
    /// Milliseconds after `epoch` by which the phase must go on; [`NEVER`].
    overdue_at: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(Phase::LoadingWeights as u8),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            epoch: Instant::now(),
            overdue_at: AtomicU64::new(NEVER),
        }
    }
}

impl Lifecycle {
    /// The current phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Acquire))]
    }

    /// Enters a phase; its progress starts at 0, and it may take its time.
    pub fn enter(&self, phase: Phase) {
        self.expect_progress_within(None);
        self.done.store(0, Ordering::Relaxed);
        self.total.store(0, Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// From now on the phase must go on, or expect something else, within this time; `None`: it may take its time.
    pub fn expect_progress_within(&self, limit: Option<Duration>) {
        let at = limit.and_then(|limit| u64::try_from((self.epoch.elapsed() + limit).as_millis()).ok());
        self.overdue_at.store(at.unwrap_or(NEVER), Ordering::Release);
    }

    /// Whether the progress that was expected did not come in time.
    #[must_use]
    pub fn is_overdue(&self) -> bool {
        let at = self.overdue_at.load(Ordering::Acquire);
        at != NEVER && self.epoch.elapsed() > Duration::from_millis(at)
    }

    /// Bytes done of the phase's total.
    pub fn set_progress(&self, done_bytes: u64, total_bytes: u64) {
        self.total.store(total_bytes, Ordering::Relaxed);
        self.done.store(done_bytes, Ordering::Relaxed);
    }

    /// Share of the phase that is done, 0 to 1; `None` where it is not known.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "a progress share needs no more than f64 gives"
    )]
    pub fn progress(&self) -> Option<f64> {
        let total = self.total.load(Ordering::Relaxed);
        (total > 0).then(|| (self.done.load(Ordering::Relaxed) as f64 / total as f64).min(1.0))
    }
}
