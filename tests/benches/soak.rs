//! A long time at 80 % of capacity, with clients that leave: memory stays flat, latency too, and nothing is lost.
//!
//! `cargo bench -p lapidary-tests --bench soak -- [--minutes 30] [serve flags after --]`. Prints resident memory and
//! latencies for each fifth of the time; fails when a request is lost or counted wrongly, an answer breaks off, a KV block
//! is left, or memory grew by more than 5 % after the first fifth. `LAPIDARY_BINARY` names a binary to use instead of
//! building one.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::io;
use std::time::Duration;

use lapidary_tests::churn::settled;
use lapidary_tests::load::{Clients, Shape, check_outcomes, percentile, statuses};
use lapidary_tests::process::{ServerProcess, lapidary_binary};

const SHAPE: Shape = Shape {
    prompt_tokens: 64,
    answer_tokens: 64,
    leave_one_in: 5,
};
const NUM_SATURATING: usize = 64;
const CAPACITY_DURATION: Duration = Duration::from_secs(20);
const SHARE: f64 = 0.8;
const FIFTHS: u32 = 5;
const MAX_RSS_GROWTH: f64 = 1.05;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let (mut minutes, mut serve) = (30.0, Vec::new());
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--minutes" => minutes = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(minutes),
            _ => serve = arguments.by_ref().collect(),
        }
    }
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let mut arguments = vec!["serve", "demo", "--port", "0"];
    arguments.extend(serve.iter().map(String::as_str));
    let server = ServerProcess::start(&binary, &arguments).await?;
    let clients = Clients::new(server.address);
    let rss_start = server.resident_bytes()?;
    // Clients that leave early make room for others.
    let staying = Shape {
        leave_one_in: 0,
        ..SHAPE
    };
    let capacity = clients.capacity(staying, NUM_SATURATING, CAPACITY_DURATION).await?;
    println!(
        "capacity {capacity:.1} requests/s; {minutes} minutes at {SHARE} of it, one client in {} leaves; {:.1} MiB at the start",
        SHAPE.leave_one_in,
        mib(rss_start)
    );

    let before = settled(&server).await?;
    let fifth = Duration::from_secs_f64(minutes * 60.0) / FIFTHS;
    let (mut all, mut rss) = (Vec::new(), Vec::new());
    for part in 0..FIFTHS {
        let first_seed = u64::from(part + 1) << 40;
        let seen = clients.offer(SHAPE, capacity * SHARE, fifth, first_seed).await?;
        rss.push(server.resident_bytes()?);
        let answered = || seen.iter().filter(|seen| seen.status == 200 && !seen.has_left);
        let first = |share| percentile(answered().map(|seen| seen.first_token), share);
        let each = |share| percentile(answered().map(|seen| seen.per_token), share);
        println!(
            "fifth {}: {} requests, by status {:?}, {} left; first token p50 {:.0} p99 {:.0} ms; per token p50 {:.1} p99 {:.1} ms; \
             {:.1} MiB",
            part + 1,
            seen.len(),
            statuses(&seen),
            seen.iter().filter(|seen| seen.has_left).count(),
            first(0.5),
            first(0.99),
            each(0.5),
            each(0.99),
            mib(server.resident_bytes()?)
        );
        all.extend(seen);
    }
    println!("{}", check_outcomes(&before, &settled(&server).await?, &all)?);
    let growth = server.resident_bytes()? as f64 / rss[0] as f64;
    println!("memory x{growth:.3} since the first fifth");
    assert!(growth <= MAX_RSS_GROWTH, "memory grew");
    Ok(())
}
