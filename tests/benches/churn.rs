//! 10,000 requests against the real binary and the demo model, a third of them cut by the client at a random point.
//!
//! `cargo bench -p lapidary-tests --bench churn`. Prints resident memory over time, and fails when a request is missing
//! from the outcome counters or counted twice, leaves a KV block behind, or memory grew by more than 5 %.
//! `CHURN_REQUESTS` changes the number.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::io;
use std::time::Instant;

use lapidary_tests::churn::{check_accounts, churn, settled};
use lapidary_tests::process::ServerProcess;

const REQUESTS: usize = 10_000;
/// Memory is compared after these many: buffers and thread stacks have their final sizes by then.
const WARM_UP: usize = 2_000;
const PARTS: usize = 4;
const MAX_RSS_GROWTH: f64 = 1.05;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let requests = std::env::var("CHURN_REQUESTS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(REQUESTS);
    let server = ServerProcess::demo(&["--max-num-queued-reqs", "1000", "--kv-cache-memory-bytes", "64MiB"]).await?;
    let before = settled(&server).await?;
    let started = Instant::now();

    let warm_up = WARM_UP.min(requests / PARTS);
    let mut answered = churn(server.address, 0..warm_up).await?;
    settled(&server).await?;
    let rss_warm = server.resident_bytes()?;
    println!("after {warm_up:6} requests: {:.1} MiB resident", mib(rss_warm));
    let end_of = |part: usize| warm_up + (requests - warm_up) * part / PARTS;
    for part in 1..=PARTS {
        answered += churn(server.address, end_of(part - 1)..end_of(part)).await?;
        settled(&server).await?;
        println!(
            "after {:6} requests: {:.1} MiB resident",
            end_of(part),
            mib(server.resident_bytes()?)
        );
    }

    let growth = server.resident_bytes()? as f64 / rss_warm as f64;
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{}; memory x{growth:.3}; {seconds:.1} s",
        check_accounts(&before, &settled(&server).await?, requests, answered)?
    );
    assert!(
        growth <= MAX_RSS_GROWTH,
        "memory grew by {:.1} %",
        (growth - 1.0) * 100.0
    );
    Ok(())
}
