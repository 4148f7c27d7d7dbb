//! What attacks cost: resident memory before, at most and after each, and how long other clients wait meanwhile.
//!
//! `cargo bench -p lapidary-tests --bench hostile`. Fails when another client is not answered, or memory grows beyond what
//! bodies and connections may take. The 10,000 connections need as many descriptors; `LAPIDARY_BINARY` names a binary to
//! use instead of building one.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lapidary_tests::hostile::{converse, drip, flood};
use lapidary_tests::http::Connection;
use lapidary_tests::load::percentile;
use lapidary_tests::process::{ServerProcess, lapidary_binary};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const NUM_IDLE: usize = 10_000;
const NUM_CLIENTS: usize = 64;
/// Bodies that would parse into many times their size are sent by fewer: together they are a fraction of what bodies may take.
const NUM_AMPLIFIERS: usize = 4;
const AMPLIFIED_BYTES: usize = 8 << 20;
/// Attacks that do not end by themselves.
const DURATION: Duration = Duration::from_secs(10);
const WATCH_INTERVAL: Duration = Duration::from_millis(5);
const ASK_INTERVAL: Duration = Duration::from_millis(50);
/// Beyond it: bodies together may take 256 MiB.
const MAX_GROWTH: u64 = 384 << 20;

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Another client's request, on a connection of its own.
async fn ask(address: SocketAddr) -> io::Result<Duration> {
    let started = Instant::now();
    let body = r#"{"prompt":"What is 1 + 1?","max_tokens":8,"temperature":0}"#;
    let mut connection = Connection::open(address).await?;
    let response = connection.request("POST", "/v1/completions", body).await?;
    match response.head.status {
        200 => Ok(started.elapsed()),
        status => Err(io::Error::other(format!("{status}: {}", response.body))),
    }
}

/// Lets `attack` go on, and prints what it cost.
async fn measure<T>(server: &ServerProcess, what: &str, attack: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let before = server.resident_bytes()?;
    let started = Instant::now();
    let mut most = before;
    let watching = async {
        loop {
            most = most.max(server.resident_bytes()?);
            sleep(WATCH_INTERVAL).await;
        }
    };
    let mut waits = Vec::new();
    let asking = async {
        loop {
            waits.push(ask(server.address).await?);
            sleep(ASK_INTERVAL).await;
        }
    };
    let ended: io::Result<T> = tokio::select! {
        ended = attack => ended,
        failed = watching => failed,
        failed = asking => failed,
    };
    let ended = ended?;
    let seconds = started.elapsed().as_secs_f64();
    let after = server.resident_bytes()?;
    println!(
        "{what}: {:.1} MiB before, {:.1} at most, {:.1} after; {} answers to others in {seconds:.1} s, p50 {:.0} p99 {:.0} ms",
        mib(before),
        mib(most),
        mib(after),
        waits.len(),
        percentile(waits.iter().copied(), 0.5),
        percentile(waits.iter().copied(), 0.99),
    );
    if most - before > MAX_GROWTH {
        return Err(io::Error::other(format!("{what} took {:.0} MiB", mib(most - before))));
    }
    Ok(ended)
}

/// `attack` by many, again and again, for as long as [`DURATION`]; each must end by itself.
async fn repeat<F: Future<Output = io::Result<String>> + Send + 'static>(
    num_clients: usize,
    attack: impl Fn() -> F + Clone + Send + 'static,
    expected: &'static [&'static str],
) -> io::Result<()> {
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..num_clients {
        let attack = attack.clone();
        clients.spawn(async move {
            while started.elapsed() < DURATION {
                let answer = attack().await?;
                if !answer.is_empty() && !expected.iter().any(|status| answer.starts_with(status)) {
                    return Err(io::Error::other(answer));
                }
            }
            Ok(())
        });
    }
    while let Some(done) = clients.join_next().await {
        done.map_err(io::Error::other)??;
    }
    Ok(())
}

async fn floods(
    server: &ServerProcess,
    what: &str,
    head: String,
    unit: Vec<u8>,
    expected: &'static [&'static str],
) -> io::Result<()> {
    let address = server.address;
    let attack = move || {
        let (head, unit) = (head.clone(), unit.clone());
        async move { Ok(flood(address, head, unit).await) }
    };
    measure(server, what, repeat(NUM_CLIENTS, attack, expected)).await
}

/// Many connections that say nothing, or not enough; then all of them gone.
async fn idle(server: &ServerProcess) -> io::Result<()> {
    let mut clients = Vec::with_capacity(NUM_IDLE);
    let opening = async {
        for index in 0..NUM_IDLE {
            let mut client = TcpStream::connect(server.address).await?;
            if index % 2 == 1 {
                // Beyond the bound the server may have closed it already.
                client
                    .write_all(b"POST /v1/completions HTTP/1.1\r\nhos")
                    .await
                    .unwrap_or_default();
            }
            clients.push(client);
        }
        sleep(Duration::from_secs(3)).await;
        Ok(())
    };
    measure(
        server,
        "10,000 connections, half of them idle, half in their head",
        opening,
    )
    .await
}

fn post(framing: &str) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n")
}

/// Heads and bodies that go on until they are refused.
async fn endless(server: &ServerProcess) -> io::Result<()> {
    let line = "x-flood: 1\r\n".repeat(1000).into_bytes();
    floods(
        server,
        "many headers",
        "GET /live HTTP/1.1\r\n".to_owned(),
        line,
        &["HTTP/1.1 431"],
    )
    .await?;
    floods(
        server,
        "long headers",
        "GET /live HTTP/1.1\r\nx: ".to_owned(),
        vec![b'x'; 16 << 10],
        &["HTTP/1.1 431"],
    )
    .await?;
    floods(
        server,
        "1 GB by its length",
        post("content-length: 1000000000"),
        vec![b' '; 1 << 16],
        &["HTTP/1.1 413"],
    )
    .await?;
    let mut chunk = b"10000\r\n".to_vec();
    chunk.resize(chunk.len() + 0x10000, b' ');
    chunk.extend(b"\r\n");
    floods(
        server,
        "1 GB in chunks",
        post("transfer-encoding: chunked"),
        chunk,
        // Only some of them find room in time.
        &["HTTP/1.1 413", "HTTP/1.1 429"],
    )
    .await
}

/// Bodies of few bytes for each value that a parser makes of them: a path, what comes before and after, and what is repeated.
const AMPLIFIERS: [(&str, &str, &str, &str); 14] = [
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"x":["#,
        "0,",
        "0]}}}}",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"a"}],"guided_json":["#,
        r#"{"a":0},"#,
        "0]}",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"function":{"name":"a","parameters":{"x":["#,
        r#"{"a":0},"#,
        "0]}}}]}",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"x":["#,
        r#"{"a":0},"#,
        "0]}}",
    ),
    ("/v1/chat/completions", r#"{"messages":["#, "{},", "{}]}"),
    (
        "/v1/chat/completions",
        r#"{"messages":["#,
        r#"{"role":"tool"},"#,
        r#"{"role":"tool"}]}"#,
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"user","content":["#,
        "{},",
        "{}]}]}",
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"assistant","tool_calls":["#,
        "{},",
        r#"{}]},{"role":"bogus","content":"a"}]}"#,
    ),
    (
        "/v1/chat/completions",
        r#"{"messages":[{"role":"bogus","content":"a","tool_calls":[{"function":{"name":"a","arguments":["#,
        r#"{"a":0},"#,
        "0]}}]}]}",
    ),
    ("/v1/responses", r#"{"input":["#, "{},", "{}]}"),
    (
        "/v1/responses",
        r#"{"input":"a","metadata":{"#,
        r#""a":[],"#,
        r#""b":0}}"#,
    ),
    ("/v1/completions", r#"{"prompt":["#, "0,", "0]}"),
    ("/v1/completions", r#"{"prompt":["#, "[0],", "[0]]}"),
    ("/v1/completions", r#"{"prompt":"a","stop":["#, r#""","#, r#"""]}"#),
];

/// Bodies that would take many times their size once they are parsed.
async fn amplified(server: &ServerProcess) -> io::Result<()> {
    let address = server.address;
    for (path, before, unit, after) in AMPLIFIERS {
        let body = [before, &unit.repeat(AMPLIFIED_BYTES / unit.len()), after].concat();
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n");
        let request: Arc<[u8]> = [head, body].concat().into_bytes().into();
        let attack = move || {
            let request = Arc::clone(&request);
            async move { converse(address, &request).await }
        };
        let what = format!("{path} {before}{unit}...");
        measure(server, &what, repeat(NUM_AMPLIFIERS, attack, &["HTTP/1.1 400"])).await?;
    }
    Ok(())
}

/// Requests that are whole or slow, and answers that nobody reads.
async fn ended(server: &ServerProcess) -> io::Result<()> {
    let address = server.address;
    let deep = [b"{\"prompt\":".to_vec(), b"[".repeat(100_000)].concat();
    let head = post(&format!("connection: close\r\ncontent-length: {}", deep.len()));
    let deep = [head.into_bytes(), deep].concat();
    let attack = move || {
        let deep = deep.clone();
        async move { converse(address, &deep).await }
    };
    measure(
        server,
        "JSON 100,000 deep",
        repeat(NUM_CLIENTS, attack, &["HTTP/1.1 400"]),
    )
    .await?;

    let slow = move || {
        drip(
            address,
            "GET /live HTTP/1.1\r\nhost: x\r\nx: ",
            Duration::from_millis(100),
        )
    };
    measure(
        server,
        "heads by the byte",
        repeat(NUM_CLIENTS, slow, &["HTTP/1.1 408"]),
    )
    .await?;

    let unread = r#"{"prompt":"Hello","stream":true,"ignore_eos":true,"max_tokens":2000}"#;
    let unread = post(&format!("content-length: {}", unread.len())) + unread;
    let not_reading = async {
        let mut clients = Vec::new();
        for _ in 0..16 {
            let mut client = TcpStream::connect(address).await?;
            client.write_all(unread.as_bytes()).await?;
            clients.push(client);
        }
        timeout(DURATION, std::future::pending::<()>())
            .await
            .unwrap_or_default();
        Ok(())
    };
    measure(server, "16 answers that nobody reads", not_reading).await
}

/// The system's default would not do; the server raises its own.
fn raise_descriptor_limit() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

#[tokio::main]
async fn main() -> io::Result<()> {
    raise_descriptor_limit()?;
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let max_connections = (NUM_IDLE + 1000).to_string();
    let arguments = [
        "serve",
        "demo",
        "--port",
        "0",
        "--header-read-timeout",
        "8s",
        "--max-connections",
        &max_connections,
    ];
    let server = ServerProcess::start(&binary, &arguments).await?;
    measure(&server, "nothing", async {
        sleep(DURATION).await;
        Ok(())
    })
    .await?;

    idle(&server).await?;
    amplified(&server).await?;
    endless(&server).await?;
    ended(&server).await
}
