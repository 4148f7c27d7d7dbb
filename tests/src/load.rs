//! Load at a given rate, whether answers come or not: what a crowd of clients is, and a benchmark with a fixed number of
//! them is not.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::http::Connection;
use crate::metrics::sum;

/// A late server must not let requests pile up without bound.
const MAX_UNDER_WAY: usize = 3500;

/// Ids below this are bytes and control tokens.
const FIRST_ID: u64 = 300;
/// Of the demo model.
const VOCABULARY: u64 = 3000;

/// What each request asks for.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Random ids, different for each request.
    pub prompt_tokens: usize,
    /// All are generated: no answer ends by itself.
    pub answer_tokens: usize,
    /// One in so many clients leaves after a few tokens; 0: none.
    pub leave_one_in: usize,
}

/// What became of one request.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// HTTP status.
    pub status: u16,
    /// Since the request was due.
    pub first_token: Duration,
    /// Mean between two tokens.
    pub per_token: Duration,
    /// Tokens that came.
    pub tokens: usize,
    /// Of a refusal.
    pub retry_after: Option<u64>,
    /// When it was due, since the load began.
    pub due: Duration,
    /// Its client meant to leave early, and did.
    pub has_left: bool,
}

/// Connections of clients that are done.
#[derive(Debug, Clone)]
pub struct Clients {
    address: SocketAddr,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Clients {
    /// None yet.
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            idle: Arc::default(),
        }
    }

    async fn connection(&self) -> io::Result<Connection> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(connection) => Ok(connection),
            None => Connection::open(self.address).await,
        }
    }

    fn keep(&self, connection: Connection) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
    }

    /// One request, streamed; `due` is when it should have been sent.
    ///
    /// # Errors
    /// As the socket's; a stream that breaks off.
    pub async fn ask(&self, shape: Shape, seed: u64, due: Instant) -> io::Result<Seen> {
        let body = serde_json::json!({
            "prompt": prompt(seed, shape.prompt_tokens), "max_tokens": shape.answer_tokens,
            "temperature": 0, "ignore_eos": true, "stream": true,
        });
        let mut connection = self.connection().await?;
        let head = connection.send("POST", "/v1/completions", &body.to_string()).await?;
        let mut seen = Seen {
            status: head.status,
            retry_after: head.header("retry-after").and_then(|value| value.parse().ok()),
            ..Seen::default()
        };
        if head.status != 200 {
            connection.read_body(&head).await?;
            self.keep(connection);
            return Ok(seen);
        }
        let leaves = shape.leave_one_in > 0 && (seed as usize).is_multiple_of(shape.leave_one_in);
        let patience = if leaves { 1 + seed as usize % 16 } else { usize::MAX };
        let mut events = connection.events(&head)?;
        let (mut first, mut last) = (due, due);
        while let Some(event) = events.next().await? {
            if !event.contains("\"choices\":[{") {
                continue;
            }
            last = Instant::now();
            if seen.tokens == 0 {
                first = last;
            }
            seen.tokens += 1;
            if seen.tokens >= patience {
                seen.has_left = true;
                break;
            }
        }
        seen.first_token = first - due;
        seen.per_token = (last - first) / (seen.tokens.max(2) - 1) as u32;
        if !seen.has_left {
            if seen.tokens == 0 {
                return Err(io::Error::other("an answer without tokens"));
            }
            self.keep(events.into_connection());
        }
        Ok(seen)
    }

    /// Requests at `rate` a second for as long as `duration`; returns what became of each.
    ///
    /// # Errors
    /// A request that was neither answered nor refused: it is lost.
    pub async fn offer(&self, shape: Shape, rate: f64, duration: Duration, first_seed: u64) -> io::Result<Vec<Seen>> {
        let started = Instant::now();
        let mut under_way = JoinSet::new();
        let mut all = Vec::new();
        for index in 0.. {
            let offset = Duration::from_secs_f64(f64::from(index) / rate);
            if offset >= duration {
                break;
            }
            let due = started + offset;
            tokio::time::sleep_until(due.into()).await;
            while let Some(done) = under_way.try_join_next() {
                all.push(done.map_err(io::Error::other)??);
            }
            if under_way.len() >= MAX_UNDER_WAY {
                return Err(io::Error::other("requests pile up"));
            }
            let clients = self.clone();
            under_way.spawn(async move {
                let mut seen = clients.ask(shape, first_seed + u64::from(index as u32), due).await?;
                seen.due = offset;
                Ok::<_, io::Error>(seen)
            });
        }
        while let Some(done) = under_way.join_next().await {
            all.push(done.map_err(io::Error::other)??);
        }
        Ok(all)
    }

    /// Answers a second when `num_clients` ask again and again.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn capacity(&self, shape: Shape, num_clients: usize, duration: Duration) -> io::Result<f64> {
        let started = Instant::now();
        let mut asking = JoinSet::new();
        for client in 0..num_clients {
            let clients = self.clone();
            asking.spawn(async move {
                let mut answered = 0;
                // Answers of one length, begun together, would end in waves: the first ones differ.
                let first = Shape {
                    answer_tokens: 1 + shape.answer_tokens * client / num_clients,
                    ..shape
                };
                clients.ask(first, client as u64, Instant::now()).await?;
                while started.elapsed() < duration {
                    let seed = (client as u64) << 32 | answered;
                    let seen = clients.ask(shape, seed, Instant::now()).await?;
                    answered += u64::from(seen.status == 200);
                }
                Ok::<_, io::Error>(answered)
            });
        }
        let mut answered = 0;
        while let Some(done) = asking.join_next().await {
            answered += done.map_err(io::Error::other)??;
        }
        Ok(answered as f64 / started.elapsed().as_secs_f64())
    }
}

/// Random ids (xorshift).
fn prompt(seed: u64, tokens: usize) -> Vec<u64> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let ids = (0..tokens).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        FIRST_ID + state % (VOCABULARY - FIRST_ID)
    });
    ids.collect()
}

/// Requests by status.
#[must_use]
pub fn statuses(all: &[Seen]) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    for seen in all {
        *counts.entry(seen.status).or_default() += 1;
    }
    counts
}

/// The value below which a share of them lie, in milliseconds; 0 for none.
#[must_use]
pub fn percentile(values: impl IntoIterator<Item = Duration>, share: f64) -> f64 {
    let mut sorted: Vec<Duration> = values.into_iter().collect();
    sorted.sort();
    let index = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
    sorted.get(index).map_or(0.0, |value| value.as_secs_f64() * 1e3)
}

/// Fails unless the server counted just these requests since `before`, each with the outcome its client saw, every refusal
/// said when to come back, and no KV block is in use.
///
/// # Errors
/// Says which of these does not hold.
pub fn check_outcomes(before: &str, after: &str, all: &[Seen]) -> io::Result<String> {
    let grown = |name: &str, outcomes: &[&str]| -> f64 {
        let each = outcomes.iter().map(|outcome| {
            let labels: &[_] = &[("outcome", *outcome)];
            let labels = if outcome.is_empty() { &[] } else { labels };
            sum(after, name, labels) - sum(before, name, labels)
        });
        each.sum()
    };
    let finished = "lapidary_requests_finished_total";
    let received = grown("lapidary_requests_received_total", &[""]);
    let outcomes = grown(finished, &[""]);
    let (complete, left, refused) = (
        grown(finished, &["stop", "length"]),
        grown(finished, &["client_abort"]),
        grown(finished, &["queue_full"]),
    );
    let num = |is: &dyn Fn(&Seen) -> bool| all.iter().filter(|seen| is(seen)).count() as f64;
    let stayed = num(&|seen| seen.status == 200 && !seen.has_left);
    let gone = num(&|seen| seen.has_left);
    let told = num(&|seen| seen.status == 429 && seen.retry_after.is_some_and(|seconds| seconds >= 1));
    let in_use = sum(after, "vllm:kv_cache_usage_perc", &[]);
    let report = format!(
        "{} sent: {stayed} answered, {gone} left, {told} refused with Retry-After; the server counts {received} received, \
         {complete} complete, {left} left, {refused} refused; KV in use {in_use}",
        all.len()
    );
    // Who leaves at the last moment may have had its whole answer.
    let is_right = all.len() as f64 == stayed + gone + told
        && received == all.len() as f64
        && outcomes == received
        && refused == told
        && complete >= stayed
        && complete + left == stayed + gone
        && in_use == 0.0;
    if is_right {
        Ok(report)
    } else {
        Err(io::Error::other(report))
    }
}
