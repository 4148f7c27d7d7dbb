//! However a request is refused or ends, it is counted as received once and as ended once.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lapidary_engine::EngineConfig;
use lapidary_server::access::{Access, ApiKeys, KeyLimits};
use lapidary_server::config::{HttpConfig, Token};
use lapidary_server::serve::{Listener, serve_on};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Server, Setup, served, tokenizer, with_messages};

const DEADLINE: Duration = Duration::from_secs(60);
/// For bodies that do not arrive. Far above what a client that leaves needs to be noticed, on a busy machine too.
const BODY_TIMEOUT: Duration = Duration::from_secs(3);
/// For the queue. Far above what the engine needs to begin a step.
const PATIENCE: Duration = Duration::from_millis(500);
const MAX_CONNECTIONS: u32 = 4;
const MAX_BODY_BYTES: usize = 8 << 10;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const KEY: &str = "sk-right";
/// Uses up what it may.
const GREEDY_KEY: &str = "sk-greedy";

/// A listening server whose model comes when it is told to, and what was sent to it.
struct Books {
    server: Server,
    address: SocketAddr,
    load: mpsc::Sender<()>,
    expected: BTreeMap<&'static str, u64>,
    /// Requests that no outcome is counted for: they generate nothing.
    num_others: u64,
}

impl Books {
    async fn open(setup: Setup) -> Self {
        let server = Setup {
            is_loaded: false,
            ..setup
        }
        .start();
        let http = HttpConfig {
            addresses: vec!["127.0.0.1:0".parse().unwrap()],
            max_connections: MAX_CONNECTIONS,
            header_read_timeout: DEADLINE,
            tls: None,
            write_timeout: DEADLINE,
            shutdown_timeout: DEADLINE,
            drain_grace: Duration::ZERO,
        };
        let listener = Listener::bind(&http).await.unwrap();
        let address = listener.local_address();
        let model = served(tokenizer().into(), server.engine.clone());
        let (load, told) = mpsc::channel();
        let state = server.state.clone();
        let load_when_told = move |_: &_| {
            told.recv().unwrap();
            Ok(model)
        };
        tokio::spawn(async move { serve_on(listener, &http, state, load_when_told).await });
        Self {
            server,
            address,
            load,
            expected: BTreeMap::new(),
            num_others: 0,
        }
    }

    fn expect(&mut self, outcome: &'static str) {
        *self.expected.entry(outcome).or_default() += 1;
    }

    /// Sends a request and checks its status.
    async fn send(&mut self, outcome: &'static str, status: u16, path: &str, key: &str, body: &Value) {
        self.expect(outcome);
        let mut socket = self.begin(path, key, "", body).await;
        assert_eq!(read_status(&mut socket).await, status, "{outcome}: {path} {body}");
    }

    async fn send_raw(&mut self, outcome: Option<&'static str>, status: u16, request: &str) {
        match outcome {
            Some(outcome) => self.expect(outcome),
            None => self.num_others += 1,
        }
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(read_status(&mut socket).await, status, "{request}");
    }

    async fn begin(&self, path: &str, key: &str, headers: &str, body: &Value) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        let body = body.to_string();
        let request = format!("{}{headers}\r\n{body}", head(path, key, body.len()));
        socket.write_all(request.as_bytes()).await.unwrap();
        socket
    }

    /// Waits until that much is in the engine's queue.
    async fn queued(&self, count: u64) {
        until(|| self.server.engine.stats().num_queued == count).await;
    }

    async fn count(&self, outcome: &str) -> f64 {
        let label = format!("outcome=\"{outcome}\"");
        self.server.metric("lapidary_requests_finished_total", &label).await
    }

    /// Compares everything with what was sent.
    async fn close(self) {
        let sent: u64 = self.expected.values().sum();
        let all = async {
            while self.server.metric("http_requests_total", "").await < (sent + self.num_others) as f64 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, all).await.unwrap();
        let counted: BTreeMap<String, u64> =
            self.server
                .outcomes()
                .await
                .into_iter()
                .fold(BTreeMap::new(), |mut sums, (outcome, count)| {
                    *sums.entry(outcome).or_default() += count;
                    sums
                });
        let expected: BTreeMap<String, u64> = self.expected.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
        assert_eq!(counted, expected);
        let received = self.server.metric("lapidary_requests_received_total", "").await;
        assert_eq!(received, sent as f64);
        let http = self.server.metric("http_requests_total", "").await;
        assert_eq!(http, (sent + self.num_others) as f64);
        self.server.assert_idle().await;
    }
}

fn head(path: &str, key: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-length: {length}\r\n"
    )
}

async fn read_status(socket: &mut TcpStream) -> u16 {
    let mut answer = Vec::new();
    match tokio::time::timeout(DEADLINE, socket.read_to_end(&mut answer))
        .await
        .unwrap()
    {
        // The server closes with some of the request unread.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        read => drop(read.unwrap()),
    }
    let text = String::from_utf8(answer).unwrap();
    text.split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("{text:?}"))
        .parse()
        .unwrap()
}

async fn until(condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < DEADLINE, "it never happens");
        tokio::task::yield_now().await;
    }
}

fn setup() -> Setup {
    let mut setup = Setup::answering(&["a"; 200]);
    setup.engine = EngineConfig {
        max_num_seqs: 1,
        max_queued_requests: 2,
        ..setup.engine
    };
    setup.limits.body_timeout = BODY_TIMEOUT;
    setup.limits.max_body_bytes = MAX_BODY_BYTES;
    let limits = KeyLimits {
        tokens_per_minute: Some(100),
        ..KeyLimits::default()
    };
    setup.access = Access {
        keys: Some(ApiKeys::new([KEY, GREEDY_KEY].map(Token::new).to_vec(), None, limits).unwrap()),
        open_metrics: true,
        ..Access::default()
    };
    setup
}

fn short() -> Value {
    json!({ "prompt": "a", "max_tokens": 2 })
}

/// Refused before the engine hears of it.
async fn send_what_is_refused_at_once(books: &mut Books) {
    books.send("invalid", 400, CHAT, KEY, &json!({ "messages": 1 })).await;
    books.send("invalid", 400, RESPONSES, KEY, &json!({ "input": 1 })).await;
    let unknown = with_messages(json!({ "model": "another" }));
    books.send("invalid", 404, CHAT, KEY, &unknown).await;
    for path in [CHAT, COMPLETIONS, RESPONSES, "/invocations"] {
        books.send("unauthorized", 401, path, "sk-wrong", &short()).await;
    }
    let long = json!({ "prompt": "a".repeat(MAX_BODY_BYTES) });
    books.send("invalid", 413, COMPLETIONS, KEY, &long).await;
    let half = format!("{}\r\n{{", head(COMPLETIONS, KEY, 99));
    books.send_raw(Some("timeout"), 408, &half).await;

    books.expect("invalid");
    let before = books.count("invalid").await;
    let mut leaving = TcpStream::connect(books.address).await.unwrap();
    leaving.write_all(half.as_bytes()).await.unwrap();
    let is_received = async {
        let received = books.expected.values().sum::<u64>() as f64;
        while books.server.metric("lapidary_requests_received_total", "").await < received {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, is_received).await.unwrap();
    drop(leaving);
    while books.count("invalid").await == before {
        tokio::task::yield_now().await;
    }
}

/// Refused by hyper, which knows no endpoint; and what is HTTP and asks for nothing that generates.
async fn send_what_has_no_endpoint(books: &mut Books) {
    books.send_raw(Some("invalid"), 400, "What is this?\r\n\r\n").await;
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(400 << 10));
    books.send_raw(Some("invalid"), 431, &long).await;
    let authorized = format!("authorization: Bearer {KEY}\r\nconnection: close\r\nhost: x");
    for (request, status) in [
        ("GET /v1/chat/completions HTTP/1.1", 405),
        ("GET /v1/embeddings HTTP/1.1", 404),
        ("GET /v1/models/tiny HTTP/1.1", 200),
    ] {
        books
            .send_raw(None, status, &format!("{request}\r\n{authorized}\r\n\r\n"))
            .await;
    }
}

/// While the engine is stuck in a step of the first of them.
async fn send_what_waits(books: &mut Books, gate: mpsc::Sender<()>) {
    let mut running = books
        .begin(COMPLETIONS, KEY, "", &json!({ "prompt": "a", "max_tokens": 30 }))
        .await;
    books.expect("length");
    // It has left the queue for its first step, which waits at the gate: patience ends between steps only.
    until(|| {
        let stats = books.server.engine.stats();
        (stats.num_queued, stats.num_running) == (0, 1)
    })
    .await;
    let patience = format!("x-queue-timeout: {}\r\n", PATIENCE.as_secs_f64());
    let mut impatient = books.begin(COMPLETIONS, KEY, &patience, &short()).await;
    books.expect("timeout");
    books.queued(1).await;
    // Its patience began before it was queued.
    let since = Instant::now();
    let leaving = books.begin(CHAT, KEY, "", &with_messages(json!({}))).await;
    books.expect("client_abort");
    books.queued(2).await;
    books.send("queue_full", 429, COMPLETIONS, KEY, &short()).await;
    drop(leaving);
    while books.count("client_abort").await == 0.0 {
        tokio::task::yield_now().await;
    }
    until(|| since.elapsed() > PATIENCE).await;
    drop(gate);
    assert_eq!(read_status(&mut impatient).await, 429);
    assert_eq!(read_status(&mut running).await, 200);
}

/// Answered, and refused for what was answered before.
async fn send_what_is_answered(books: &mut Books) {
    books.send("length", 200, COMPLETIONS, KEY, &short()).await;
    books
        .send("stop", 200, COMPLETIONS, KEY, &json!({ "prompt": "a", "stop": "a" }))
        .await;
    let streamed = json!({ "input": "a", "max_output_tokens": 2, "stream": true });
    books.send("length", 200, RESPONSES, KEY, &streamed).await;
    let long = json!({ "prompt": "a", "max_tokens": 150 });
    books.send("length", 200, COMPLETIONS, GREEDY_KEY, &long).await;
    books.send("rate_limited", 429, COMPLETIONS, GREEDY_KEY, &short()).await;
    books.expect("timeout");
    let mut late = books
        .begin(COMPLETIONS, KEY, "x-request-timeout: 0.000001\r\n", &short())
        .await;
    assert_eq!(read_status(&mut late).await, 408);
}

#[tokio::test]
async fn outcomes_add_up_to_the_requests_sent() {
    let (setup, gate) = setup().gated();
    let mut books = Books::open(setup).await;
    books.send("not_ready", 503, COMPLETIONS, KEY, &short()).await;
    books.load.send(()).unwrap();
    until(|| books.server.state.lifecycle.phase() == lapidary_server::Phase::Ready).await;

    send_what_is_refused_at_once(&mut books).await;
    send_what_has_no_endpoint(&mut books).await;
    send_what_waits(&mut books, gate).await;
    send_what_is_answered(&mut books).await;

    books.server.engine.drain();
    books.send("shutdown", 503, COMPLETIONS, KEY, &short()).await;
    let mut open = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        open.push(TcpStream::connect(books.address).await.unwrap());
    }
    books.send("queue_full", 503, COMPLETIONS, KEY, &short()).await;
    drop(open);
    books.close().await;
}
