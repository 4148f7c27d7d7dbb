//! Figures of a run: what `vllm bench serve` reports, by the same names.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::client::{ClientError, Timeline};
use super::{BenchArgs, BenchError};

/// Distinct errors shown to a person.
const SHOWN_ERRORS: usize = 5;

/// What became of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All of its answer came.
    Answered(Answer),
    /// Why it did not.
    Failed(String),
}

/// An answer's figures.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) to_first_token: Duration,
    pub(super) total: Duration,
    pub(super) between: Vec<Duration>,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
}

impl From<Result<Timeline, ClientError>> for Outcome {
    fn from(answered: Result<Timeline, ClientError>) -> Self {
        match answered {
            Ok(timeline) => {
                // A server that does not count is taken to send a token at a time.
                let num_pieces = timeline.between.len() as u64 + 1;
                Self::Answered(Answer {
                    to_first_token: timeline.to_first_token,
                    total: timeline.total,
                    prompt_tokens: timeline.usage.map_or(0, |usage| usage.prompt_tokens),
                    output_tokens: timeline.usage.map_or(num_pieces, |usage| usage.completion_tokens),
                    between: timeline.between,
                })
            }
            Err(error) => Self::Failed(format!("{:#}", crate::logging::CauseChain(&error))),
        }
    }
}

impl Answer {
    /// The time of a token after the first; `None` if there is none.
    #[expect(clippy::cast_precision_loss, reason = "token counts are small")]
    fn per_output_token(&self) -> Option<Duration> {
        let later = self.output_tokens.checked_sub(1).filter(|later| *later > 0)?;
        Some((self.total - self.to_first_token).div_f64(later as f64))
    }
}

/// What a good request keeps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Goals {
    to_first_token: Option<Duration>,
    per_output_token: Option<Duration>,
    total: Option<Duration>,
}

impl Goals {
    /// From `ttft:500` and the like, in milliseconds.
    pub(super) fn parse(typed: &[String]) -> Result<Self, BenchError> {
        let mut goals = Self::default();
        for goal in typed {
            let wrong = || BenchError::Goal(goal.clone());
            let (name, ms) = goal.split_once(':').ok_or_else(wrong)?;
            let ms: f64 = ms.parse().map_err(|_| wrong())?;
            let limit = Duration::try_from_secs_f64(ms / 1e3).map_err(|_| wrong())?;
            *match name {
                "ttft" => &mut goals.to_first_token,
                "tpot" => &mut goals.per_output_token,
                "e2el" => &mut goals.total,
                _ => return Err(wrong()),
            } = Some(limit);
        }
        Ok(goals)
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn are_met(&self, answer: &Answer) -> bool {
        let keeps = |limit: Option<Duration>, time: Option<Duration>| limit.is_none_or(|limit| time <= Some(limit));
        keeps(self.to_first_token, Some(answer.to_first_token))
            && keeps(self.per_output_token, answer.per_output_token())
            && keeps(self.total, Some(answer.total))
    }
}

/// What was measured.
#[derive(Debug)]
pub struct Report {
    settings: Map<String, Value>,
    duration: Duration,
    answers: Vec<Answer>,
    errors: Vec<String>,
    /// Answers that met all goals; `None` without goals.
    num_good: Option<u64>,
    percentiles: Vec<f64>,
}

/// The times of all answers of one kind.
struct Times {
    /// In the result's names.
    key: &'static str,
    title: &'static str,
    /// Ascending, in milliseconds.
    values: Vec<f64>,
}

impl Report {
    pub(super) fn new(
        args: &BenchArgs,
        model: &str,
        goals: &Goals,
        duration: Duration,
        outcomes: Vec<Outcome>,
    ) -> Self {
        let (mut answers, mut errors) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Outcome::Answered(answer) => answers.push(answer),
                Outcome::Failed(error) => errors.push(error),
            }
        }
        let num_good = answers.iter().filter(|answer| goals.are_met(answer)).count() as u64;
        let rate = match args.request_rate.is_finite() {
            true => json!(args.request_rate),
            false => json!("inf"),
        };
        let settings = [
            ("date", json!(crate::unix_time())),
            ("backend", json!("openai")),
            ("endpoint", json!(args.endpoint)),
            ("model_id", json!(model)),
            ("num_prompts", json!(args.num_prompts)),
            ("request_rate", rate),
            ("max_concurrency", json!(args.max_concurrency)),
            ("seed", json!(args.seed)),
        ];
        Self {
            settings: settings
                .map(|(key, value)| (key.to_owned(), value))
                .into_iter()
                .collect(),
            duration,
            answers,
            errors,
            num_good: (!goals.is_none()).then_some(num_good),
            percentiles: args.metric_percentiles.clone(),
        }
    }

    /// Whether no request failed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty()
    }

    fn total(&self, of: impl Fn(&Answer) -> u64) -> u64 {
        self.answers.iter().map(of).sum()
    }

    fn times(&self) -> [Times; 4] {
        let times = |key, title, values: Vec<Duration>| {
            let mut values: Vec<_> = values.into_iter().map(|time| time.as_secs_f64() * 1e3).collect();
            values.sort_unstable_by(f64::total_cmp);
            Times { key, title, values }
        };
        let all = |of: fn(&Answer) -> Duration| self.answers.iter().map(of).collect();
        [
            times("ttft", "Time to first token", all(|answer| answer.to_first_token)),
            times(
                "tpot",
                "Time per output token (after the first)",
                self.answers.iter().filter_map(Answer::per_output_token).collect(),
            ),
            times(
                "itl",
                "Time between tokens",
                self.answers.iter().flat_map(|answer| answer.between.clone()).collect(),
            ),
            times("e2el", "Time of a request", all(|answer| answer.total)),
        ]
    }

    /// The result file; with every request's figures if it is to be detailed.
    #[must_use]
    pub fn to_json(&self, is_detailed: bool) -> Value {
        let (input, output) = (
            self.total(|answer| answer.prompt_tokens),
            self.total(|answer| answer.output_tokens),
        );
        let mut result = self.settings.clone();
        let mut put = |key: &str, value: Value| result.insert(key.to_owned(), value);
        put("duration", json!(self.duration.as_secs_f64()));
        put("completed", json!(self.answers.len()));
        put("failed", json!(self.errors.len()));
        put("total_input_tokens", json!(input));
        put("total_output_tokens", json!(output));
        put(
            "request_throughput",
            json!(rate(self.answers.len() as u64, self.duration)),
        );
        put(
            "request_goodput",
            json!(self.num_good.map(|good| rate(good, self.duration))),
        );
        put("output_throughput", json!(rate(output, self.duration)));
        put("total_token_throughput", json!(rate(input + output, self.duration)));
        for times in self.times() {
            let key = times.key;
            put(&format!("mean_{key}_ms"), json!(times.mean()));
            put(&format!("median_{key}_ms"), json!(times.percentile(50.0)));
            put(&format!("std_{key}_ms"), json!(times.deviation()));
            for p in &self.percentiles {
                put(&format!("p{p}_{key}_ms"), json!(times.percentile(*p)));
            }
        }
        put("errors", json!(self.errors));
        if is_detailed {
            let seconds = |of: fn(&Answer) -> Duration| -> Value {
                self.answers.iter().map(|answer| of(answer).as_secs_f64()).collect()
            };
            put("ttfts", seconds(|answer| answer.to_first_token));
            put("e2els", seconds(|answer| answer.total));
            let between = |answer: &Answer| -> Value { answer.between.iter().map(Duration::as_secs_f64).collect() };
            put("itls", self.answers.iter().map(between).collect());
            put(
                "input_lens",
                self.answers.iter().map(|answer| answer.prompt_tokens).collect(),
            );
            put(
                "output_lens",
                self.answers.iter().map(|answer| answer.output_tokens).collect(),
            );
        }
        Value::Object(result)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (input, output) = (
            self.total(|answer| answer.prompt_tokens),
            self.total(|answer| answer.output_tokens),
        );
        let (completed, failed) = (self.answers.len(), self.errors.len());
        writeln!(f, "{:44}{completed}, {failed} failed", "Requests completed")?;
        writeln!(f, "{:44}{:.2} s", "Duration", self.duration.as_secs_f64())?;
        writeln!(f, "{:44}{input} read, {output} written", "Tokens")?;
        let requests = rate(completed as u64, self.duration);
        writeln!(f, "{:44}{requests:.2} requests/s", "Throughput")?;
        if let Some(good) = self.num_good {
            let rate = rate(good, self.duration);
            writeln!(
                f,
                "{:44}{rate:.2} requests/s",
                "Throughput of requests that met the goals"
            )?;
        }
        let (written, both) = (rate(output, self.duration), rate(input + output, self.duration));
        writeln!(f, "{:44}{written:.2} tokens/s written, {both:.2} read and written", "")?;
        for times in self.times() {
            let (mean, median) = (times.mean(), times.percentile(50.0));
            write!(f, "{:44}mean {mean:.2} ms, median {median:.2}", times.title)?;
            for p in self.percentiles.iter().filter(|p| **p != 50.0) {
                write!(f, ", p{p} {:.2}", times.percentile(*p))?;
            }
            writeln!(f)?;
        }
        for error in self.distinct_errors() {
            writeln!(f, "{error}")?;
        }
        Ok(())
    }
}

impl Report {
    /// The commonest first, with how often each occurred.
    fn distinct_errors(&self) -> Vec<String> {
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for error in &self.errors {
            match counts.iter_mut().find(|(known, _)| known == error) {
                Some((_, count)) => *count += 1,
                None => counts.push((error, 1)),
            }
        }
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let shown = counts.iter().take(SHOWN_ERRORS);
        shown
            .map(|(error, count)| format!("{:44}{count} times: {error}", "Failed"))
            .collect()
    }
}

impl Times {
    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    fn mean(&self) -> f64 {
        match self.values.len() {
            0 => 0.0,
            count => self.values.iter().sum::<f64>() / count as f64,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts are small")]
    fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.values.iter().map(|value| (value - mean) * (value - mean)).sum();
        (squares / self.values.len().max(1) as f64).sqrt()
    }

    /// Between two values, in proportion, as numpy does it; 0 without values.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a list"
    )]
    fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.values.len().checked_sub(1) else {
            return 0.0;
        };
        let place = percent / 100.0 * last as f64;
        let (low, share) = (place.floor() as usize, place.fract());
        let (below, above) = (self.values[low], self.values[(low + 1).min(last)]);
        below + (above - below) * share
    }
}

/// So many in this time, a second.
#[expect(clippy::cast_precision_loss, reason = "counts are small")]
pub(super) fn rate(count: u64, duration: Duration) -> f64 {
    match duration.is_zero() {
        true => 0.0,
        false => count as f64 / duration.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(values: &[f64]) -> Times {
        Times {
            key: "x",
            title: "x",
            values: values.to_vec(),
        }
    }

    #[test]
    fn percentiles_lie_between_values_as_numpys_do() {
        let four = times(&[1.0, 2.0, 3.0, 10.0]);
        let found = [0.0, 25.0, 50.0, 75.0, 100.0].map(|percent| four.percentile(percent));
        assert_eq!(found, [1.0, 1.75, 2.5, 4.75, 10.0]);
        assert_eq!(
            (four.mean(), times(&[]).percentile(99.0), times(&[5.0]).percentile(99.0)),
            (4.0, 0.0, 5.0)
        );
        assert_eq!(times(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).deviation(), 2.0);
    }

    #[test]
    fn goals_are_kept_by_whoever_is_fast_enough() {
        let goals = |typed: &[&str]| Goals::parse(&typed.iter().map(|goal| (*goal).to_owned()).collect::<Vec<_>>());
        let answer = |first_ms, total_ms, output_tokens| Answer {
            to_first_token: Duration::from_millis(first_ms),
            total: Duration::from_millis(total_ms),
            between: Vec::new(),
            prompt_tokens: 1,
            output_tokens,
        };
        let both = goals(&["ttft:100", "tpot:10.5"]).unwrap();
        assert!(both.are_met(&answer(100, 200, 11)));
        assert!(!both.are_met(&answer(101, 200, 11)), "the first token was late");
        assert!(!both.are_met(&answer(100, 210, 11)), "the others were slow");
        assert!(both.are_met(&answer(100, 900, 1)), "there are no others");
        assert!(!goals(&["e2el:5"]).unwrap().are_met(&answer(1, 6, 2)));
        for wrong in ["ttft", "ttft:", "ttft:-1", "speed:5", "ttft:NaN"] {
            assert!(matches!(goals(&[wrong]), Err(BenchError::Goal(_))), "{wrong}");
        }
    }
}
