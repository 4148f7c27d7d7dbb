//! Speed of the real binary over HTTP: start to first token, one stream's decoding, many streams at once.
//!
//! `cargo bench -p lapidary-tests --bench serving -- MODEL [--context 2048] [--concurrency 64] [serve flags after --]`
//! builds and starts the server; `LAPIDARY_BINARY` names one to use instead. Prompts are random token ids, answers ignore
//! end-of-sequence tokens, so that the work does not depend on what the model says.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lapidary_tests::http::Connection;
use lapidary_tests::process::{ServerProcess, lapidary_binary};
use tokio::task::JoinSet;

/// Answer of the single stream.
const SINGLE_TOKENS: usize = 256;
/// Of each of the concurrent ones.
const PROMPT_TOKENS: usize = 512;
const ANSWER_TOKENS: usize = 256;
/// Requests for each concurrent client.
const ROUNDS: usize = 2;
/// Ids below this are bytes and control tokens in Gemma's vocabulary.
const FIRST_ID: u64 = 300;

struct Options {
    model: String,
    context: usize,
    concurrency: Vec<usize>,
    vocabulary: u64,
    serve: Vec<String>,
}

fn options() -> Options {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let mut options = Options {
        model: "demo".to_owned(),
        context: 2048,
        concurrency: vec![64],
        vocabulary: 3000,
        serve: Vec::new(),
    };
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse().ok());
        match argument.as_str() {
            "--context" => options.context = number().unwrap_or(options.context),
            "--vocabulary" => options.vocabulary = number().map_or(options.vocabulary, |count| count as u64),
            "--concurrency" => options.concurrency = number().into_iter().collect(),
            "--" => options.serve = arguments.by_ref().collect(),
            _ => options.model = argument,
        }
    }
    options
}

/// When the tokens of one answer came.
struct Answer {
    sent: Instant,
    first: Instant,
    last: Instant,
    tokens: usize,
}

async fn complete(address: SocketAddr, model: &str, prompt: &[u64], max_tokens: usize) -> io::Result<Answer> {
    let body = serde_json::json!({
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    });
    let mut connection = Connection::open(address).await?;
    let sent = Instant::now();
    let head = connection.send("POST", "/v1/completions", &body.to_string()).await?;
    if head.status != 200 {
        let body = connection.read_body(&head).await?;
        return Err(io::Error::other(format!("{}: {body}", head.status)));
    }
    let mut events = connection.events(&head)?;
    let (mut first, mut last, mut tokens) = (None, sent, 0);
    while let Some(event) = events.next().await? {
        if event.contains("\"choices\":[{") {
            last = Instant::now();
            first.get_or_insert(last);
        }
        if let Some(usage) = serde_json::from_str::<serde_json::Value>(&event)
            .ok()
            .and_then(|event| event.get("usage").cloned())
        {
            tokens = usage["completion_tokens"].as_u64().unwrap_or(0) as usize;
        }
    }
    let first = first.ok_or_else(|| io::Error::other("an answer without tokens"))?;
    Ok(Answer {
        sent,
        first,
        last,
        tokens,
    })
}

/// Random ids, different for every seed, so that no prefix is shared.
fn prompt(seed: u64, tokens: usize, vocabulary: u64) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..tokens)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            FIRST_ID + state % (vocabulary - FIRST_ID)
        })
        .collect()
}

fn percentile(sorted: &[Duration], share: f64) -> f64 {
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index].as_secs_f64() * 1e3
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let options = options();
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let mut arguments = vec!["serve", &options.model, "--port", "0", "--served-model-name", "bench"];
    arguments.extend(options.serve.iter().map(String::as_str));
    let started = Instant::now();
    let server = ServerProcess::start(&binary, &arguments).await?;
    let ready = started.elapsed();
    let first = complete(server.address, "bench", &prompt(1, 16, options.vocabulary), 1).await?;
    println!(
        "start to ready {:.2} s, to the first token {:.2} s",
        ready.as_secs_f64(),
        first.first.duration_since(started).as_secs_f64()
    );

    for turn in 0..3 {
        let ids = prompt(100 + turn, options.context - SINGLE_TOKENS, options.vocabulary);
        let answer = complete(server.address, "bench", &ids, SINGLE_TOKENS).await?;
        let decode = answer.last.duration_since(answer.first).as_secs_f64();
        // Random weights may begin a character that they never end: its bytes come with the last token.
        if answer.last == answer.first {
            println!("one stream: all text came at once");
            continue;
        }
        println!(
            "one stream, {} tokens of context at the end: first token {:.1} ms, then {:.1} tokens/s",
            options.context,
            answer.first.duration_since(answer.sent).as_secs_f64() * 1e3,
            (answer.tokens - 1) as f64 / decode
        );
    }
    for concurrency in &options.concurrency {
        concurrent(server.address, *concurrency, options.vocabulary).await?;
    }
    Ok(())
}

async fn concurrent(address: SocketAddr, concurrency: usize, vocabulary: u64) -> io::Result<()> {
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..concurrency {
        clients.spawn(async move {
            let mut answers = Vec::new();
            for round in 0..ROUNDS {
                let ids = prompt((1000 + client * ROUNDS + round) as u64, PROMPT_TOKENS, vocabulary);
                answers.push(complete(address, "bench", &ids, ANSWER_TOKENS).await?);
            }
            Ok::<_, io::Error>(answers)
        });
    }
    let mut answers = Vec::new();
    while let Some(done) = clients.join_next().await {
        answers.extend(done.map_err(io::Error::other)??);
    }
    let seconds = started.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(|answer| answer.tokens).sum();
    let mut first: Vec<_> = answers.iter().map(|answer| answer.first - answer.sent).collect();
    let per_token = |answer: &Answer| (answer.last - answer.first) / (answer.tokens.max(2) - 1) as u32;
    let mut each: Vec<_> = answers.iter().map(per_token).collect();
    first.sort();
    each.sort();
    println!(
        "{concurrency} clients, {} requests of {PROMPT_TOKENS} in and {ANSWER_TOKENS} out: {:.0} tokens/s; first token p50 {:.0} p99 \
         {:.0} ms; per token p50 {:.2} p99 {:.2} ms",
        answers.len(),
        tokens as f64 / seconds,
        percentile(&first, 0.5),
        percentile(&first, 0.99),
        percentile(&each, 0.5),
        percentile(&each, 0.99),
    );
    Ok(())
}
