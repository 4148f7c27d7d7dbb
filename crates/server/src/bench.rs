//! `lapidary bench`: a load generator in the shape of `vllm bench serve`, for any server with OpenAI's endpoints.
//!
//! It is a client: nothing of the served path is used or measured from within.

mod client;
mod dataset;
mod report;
#[cfg(test)]
mod tests;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::Environment;

use self::client::{Client, ClientError};
use self::dataset::{DatasetError, Prompt, Random, Sample};
use self::report::{Goals, Outcome};

pub use self::report::Report;

/// Without a terminal, progress is a line now and then.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Arguments of `lapidary bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// The server, over plain HTTP.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub base_url: String,

    /// Path of the endpoint; one that ends in `/chat/completions` gets messages.
    #[arg(long, value_name = "PATH", default_value = "/v1/completions")]
    pub endpoint: String,

    /// Name of the model [default: the first of /v1/models].
    #[arg(long)]
    pub model: Option<String>,

    /// Sent as a bearer token [env: `OPENAI_API_KEY`].
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,

    /// Where prompts come from.
    #[arg(long, value_name = "WHICH", default_value = "random")]
    pub dataset_name: DatasetName,

    /// JSON or JSON lines, for `file`: records with `conversations` (`ShareGPT`), `messages`, or `prompt`.
    #[arg(long, value_name = "FILE", required_if_eq("dataset_name", "file"))]
    pub dataset_path: Option<PathBuf>,

    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub num_prompts: u32,

    /// Tokens of a random prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024)]
    pub random_input_len: u32,

    /// Tokens of an answer to a random prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub random_output_len: u32,

    /// Random lengths differ from the given ones by up to this share.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = below_one)]
    pub random_range_ratio: f64,

    /// Tokens with which all random prompts begin, beyond their length.
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub random_prefix_len: u32,

    /// Tokens of every answer, in place of what the data set says.
    #[arg(long, value_name = "TOKENS")]
    pub output_len: Option<u32>,

    /// Answers go on to their full length [default: for random prompts].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ignore_eos: Option<bool>,

    /// Sampling temperature.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub temperature: f64,

    /// Requests a second, at random times (a Poisson process); `inf` sends all at once.
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY, value_parser = positive)]
    pub request_rate: f64,

    /// Requests in flight at most; further ones wait for their turn [default: no limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_concurrency: Option<u32>,

    /// Requests that are sent before anything is measured.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_warmups: u32,

    /// Of prompts, lengths and arrival times.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Percentiles to report.
    #[arg(long, value_name = "P,...", value_delimiter = ',', default_value = "50,90,99", value_parser = percentile)]
    pub metric_percentiles: Vec<f64>,

    /// What a good request keeps, in milliseconds: `ttft:500 tpot:50 e2el:5000`.
    #[arg(long, value_name = "GOAL:MS", num_args = 1..)]
    pub goodput: Vec<String>,

    /// Write the result here, as JSON.
    #[arg(long, value_name = "FILE")]
    pub result_filename: Option<PathBuf>,

    /// The file has the figures of every single request too.
    #[arg(long)]
    pub save_detailed: bool,
}

/// Where prompts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Random tokens of the server's vocabulary.
    Random,
    /// The records of `--dataset-path`.
    #[value(alias = "sharegpt", alias = "custom")]
    File,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The server cannot be reached, or refuses.
    #[error("cannot use the server")]
    Client(#[from] ClientError),
    /// The server serves no model.
    #[error("/v1/models names no model; give one with --model")]
    NoModel,
    /// The data set cannot be used.
    #[error("cannot use the data set")]
    Dataset(#[from] DatasetError),
    /// A goal of `--goodput` that is none.
    #[error("--goodput {0:?} is no goal such as ttft:500, tpot:50 or e2el:5000")]
    Goal(String),
    /// A request that was to warm the server up failed.
    #[error("the first request failed")]
    WarmUp(#[source] ClientError),
    /// The result cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Of `--result-filename`.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

fn positive(typed: &str) -> Result<f64, String> {
    match typed.parse() {
        Ok(value) if value > 0.0 => Ok(value),
        _ => Err("must be a positive number or inf".to_owned()),
    }
}

fn below_one(typed: &str) -> Result<f64, String> {
    match typed.parse() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("must be at least 0 and less than 1".to_owned()),
    }
}

fn percentile(typed: &str) -> Result<f64, String> {
    match typed.trim().parse() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("must be from 0 to 100".to_owned()),
    }
}

/// Sends the requests that `args` describe and reports how they fared.
///
/// # Errors
/// Nothing could be measured. Requests that fail along the way are part of the report.
pub async fn run(args: &BenchArgs, environment: &Environment) -> Result<Report, BenchError> {
    let goals = Goals::parse(&args.goodput)?;
    let api_key = args.api_key.as_deref().or(environment.openai_api_key());
    let client = Arc::new(Client::new(&args.base_url, api_key)?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    let samples = dataset::samples(args, &client).await?;
    let requests = samples
        .iter()
        .map(|sample| Bytes::from(body(args, &model, sample).to_string()));
    let requests: Vec<_> = requests.collect();
    for request in requests.iter().cycle().take(args.num_warmups as usize) {
        let warmed = client.stream(&args.endpoint, request.clone()).await;
        warmed.map_err(BenchError::WarmUp)?;
    }
    let started = Instant::now();
    let outcomes = send_all(args, &client, requests).await;
    let report = Report::new(args, &model, &goals, started.elapsed(), outcomes);
    if let Some(path) = &args.result_filename {
        let text = format!("{:#}\n", report.to_json(args.save_detailed));
        std::fs::write(path, text).map_err(|source| BenchError::Write {
            path: path.clone(),
            source,
        })?;
    }
    Ok(report)
}

async fn first_model(client: &Client) -> Result<String, BenchError> {
    let models = client.get("/v1/models").await?;
    let name = models["data"][0]["id"].as_str();
    name.map(str::to_owned).ok_or(BenchError::NoModel)
}

fn body(args: &BenchArgs, model: &str, sample: &Sample) -> Value {
    let ignore_eos = args.ignore_eos.unwrap_or(args.dataset_name == DatasetName::Random);
    let mut body = json!({
        "model": model, "max_tokens": args.output_len.unwrap_or(sample.output_len), "temperature": args.temperature,
        "stream": true, "stream_options": { "include_usage": true },
    });
    if ignore_eos {
        body["ignore_eos"] = json!(true);
    }
    match (&sample.prompt, is_chat(args)) {
        (Prompt::Tokens(ids), _) => body["prompt"] = json!(ids),
        (Prompt::Text(text), false) => body["prompt"] = json!(text),
        (Prompt::Text(text), true) => body["messages"] = json!([{ "role": "user", "content": text }]),
    }
    body
}

/// Whether the endpoint takes messages.
fn is_chat(args: &BenchArgs) -> bool {
    args.endpoint.ends_with("/chat/completions")
}

/// Sends each request at its time, and waits for all.
async fn send_all(args: &BenchArgs, client: &Arc<Client>, requests: Vec<Bytes>) -> Vec<Outcome> {
    let turns = args
        .max_concurrency
        .map(|limit| Arc::new(Semaphore::new(limit as usize)));
    let endpoint: Arc<str> = args.endpoint.as_str().into();
    let mut arrivals = Arrivals::new(args.request_rate, args.seed, Instant::now());
    let mut progress = Progress::new(requests.len());
    let mut running = JoinSet::new();
    for (index, request) in requests.into_iter().enumerate() {
        let (client, endpoint, turns) = (Arc::clone(client), Arc::clone(&endpoint), turns.clone());
        let arrival = arrivals.next();
        running.spawn(async move {
            tokio::time::sleep_until(arrival).await;
            let turn = match turns {
                Some(turns) => turns.acquire_owned().await.ok(),
                None => None,
            };
            let answered = client.stream(&endpoint, request).await;
            drop(turn);
            (index, Outcome::from(answered))
        });
    }
    let mut outcomes = Vec::with_capacity(running.len());
    while let Some(joined) = running.join_next().await {
        let (index, outcome) = joined.expect("requests are not cancelled and do not panic");
        progress.count(&outcome);
        outcomes.push((index, outcome));
    }
    outcomes.sort_by_key(|(index, _)| *index);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// When requests are sent: gaps of a Poisson process are exponentially distributed.
struct Arrivals {
    rate: f64,
    random: Random,
    next: Instant,
}

impl Arrivals {
    fn new(rate: f64, seed: u64, start: Instant) -> Self {
        Self {
            rate,
            random: Random::new(seed ^ 0xa551_5a1e),
            next: start,
        }
    }

    fn next(&mut self) -> Instant {
        let arrival = self.next;
        if self.rate.is_finite() {
            // 1 - u is never 0.
            let gap = -(1.0 - self.random.uniform()).ln() / self.rate;
            self.next += Duration::from_secs_f64(gap);
        }
        arrival
    }
}

/// How far it is: a bar on a terminal, else a line now and then.
struct Progress {
    bar: ProgressBar,
    is_terminal: bool,
    started: Instant,
    next_log: Instant,
    num_requests: usize,
    num_done: usize,
    num_failed: usize,
    num_tokens: u64,
}

impl Progress {
    fn new(num_requests: usize) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::new(num_requests as u64);
        if is_terminal {
            let template = "{wide_bar} {pos}/{len} requests, {elapsed}, {msg}";
            bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
        } else {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let now = Instant::now();
        Self {
            bar,
            is_terminal,
            started: now,
            next_log: now + LOG_INTERVAL,
            num_requests,
            num_done: 0,
            num_failed: 0,
            num_tokens: 0,
        }
    }

    fn count(&mut self, outcome: &Outcome) {
        self.num_done += 1;
        match outcome {
            Outcome::Answered(answer) => self.num_tokens += answer.output_tokens,
            Outcome::Failed(_) => self.num_failed += 1,
        }
        let rate = report::rate(self.num_tokens, self.started.elapsed());
        let message = format!("{rate:.0} tokens/s, {} failed", self.num_failed);
        self.bar.inc(1);
        if self.is_terminal {
            self.bar.set_message(message);
        } else if Instant::now() >= self.next_log {
            self.next_log = Instant::now() + LOG_INTERVAL;
            // Nobody reads stderr: the result still counts.
            let _ = writeln!(
                std::io::stderr(),
                "{} of {} requests, {message}",
                self.num_done,
                self.num_requests
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
