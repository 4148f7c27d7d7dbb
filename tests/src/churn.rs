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
const SETTLE_WITHIN: Duration = Duration::from_secs(30);

/// A repeatable random number for request `index` (SplitMix64).
fn random(index: usize, purpose: u64) -> u64 {
    let mut z = (index as u64)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(purpose.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One request. A third leave early: before the answer's head, or after a random number of events.
async fn client(address: SocketAddr, index: usize) -> io::Result<()> {
    let streams = random(index, 1).is_multiple_of(2);
    let cut = random(index, 2).is_multiple_of(3);
    let max_tokens = 4 + random(index, 3) % 28;
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
            Ok(head) => head.map(drop),
            Err(_) => Ok(()),
        };
    }
    let head = connection.send("POST", "/v1/chat/completions", &body).await?;
    if head.status != 200 {
        return Err(io::Error::other(format!("status {}", head.status)));
    }
    if !streams {
        return connection.read_body(&head).await.map(drop);
    }
    let mut events = connection.events(&head)?;
    let leave_after = if cut { random(index, 8) % max_tokens } else { u64::MAX };
    let mut seen = 0;
    while seen < leave_after && events.next().await?.is_some() {
        seen += 1;
    }
    Ok(())
}

/// Sends requests `requests`; their shapes depend on the index alone.
///
/// # Errors
/// A client that stayed did not get its answer.
pub async fn churn(address: SocketAddr, requests: Range<usize>) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut clients = JoinSet::new();
    for index in requests {
        let permit = Arc::clone(&permits).acquire_owned().await.map_err(io::Error::other)?;
        clients.spawn(async move {
            let result = client(address, index).await;
            drop(permit);
            result
        });
        while let Some(done) = clients.try_join_next() {
            done.map_err(io::Error::other)??;
        }
    }
    while let Some(done) = clients.join_next().await {
        done.map_err(io::Error::other)??;
    }
    Ok(())
}

/// Waits until nothing runs or waits, then returns the metrics.
///
/// # Errors
/// Requests that never end.
pub async fn settled(server: &ServerProcess) -> io::Result<String> {
    let deadline = Instant::now() + SETTLE_WITHIN;
    loop {
        let text = server.metrics().await?;
        let busy = sum(&text, "vllm:num_requests_running", &[]) + sum(&text, "vllm:num_requests_waiting", &[]);
        if busy == 0.0 {
            return Ok(text);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("{busy} requests never ended")));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Fails unless exactly `requests` outcomes were counted since `before`, clients that left were seen to leave, and no KV
/// block is in use.
///
/// # Errors
/// Says which of these does not hold.
pub fn check_accounts(before: &str, after: &str, requests: usize) -> io::Result<String> {
    let outcomes = |text: &str| sum(text, "lapidary_requests_finished_total", &[]);
    let aborts = |text: &str| sum(text, "lapidary_requests_finished_total", &[("outcome", "client_abort")]);
    let counted = outcomes(after) - outcomes(before);
    let aborted = aborts(after) - aborts(before);
    let in_use = sum(after, "vllm:kv_cache_usage_perc", &[]);
    let report = format!("{requests} requests: {counted} outcomes, {aborted} of them client_abort; KV in use {in_use}");
    let right = counted == requests as f64 && aborted > requests as f64 / 6.0 && in_use == 0.0;
    if right {
        Ok(report)
    } else {
        Err(io::Error::other(report))
    }
}
