//! How far a long phase is: a bar on a terminal, a log line now and then elsewhere, and the number `/ready` answers.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::lifecycle::Phase;
use crate::state::AppState;
use crate::units::ByteSize;

const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of one phase. The bar goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    state: AppState,
    phase: Phase,
    bar: Option<ProgressBar>,
    next_log: Cell<Instant>,
}

impl Progress {
    /// Enters `phase`.
    #[must_use]
    pub(crate) fn start(state: &AppState, phase: Phase) -> Self {
        state.lifecycle.enter(phase);
        let bar = std::io::stderr().is_terminal().then(|| {
            let template = "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            ProgressBar::no_length().with_style(style).with_prefix(phase.as_str())
        });
        Self {
            state: state.clone(),
            phase,
            bar,
            next_log: Cell::new(Instant::now() + LOG_INTERVAL),
        }
    }

    /// Reports bytes done of bytes in all.
    pub(crate) fn set(&self, done_bytes: u64, total_bytes: u64) {
        self.state.lifecycle.set_progress(done_bytes, total_bytes);
        if let Some(bar) = &self.bar {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        } else if Instant::now() >= self.next_log.get() {
            self.next_log.set(Instant::now() + LOG_INTERVAL);
            let (done, total) = (ByteSize(done_bytes), ByteSize(total_bytes));
            tracing::info!(phase = self.phase.as_str(), %done, %total, "in progress");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
