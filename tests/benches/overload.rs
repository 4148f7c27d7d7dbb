//! Twenty times as many requests as the server can answer: those it accepts must be as fast as ever, and the others be
//! told so at once.
//!
//! `cargo bench -p lapidary-tests --bench overload -- [--seconds 60] [--factor 20] [serve flags after --, in place of
//! --max-queue-wait 250ms]`. Prints latencies
//! of accepted requests at 0.8 times capacity and under overload; fails when a request is lost, a refusal does not say when
//! to come back, the server's counters differ from what clients saw, or a KV block is left. Clients share the machine with
//! the server; `LAPIDARY_BINARY` names a binary to use instead of building one.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::io;
use std::time::Duration;

use lapidary_tests::churn::settled;
use lapidary_tests::load::{Clients, Seen, Shape, check_outcomes, percentile, statuses};
use lapidary_tests::process::{ServerProcess, lapidary_binary};

const SHAPE: Shape = Shape {
    prompt_tokens: 48,
    answer_tokens: 96,
    leave_one_in: 0,
};
/// As many as the CPU backend runs at the same time.
const NUM_SATURATING: usize = 64;
const CAPACITY_DURATION: Duration = Duration::from_secs(15);
const CALM_DURATION: Duration = Duration::from_secs(20);
const CALM_SHARE: f64 = 0.8;

struct Options {
    seconds: u64,
    factor: f64,
    serve: Vec<String>,
}

fn options() -> Options {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let mut options = Options {
        seconds: 60,
        factor: 20.0,
        serve: ["--max-queue-wait", "250ms"].map(str::to_owned).to_vec(),
    };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seconds" => options.seconds = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(60),
            "--factor" => options.factor = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(20.0),
            _ => options.serve = arguments.by_ref().collect(),
        }
    }
    options
}

fn print(what: &str, all: &[Seen], seconds: f64) {
    let accepted = || all.iter().filter(|seen| seen.status == 200);
    let first = |share| percentile(accepted().map(|seen| seen.first_token), share);
    let each = |share| percentile(accepted().map(|seen| seen.per_token), share);
    println!(
        "{what}: {:.1} requests/s offered, {:.1}/s accepted, by status {:?}; first token p50 {:.0} p99 {:.0} ms; per token p50 \
         {:.1} p99 {:.1} ms",
        all.len() as f64 / seconds,
        accepted().count() as f64 / seconds,
        statuses(all),
        first(0.5),
        first(0.99),
        each(0.5),
        each(0.99),
    );
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let options = options();
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let mut arguments = vec!["serve", "demo", "--port", "0"];
    arguments.extend(options.serve.iter().map(String::as_str));
    let server = ServerProcess::start(&binary, &arguments).await?;
    let clients = Clients::new(server.address);

    let capacity = clients.capacity(SHAPE, NUM_SATURATING, CAPACITY_DURATION).await?;
    println!(
        "capacity: {capacity:.1} requests/s of {} tokens in, {} out",
        SHAPE.prompt_tokens, SHAPE.answer_tokens
    );

    let before = settled(&server).await?;
    let calm = clients
        .offer(SHAPE, capacity * CALM_SHARE, CALM_DURATION, 1 << 40)
        .await?;
    print("at 0.8 of capacity", &calm, CALM_DURATION.as_secs_f64());

    let duration = Duration::from_secs(options.seconds);
    let overload = clients
        .offer(SHAPE, capacity * options.factor, duration, 1 << 41)
        .await?;
    print(
        &format!("at {} times", options.factor),
        &overload,
        duration.as_secs_f64(),
    );
    let (early, late): (Vec<Seen>, Vec<Seen>) = overload.iter().cloned().partition(|seen| seen.due * 6 < duration);
    print("  its first sixth", &early, duration.as_secs_f64() / 6.0);
    print("  the rest", &late, duration.as_secs_f64() * 5.0 / 6.0);

    let all = [calm, overload].concat();
    println!("{}", check_outcomes(&before, &settled(&server).await?, &all)?);
    Ok(())
}
