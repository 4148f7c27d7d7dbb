//! What hostile grammars cost those who stream meanwhile: time between two tokens of other answers, with and without a
//! flood of grammars that are as dear as they can be.
//!
//! `cargo bench -p lapidary-tests --bench grammars`. Fails when a grammar is neither compiled nor refused in time.
//! `LAPIDARY_BINARY` names a binary to use instead of building one.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lapidary_tests::http::Connection;
use lapidary_tests::load::percentile;
use lapidary_tests::process::{ServerProcess, lapidary_binary};
use lapidary_text::Grammar;
use serde_json::{Value, json};
use tokio::task::JoinSet;

#[path = "../../crates/text/tests/text/hostile.rs"]
mod hostile;

const NUM_STREAMS: usize = 4;
const NUM_HOSTILE: usize = 4;
const DURATION: Duration = Duration::from_secs(15);
/// Compilation has five seconds, its place in the queue five more; the rest is for a busy machine.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(20);

/// Streams without end until `until`; times between two tokens.
async fn stream(address: SocketAddr, until: Instant) -> io::Result<Vec<Duration>> {
    let mut gaps = Vec::new();
    while Instant::now() < until {
        let body =
            json!({ "prompt": "Hello", "max_tokens": 1000, "ignore_eos": true, "stream": true, "temperature": 0 });
        let mut connection = Connection::open(address).await?;
        let head = connection.send("POST", "/v1/completions", &body.to_string()).await?;
        if head.status != 200 {
            return Err(io::Error::other(format!("a stream was answered {}", head.status)));
        }
        let mut events = connection.events(&head)?;
        let mut last = None;
        while let Some(_event) = events.next().await? {
            let now = Instant::now();
            gaps.extend(last.replace(now).map(|last| now - last));
            if now >= until {
                break;
            }
        }
    }
    Ok(gaps)
}

fn bodies() -> Vec<(&'static str, String)> {
    let mut all: Vec<(&'static str, Value)> = hostile::grammars()
        .into_iter()
        .filter_map(|(name, grammar)| {
            Some(match grammar {
                Grammar::Regex(regex) => (name, json!({ "regex": regex })),
                Grammar::JsonSchema(schema) => (name, json!({ "json": schema })),
                Grammar::Lark(grammar) => (name, json!({ "grammar": grammar })),
                Grammar::Choice(choice) => (name, json!({ "choice": choice })),
                Grammar::JsonObject | Grammar::Calls(_) => return None,
            })
        })
        .collect();
    all.push((
        "a regular expression of 1 MB",
        json!({ "regex": "(ab|c)*".repeat(150_000) }),
    ));
    all.push((
        "alternations of alternations",
        json!({ "regex": "(((a|b)*a(a|b){20}|(b|c)*b(b|c){20}){1,20}){1,20}" }),
    ));
    all.push((
        "rules that name each other",
        json!({ "grammar": "start: a\na: b a | b\nb: a b | \"x\" | a a\n" }),
    ));
    let body = |outputs| json!({ "prompt": "x", "max_tokens": 8, "structured_outputs": outputs }).to_string();
    all.into_iter().map(|(name, outputs)| (name, body(outputs))).collect()
}

/// Sends all of them again and again until `until`; returns how often each status came and the longest time.
async fn flood(address: SocketAddr, first: usize, until: Instant) -> io::Result<(BTreeMap<u16, usize>, Duration)> {
    let bodies = bodies();
    let (mut statuses, mut longest) = (BTreeMap::new(), Duration::ZERO);
    let mut connection = Connection::open(address).await?;
    for index in first.. {
        if Instant::now() >= until {
            break;
        }
        let (name, body) = &bodies[index % bodies.len()];
        let started = Instant::now();
        let answer = connection.request("POST", "/v1/completions", body).await?;
        longest = longest.max(started.elapsed());
        if !matches!(answer.head.status, 200 | 400 | 429) || started.elapsed() > MAX_ANSWER_TIME {
            let what = format!("{name}: {} after {:?}", answer.head.status, started.elapsed());
            return Err(io::Error::other(what));
        }
        *statuses.entry(answer.head.status).or_default() += 1;
    }
    Ok((statuses, longest))
}

async fn run(server: &ServerProcess, num_hostile: usize) -> io::Result<f64> {
    let until = Instant::now() + DURATION;
    let mut streams = JoinSet::new();
    for _ in 0..NUM_STREAMS {
        streams.spawn(stream(server.address, until));
    }
    let mut floods = JoinSet::new();
    for index in 0..num_hostile {
        floods.spawn(flood(server.address, index * 5, until));
    }
    let mut gaps = Vec::new();
    while let Some(done) = streams.join_next().await {
        gaps.extend(done.map_err(io::Error::other)??);
    }
    let (mut statuses, mut longest) = (BTreeMap::new(), Duration::ZERO);
    while let Some(done) = floods.join_next().await {
        let (counts, time) = done.map_err(io::Error::other)??;
        longest = longest.max(time);
        for (status, count) in counts {
            *statuses.entry(status).or_insert(0) += count;
        }
    }
    let p99 = percentile(gaps.iter().copied(), 0.99);
    println!(
        "{NUM_STREAMS} streams beside {num_hostile} senders of grammars: {} tokens, between two p50 {:.2} p99 {p99:.2} max {:.1} ms; \
         grammars by status {statuses:?}, longest {:.1} s",
        gaps.len(),
        percentile(gaps.iter().copied(), 0.5),
        percentile(gaps.iter().copied(), 1.0),
        longest.as_secs_f64(),
    );
    Ok(p99)
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let server = ServerProcess::start(&binary, &["serve", "demo", "--port", "0"]).await?;
    run(&server, 0).await?;
    let calm = run(&server, 0).await?;
    let flooded = run(&server, NUM_HOSTILE).await?;
    println!("p99 is {:.2} times what it is without them", flooded / calm);
    Ok(())
}
