//! Histograms that cost an observation two relaxed additions.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Nanoseconds in a second.
const NANOS: f64 = 1e9;

/// Durations by upper bounds in seconds.
#[derive(Debug)]
pub(crate) struct DurationHistogram {
    bounds: &'static [f64],
    /// One more than bounds, for what is above the last; not cumulative.
    counts: Box<[AtomicU64]>,
    sum_nanos: AtomicU64,
}

/// Counts (of tokens, of answers) by upper bounds.
#[derive(Debug)]
pub(crate) struct CountHistogram {
    bounds: &'static [u64],
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

fn zeros(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

impl DurationHistogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: zeros(bounds.len() + 1),
            sum_nanos: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, value: Duration) {
        let seconds = value.as_secs_f64();
        let bucket = self.bounds.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_nanos
            .fetch_add(u64::try_from(value.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are f64")]
    pub(crate) fn write(&self, out: &mut String, name: &str, labels: &str) {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let sum = self.sum_nanos.load(Relaxed) as f64 / NANOS;
        write_histogram(out, name, labels, self.bounds, &counts, sum);
    }
}

impl CountHistogram {
    pub(crate) fn new(bounds: &'static [u64]) -> Self {
        Self {
            bounds,
            counts: zeros(bounds.len() + 1),
            sum: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, value: u64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    pub(crate) fn write(&self, out: &mut String, name: &str, labels: &str) {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        write_histogram(out, name, labels, self.bounds, &counts, self.sum.load(Relaxed));
    }
}

/// Writes a histogram's samples. `counts` are not cumulative and one more than `bounds`; `labels` come without braces.
pub(crate) fn write_histogram<B: std::fmt::Display, S: std::fmt::Display>(
    out: &mut String,
    name: &str,
    labels: &str,
    bounds: &[B],
    counts: &[u64],
    sum: S,
) {
    let mut total = 0;
    for (bound, count) in bounds.iter().zip(counts) {
        total += count;
        let _infallible = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {total}");
    }
    total += counts.last().copied().unwrap_or(0);
    let _infallible = writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}");
    let _infallible = writeln!(out, "{name}_sum{{{labels}}} {sum}");
    let _infallible = writeln!(out, "{name}_count{{{labels}}} {total}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_include_their_bound() {
        let histogram = DurationHistogram::new(&[0.001, 0.01]);
        for millis in [1, 2, 10, 11] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut out = String::new();
        histogram.write(&mut out, "x", "a=\"b\"");
        let expected = "x_bucket{a=\"b\",le=\"0.001\"} 1\nx_bucket{a=\"b\",le=\"0.01\"} 3\n\
                        x_bucket{a=\"b\",le=\"+Inf\"} 4\nx_sum{a=\"b\"} 0.024\nx_count{a=\"b\"} 4\n";
        assert_eq!(out, expected);
    }
}
