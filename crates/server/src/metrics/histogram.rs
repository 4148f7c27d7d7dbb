//! Histograms that cost an observation two relaxed additions.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use prometheus::proto::Histogram;

use super::exposition::{histogram, number};

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

    /// Nothing was observed.
    pub(crate) fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| count.load(Relaxed) == 0)
    }

    pub(crate) fn snapshot(&self) -> Histogram {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let sum = number(self.sum_nanos.load(Relaxed)) / NANOS;
        histogram(self.bounds.iter().copied(), &counts, sum)
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

    /// With the buckets up to `limit`, above which nothing is observed.
    pub(crate) fn snapshot(&self, limit: u64) -> Histogram {
        let counts: Vec<u64> = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let bounds = self.bounds.iter().copied().take_while(|&bound| bound <= limit);
        histogram(bounds.map(number), &counts, number(self.sum.load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::exposition::{Exposition, Labels};

    #[test]
    fn what_is_above_the_last_bucket_shown_is_in_the_total() {
        let histogram = CountHistogram::new(&[1, 2, 5]);
        for value in [1, 2, 3] {
            histogram.observe(value);
        }
        let mut out = Exposition::default();
        out.histogram("x", "Help.", &Labels::default(), histogram.snapshot(2));
        let expected = "# HELP x Help.\n# TYPE x histogram\n\
                        x_bucket{le=\"1\"} 1\nx_bucket{le=\"2\"} 2\nx_bucket{le=\"+Inf\"} 3\nx_sum 6\nx_count 3\n";
        assert_eq!(out.into_text(0).unwrap(), expected);
    }

    #[test]
    fn buckets_are_cumulative_and_include_their_bound() {
        let histogram = DurationHistogram::new(&[0.001, 0.01]);
        for millis in [1, 2, 10, 11] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut out = Exposition::default();
        out.histogram("x", "Help.", &Labels::default().with("a", "b"), histogram.snapshot());
        let expected = "# HELP x Help.\n# TYPE x histogram\n\
                        x_bucket{a=\"b\",le=\"0.001\"} 1\nx_bucket{a=\"b\",le=\"0.01\"} 3\n\
                        x_bucket{a=\"b\",le=\"+Inf\"} 4\nx_sum{a=\"b\"} 0.024\nx_count{a=\"b\"} 4\n";
        assert_eq!(out.into_text(0).unwrap(), expected);
    }
}
