//! What a scrape of `/metrics` costs, through the router: `cargo bench -p lapidary-server --bench metrics`.
//!
//! Gateways scrape each replica every 50 ms, so it must stay well under a millisecond. Measured with every family there
//! is, and again with thousands of open descriptors, which is what connections are to the process.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]
#![allow(clippy::unwrap_used, reason = "a bench stops where something is not as it should be")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Server, Setup};

const SCRAPES: usize = 2000;
const OPEN_FILES: usize = 4000;

async fn measure(server: &Server, what: &str) {
    let mut times = Vec::with_capacity(SCRAPES);
    let mut num_bytes = 0;
    for _ in 0..SCRAPES {
        let started = Instant::now();
        num_bytes = server.get("/metrics").await.body.len();
        times.push(started.elapsed());
    }
    times.sort_unstable();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    println!(
        "{what}: {num_bytes} bytes, median {:.0} us, p99 {:.0} us",
        micros(times[SCRAPES / 2]),
        micros(times[SCRAPES * 99 / 100])
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let server = Setup::default().start();
    for stream in [false, true] {
        server.chat(json!({ "stream": stream })).await;
        server.complete(json!({ "prompt": "a", "stream": stream })).await;
        server
            .post("/v1/responses", json!({ "input": "a", "stream": stream }))
            .await;
        server.post("/tokenize", json!({ "prompt": "a" })).await;
        server.get("/v1/models").await;
        server.get("/nowhere").await;
    }
    measure(&server, "scrape").await;
    let files: Vec<File> = (0..OPEN_FILES).map_while(|_| File::open("/dev/null").ok()).collect();
    measure(&server, &format!("scrape with {} more open files", files.len())).await;
}
