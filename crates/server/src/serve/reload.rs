//! Keys and certificates are read again when their files change, and on SIGHUP.

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::tls::Tls;
use crate::state::AppState;

/// How often the files are looked at. Mounted secrets are replaced by swapping links, which no watch on a file sees.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Files, and what to do when they have changed.
struct Source {
    what: &'static str,
    files: Vec<PathBuf>,
    seen: Vec<Option<Stamp>>,
    reload: Box<dyn Fn() -> Result<(), Box<dyn Error>> + Send>,
}

/// Differs when a file was written or replaced: inode, size, seconds and nanoseconds.
type Stamp = (u64, u64, i64, i64);

/// Watches the files there are until the result is dropped. Where there are none, SIGHUP keeps its meaning.
pub(super) fn start(state: &AppState, tls: Option<&Arc<Tls>>) -> io::Result<JoinSet<()>> {
    let mut sources = Vec::new();
    if let Some(file) = state.access.keys.as_ref().and_then(|keys| keys.file()) {
        let state = state.clone();
        let reload = move || match &state.access.keys {
            Some(keys) => keys.reload().map_err(Into::into),
            None => Ok(()),
        };
        let file = file.to_owned();
        sources.push(Source::new("API keys", &[&file], reload));
    }
    if let Some(tls) = tls {
        let reloaded = Arc::clone(tls);
        let reload = move || reloaded.reload().map_err(Into::into);
        sources.push(Source::new("certificate", &tls.files(), reload));
    }
    let mut watching = JoinSet::new();
    if !sources.is_empty() {
        let hangup = signal(SignalKind::hangup())?;
        watching.spawn(watch(sources, hangup));
    }
    Ok(watching)
}

async fn watch(mut sources: Vec<Source>, mut hangup: Signal) {
    loop {
        let is_asked = tokio::select! {
            _ = hangup.recv() => true,
            () = sleep(WATCH_INTERVAL) => false,
        };
        for source in &mut sources {
            source.look(is_asked);
        }
    }
}

impl Source {
    fn new(
        what: &'static str,
        files: &[&Path],
        reload: impl Fn() -> Result<(), Box<dyn Error>> + Send + 'static,
    ) -> Self {
        Self {
            what,
            files: files.iter().map(|&file| file.to_owned()).collect(),
            seen: files.iter().map(|file| stamp(file)).collect(),
            reload: Box::new(reload),
        }
    }

    /// Reloads if something has changed, or if asked to. A few kilobytes: not worth another thread.
    fn look(&mut self, is_asked: bool) {
        let now: Vec<_> = self.files.iter().map(|file| stamp(file)).collect();
        if now == self.seen && !is_asked {
            return;
        }
        self.seen = now;
        match (self.reload)() {
            Ok(()) => tracing::info!(what = self.what, "read again"),
            Err(error) => tracing::error!(
                what = self.what,
                error = &*error,
                "cannot be read again: what was read before stays in use"
            ),
        }
    }
}

fn stamp(file: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(file).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}
