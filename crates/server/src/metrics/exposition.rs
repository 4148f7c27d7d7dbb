//! Prometheus' text format, written by hand: most values are the engine's own counters, read at the scrape, and many
//! appear under two names. A registry would want a collector for each.

use std::fmt::{Display, Write};

/// The text of one scrape.
#[derive(Debug, Default)]
pub(crate) struct Exposition {
    text: String,
}

impl Exposition {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self {
            text: String::with_capacity(bytes),
        }
    }

    /// Begins a family: all its samples follow at once.
    pub(crate) fn family(&mut self, name: &str, kind: &str, help: &str) -> &mut String {
        let _infallible = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        &mut self.text
    }

    /// A family of one sample; `labels` come without braces and may be empty.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, labels: &str, value: impl Display) {
        sample(self.family(name, "gauge", help), name, labels, value);
    }

    /// A family of one sample; `labels` come without braces and may be empty.
    pub(crate) fn counter(&mut self, name: &str, help: &str, labels: &str, value: impl Display) {
        sample(self.family(name, "counter", help), name, labels, value);
    }

    pub(crate) fn into_text(self) -> String {
        self.text
    }
}

/// One line.
pub(crate) fn sample(out: &mut String, name: &str, labels: &str, value: impl Display) {
    let _infallible = match labels.is_empty() {
        true => writeln!(out, "{name} {value}"),
        false => writeln!(out, "{name}{{{labels}}} {value}"),
    };
}

/// A label's value with its quotes.
pub(crate) fn quoted(value: &str) -> String {
    format!(
        "\"{}\"",
        value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
    )
}
