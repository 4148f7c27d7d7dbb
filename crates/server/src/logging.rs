//! Log lines on stderr: text for people, one JSON object a line for machines.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::cli::LogFormat;
use crate::config::LogConfig;

/// Starts logging for the whole process. A second call changes nothing.
pub fn init(config: &LogConfig) {
    let filter = EnvFilter::new(&config.filter);
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_timer(SystemTime);
    // An error only says that another subscriber is set already, as in tests that share a process.
    let _ = match config.format {
        LogFormat::Text => builder
            .with_ansi(io::stderr().is_terminal())
            .with_target(false)
            .try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_span_list(false).try_init(),
    };
}

/// Prints an error and all its causes: one a line, or with `{:#}` on one line.
#[derive(Debug)]
pub struct CauseChain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for CauseChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            match f.alternate() {
                true => write!(f, ": {}", text.trim_end().replace('\n', " "))?,
                // Multi-line errors (a TOML excerpt, a list of faulty tensors) stay below their line.
                false => write!(f, "\n  caused by: {}", text.trim_end().replace('\n', "\n    "))?,
            }
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_listed_one_a_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot serve")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::other("disk\non fire"));
        assert_eq!(
            CauseChain(&error).to_string(),
            "cannot serve\n  caused by: disk\n    on fire"
        );
    }
}
