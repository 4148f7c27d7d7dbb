//! A scrape's families. They are built at the scrape rather than registered: most values are the engine's own counters,
//! and many appear under two names.

use prometheus::TextEncoder;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType, Summary};

/// What all samples of a metric carry, in this order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Labels(Vec<LabelPair>);

impl Labels {
    /// These and one more.
    pub(crate) fn with(&self, name: &str, value: impl Into<String>) -> Self {
        let mut pair = LabelPair::default();
        pair.set_name(name.to_owned());
        pair.set_value(value.into());
        let mut pairs = self.0.clone();
        pairs.push(pair);
        Self(pairs)
    }
}

/// The families of one scrape, in the order they appear.
#[derive(Debug, Default)]
pub(crate) struct Exposition {
    families: Vec<MetricFamily>,
}

impl Exposition {
    /// A family of gauges; it may not be empty.
    pub(crate) fn gauges(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let metrics = samples.into_iter().map(|(labels, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut metric = Metric::from_gauge(gauge);
            metric.set_label(labels.0);
            metric
        });
        self.family(name, MetricType::GAUGE, help, metrics.collect());
    }

    /// A family of one gauge.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, labels: &Labels, value: f64) {
        self.gauges(name, help, [(labels.clone(), value)]);
    }

    /// A family of counters; it may not be empty.
    pub(crate) fn counters(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, f64)>) {
        let metrics = samples.into_iter().map(|(labels, value)| {
            let mut counter = Counter::default();
            counter.set_value(value);
            let mut metric = Metric::from_label(labels.0);
            metric.set_counter(counter);
            metric
        });
        self.family(name, MetricType::COUNTER, help, metrics.collect());
    }

    /// A family of one counter.
    pub(crate) fn counter(&mut self, name: &str, help: &str, labels: &Labels, value: f64) {
        self.counters(name, help, [(labels.clone(), value)]);
    }

    /// A family of histograms; it may not be empty.
    pub(crate) fn histograms(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, Histogram)>,
    ) {
        let metrics = samples.into_iter().map(|(labels, histogram)| {
            let mut metric = Metric::from_label(labels.0);
            metric.set_histogram(histogram);
            metric
        });
        self.family(name, MetricType::HISTOGRAM, help, metrics.collect());
    }

    /// A family of one histogram.
    pub(crate) fn histogram(&mut self, name: &str, help: &str, labels: &Labels, histogram: Histogram) {
        self.histograms(name, help, [(labels.clone(), histogram)]);
    }

    /// A family of summaries without quantiles, of count and sum each; it may not be empty.
    pub(crate) fn summaries(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, u64, f64)>) {
        let metrics = samples.into_iter().map(|(labels, count, sum)| {
            let mut summary = Summary::default();
            summary.set_sample_count(count);
            summary.set_sample_sum(sum);
            let mut metric = Metric::from_label(labels.0);
            metric.set_summary(summary);
            metric
        });
        self.family(name, MetricType::SUMMARY, help, metrics.collect());
    }

    fn family(&mut self, name: &str, kind: MetricType, help: &str, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.families.push(family);
    }

    /// Prometheus' text format, into a buffer of `capacity` bytes that grows at need. A family without samples is an
    /// error.
    pub(crate) fn into_text(self, capacity: usize) -> prometheus::Result<String> {
        let mut text = String::with_capacity(capacity);
        TextEncoder::new().encode_utf8(&self.families, &mut text)?;
        Ok(text)
    }
}

/// A histogram of `counts` that are not cumulative and one more than `bounds`, for what is above the last.
pub(crate) fn histogram(bounds: impl IntoIterator<Item = f64>, counts: &[u64], sum: f64) -> Histogram {
    let mut total = 0;
    let buckets = bounds.into_iter().zip(counts).map(|(bound, count)| {
        total += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(total);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(counts.iter().sum());
    histogram.set_sample_sum(sum);
    histogram
}

/// A count as Prometheus has it.
#[expect(clippy::cast_precision_loss, reason = "Prometheus values are f64")]
pub(crate) fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_values_are_escaped_and_keep_their_order() {
        let mut out = Exposition::default();
        let labels = Labels::default().with("b", "a\\\"\n").with("a", "1");
        out.gauge("x", "Help.", &labels, 0.5);
        out.counter("y_total", "Help.", &Labels::default(), number(1 << 53));
        let expected = "# HELP x Help.\n# TYPE x gauge\nx{b=\"a\\\\\\\"\\n\",a=\"1\"} 0.5\n\
                        # HELP y_total Help.\n# TYPE y_total counter\ny_total 9007199254740992\n";
        assert_eq!(out.into_text(0).unwrap(), expected);
    }

    #[test]
    fn a_family_without_samples_is_an_error() {
        let mut out = Exposition::default();
        out.gauges("x", "Help.", []);
        assert!(out.into_text(0).is_err());
    }
}
