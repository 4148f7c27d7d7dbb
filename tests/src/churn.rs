//! Clients that come and go: many requests, a third of them cut at a random point.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::http::Connection;
use crate::metrics::sum;
use crate::process::ServerProcess;

/// Requests under way at once.
const CONCURRENCY: usize = 48;
const RECEIVED: &str = "lapidary_requests_received_total";
const FINISHED: &str = "lapidary_requests_finished_total";
/// Tokens of an answer that its client will leave: a server that is faster than its clients shall not be done before.
const LEFT_ANSWER_TOKENS: u64 = 2000;
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// A repeatable random number for request `index` (SplitMix64).
fn random(index: usize, purpose: u64) -> u64 {
    let mut z = (index as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(purpose.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Whether a client saw anything of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Answer,
    /// It left before: perhaps so early that its request was never read.
    Nothing,
}

/// One request. A third leave early: before the answer's head, or after a random number of events.
async fn client(address: SocketAddr, index: usize) -> io::Result<Seen> {
    let streams = random(index, 1).is_multiple_of(2);
    let cut = random(index, 2).is_multiple_of(3);
    let read_tokens = 4 + random(index, 3) % 28;
    let max_tokens = if cut { LEFT_ANSWER_TOKENS } else { read_tokens };
    let number = random(index, 4) % 90;
    let filler = "word ".repeat((random(index, 5) % 60) as usize);
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":"{filler}What is {number} + 7?"}}],"max_tokens":{max_tokens},"stream":{streams},"ignore_eos":true}}"#
    );
    let mut connection = Connection::open(address).await?;
    if cut && (!streams || random(index, 6).is_multiple_of(4)) {
        // Gone while queued, in prefill or while decoding: wherever the request is when the timer ends.
        let patience = Duration::from_micros(random(index, 7) % 40_000);
        return match tokio::time::timeout(patience, connection.send("POST", "/v1/chat/completions", &body)).await {
            Ok(head) => head.map(|_| Seen::Answer),
            Err(_) => Ok(Seen::Nothing),
        };
    }
    let head = connection.send("POST", "/v1/chat/completions", &body).await?;
    if head.status != 200 {
        return Err(io::Error::other(format!("status {}", head.status)));
    }
    if !streams {
        return connection.read_body(&head).await.map(|_| Seen::Answer);
    }
    let mut events = connection.events(&head)?;
    let leave_after = if cut { random(index, 8) % read_tokens } else { u64::MAX };
    let mut seen = 0;
    while seen < leave_after && events.next().await?.is_some() {
        seen += 1;
    }
    Ok(Seen::Answer)
}

/// Sends requests `requests`; their shapes depend on the index alone. Returns how many clients saw an answer begin.
///
/// # Errors
/// A client that stayed did not get its answer.
pub async fn churn(address: SocketAddr, requests: Range<usize>) -> io::Result<usize> {
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut clients = JoinSet::new();
    for index in requests {
        let permit = Arc::clone(&permits).acquire_owned().await.map_err(io::Error::other)?;
        clients.spawn(async move {
            let result = client(address, index).await;
            drop(permit);
            result
        });
    }
    let mut answered = 0;
    while let Some(done) = clients.join_next().await {
        answered += usize::from(done.map_err(io::Error::other)?? == Seen::Answer);
    }
    Ok(answered)
}

/// Waits until nothing runs or waits and every request received has its outcome, then returns the metrics.
///
/// # Errors
/// Requests that never end.
pub async fn settled(server: &ServerProcess) -> io::Result<String> {
    let deadline = Instant::now() + SETTLE_WITHIN;
    loop {
        let text = server.metrics().await?;
        let busy = sum(&text, "vllm:num_requests_running", &[])
            + sum(&text, "vllm:num_requests_waiting", &[])
            + (sum(&text, RECEIVED, &[]) - sum(&text, FINISHED, &[])).abs();
        if busy == 0.0 {
            // Gauges are written and read one after the other: from here on none of them changes.
            return server.metrics().await;
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("{busy} requests never ended")));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Fails unless every request received since `before` has exactly one outcome, all requests that saw an answer begin were
/// received (one whose client left at once may never have been read), clients were seen to leave, and no KV block is in
/// use. How many were seen is in the report: it depends on who is faster.
///
/// # Errors
/// Says which of these does not hold.
pub fn check_accounts(before: &str, after: &str, requests: usize, answered: usize) -> io::Result<String> {
    let grown = |name: &str, labels: &[(&str, &str)]| sum(after, name, labels) - sum(before, name, labels);
    let received = grown(RECEIVED, &[]);
    let finished = grown(FINISHED, &[]);
    let aborted = grown(FINISHED, &[("outcome", "client_abort")]);
    let in_use = sum(after, "vllm:kv_cache_usage_perc", &[]);
    let report = format!(
        "{requests} requests: {answered} saw an answer begin, {received} received, {finished} outcomes, {aborted} of them \
         client_abort; KV in use {in_use}"
    );
    let is_complete = received == finished && (answered as f64..=requests as f64).contains(&received);
    if is_complete && aborted > 0.0 && in_use == 0.0 {
        Ok(report)
    } else {
        Err(io::Error::other(report))
    }
}
