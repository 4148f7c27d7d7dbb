//! What hostile grammars cost those who stream meanwhile: time between two tokens of other answers, with and without a
//! flood of grammars that are as dear as they can be, with those of them alone that are refused, and beside as many senders of
//! requests without a grammar, which shows what of it is merely more requests. Then what an honest grammar costs its sender while the others stream.
//!
//! `cargo bench -p lapidary-tests --bench grammars [-- MODEL]`, the bundled one if none is named. Fails when a grammar is
//! neither compiled nor refused in time.
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
const NUM_SENDERS: usize = 4;
const DURATION: Duration = Duration::from_secs(10);
/// Without senders and with each kind of them, so many times over: what else runs on the machine shows.
const NUM_ROUNDS: usize = 2;
/// A request waits five seconds for its turn and thirty for its grammar; the rest is for a busy machine.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(45);

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

/// Who sends requests beside the streams, and what they send in turn.
struct Senders {
    kind: &'static str,
    bodies: Vec<(&'static str, String)>,
}

impl Senders {
    fn nobody() -> Self {
        Self {
            kind: "nobody",
            bodies: Vec::new(),
        }
    }

    fn plain() -> Self {
        Self {
            kind: "plain",
            bodies: vec![("no grammar", json!({ "prompt": "x", "max_tokens": 8 }).to_string())],
        }
    }

    fn hostile() -> Self {
        Self {
            kind: "hostile",
            bodies: bodies(),
        }
    }

    /// Of hostile grammars, those that the server refuses each time: what comes near a limit is now compiled and now refused, and
    /// one in a hundred that is served would be the p99.
    async fn refused(address: SocketAddr) -> io::Result<Self> {
        let mut connection = Connection::open(address).await?;
        let mut refused = Self::hostile().bodies;
        for _ in 0..3 {
            let mut again = Vec::new();
            for (name, body) in refused {
                let answer = connection.request("POST", "/v1/completions", &body).await?;
                if answer.head.status == 400 {
                    again.push((name, body));
                }
            }
            refused = again;
        }
        Ok(Self {
            kind: "refused",
            bodies: refused,
        })
    }
}

/// What senders were answered.
#[derive(Debug, Default)]
struct Answers {
    by_status: BTreeMap<u16, usize>,
    longest: Duration,
}

impl Answers {
    async fn send(&mut self, connection: &mut Connection, name: &str, body: &str) -> io::Result<()> {
        let started = Instant::now();
        let answer = connection.request("POST", "/v1/completions", body).await?;
        self.longest = self.longest.max(started.elapsed());
        if !matches!(answer.head.status, 200 | 400 | 429) || started.elapsed() > MAX_ANSWER_TIME {
            let what = format!("{name}: {} after {:?}", answer.head.status, started.elapsed());
            return Err(io::Error::other(what));
        }
        *self.by_status.entry(answer.head.status).or_default() += 1;
        Ok(())
    }

    fn add(&mut self, other: &Self) {
        self.longest = self.longest.max(other.longest);
        for (status, count) in &other.by_status {
            *self.by_status.entry(*status).or_default() += count;
        }
    }
}

/// Sends all of `bodies` again and again until `until`.
async fn send(
    address: SocketAddr,
    bodies: Vec<(&'static str, String)>,
    first: usize,
    until: Instant,
) -> io::Result<Answers> {
    let mut answers = Answers::default();
    let mut connection = Connection::open(address).await?;
    for (name, body) in bodies.iter().cycle().skip(first) {
        if Instant::now() >= until {
            break;
        }
        answers.send(&mut connection, name, body).await?;
    }
    Ok(answers)
}

/// Starts streams and senders; they end at `until`.
fn start(
    address: SocketAddr,
    senders: &Senders,
    until: Instant,
) -> (JoinSet<io::Result<Vec<Duration>>>, JoinSet<io::Result<Answers>>) {
    let (mut streams, mut sending) = (JoinSet::new(), JoinSet::new());
    for _ in 0..NUM_STREAMS {
        streams.spawn(stream(address, until));
    }
    for index in 0..NUM_SENDERS {
        if !senders.bodies.is_empty() {
            sending.spawn(send(address, senders.bodies.clone(), index * 5, until));
        }
    }
    (streams, sending)
}

async fn run(server: &ServerProcess, senders: &Senders) -> io::Result<f64> {
    let (mut streams, mut sending) = start(server.address, senders, Instant::now() + DURATION);
    let mut gaps = Vec::new();
    while let Some(done) = streams.join_next().await {
        gaps.extend(done.map_err(io::Error::other)??);
    }
    let mut answers = Answers::default();
    while let Some(done) = sending.join_next().await {
        answers.add(&done.map_err(io::Error::other)??);
    }
    let p99 = percentile(gaps.iter().copied(), 0.99);
    println!(
        "{NUM_STREAMS} streams, senders {}: {} tokens, between two p50 {:.2} p99 {p99:.2} max {:.1} ms; \
         senders' answers by status {:?}, longest {:.2} s",
        senders.kind,
        gaps.len(),
        percentile(gaps.iter().copied(), 0.5),
        percentile(gaps.iter().copied(), 1.0),
        answers.by_status,
        answers.longest.as_secs_f64(),
    );
    Ok(p99)
}

/// A schema that nobody has sent before.
fn honest_schema(seed: usize, index: usize) -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags", "address"],
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 60 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "enum": [format!("tag {seed}"), format!("tag {seed} {index}")] } },
            "address": {
                "type": "object", "additionalProperties": false, "required": ["street", "zip"],
                "properties": { "street": { "type": "string" }, "zip": { "type": "string", "pattern": "^[0-9]{5}$" } },
            },
        },
    })
}

/// What an honest grammar adds to a request of one token, sent with and without it in turns.
async fn run_honest(server: &ServerProcess, seed: usize, senders: &Senders) -> io::Result<()> {
    let until = Instant::now() + DURATION;
    let (streams, sending) = start(server.address, senders, until);
    let (mut with, mut without, mut num_refused) = (Vec::new(), Vec::new(), 0_usize);
    let mut connection = Connection::open(server.address).await?;
    for index in 0.. {
        if Instant::now() >= until {
            break;
        }
        let plain = json!({ "prompt": "x", "max_tokens": 1 });
        let outputs = json!({ "json": honest_schema(seed, index) });
        let held = json!({ "prompt": "x", "max_tokens": 1, "structured_outputs": outputs });
        for (body, times) in [(plain, &mut without), (held, &mut with)] {
            let started = Instant::now();
            let answer = connection.request("POST", "/v1/completions", &body.to_string()).await?;
            match answer.head.status {
                200 => times.push(started.elapsed()),
                429 => num_refused += 1,
                status => return Err(io::Error::other(format!("an honest request was answered {status}"))),
            }
        }
    }
    streams.join_all().await.into_iter().collect::<io::Result<Vec<_>>>()?;
    sending.join_all().await.into_iter().collect::<io::Result<Vec<_>>>()?;
    let show = |times: &[Duration]| {
        let of = |share| percentile(times.iter().copied(), share);
        format!("p50 {:.1} p99 {:.1} max {:.1} ms", of(0.5), of(0.99), of(1.0))
    };
    println!(
        "{NUM_STREAMS} streams, senders {}: {} honest grammars, {num_refused} refused; a request with one {}, without {}",
        senders.kind,
        with.len(),
        show(&with),
        show(&without),
    );
    Ok(())
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let binary = match std::env::var("LAPIDARY_BINARY") {
        Ok(path) => path,
        Err(_) => lapidary_binary()?.to_string_lossy().into_owned(),
    };
    let named = std::env::args().skip(1).find(|argument| argument != "--bench");
    let model = named.unwrap_or_else(|| "demo".to_owned());
    let server = ServerProcess::start(&binary, &["serve", &model, "--port", "0"]).await?;
    let (nobody, plain, hostile) = (Senders::nobody(), Senders::plain(), Senders::hostile());
    let refused = Senders::refused(server.address).await?;
    run(&server, &nobody).await?;
    for _ in 0..NUM_ROUNDS {
        let calm = run(&server, &nobody).await?;
        for senders in [&plain, &hostile, &refused] {
            let p99 = run(&server, senders).await?;
            println!("p99 is {:.2} times what it is without senders", p99 / calm);
        }
    }
    run_honest(&server, 0, &nobody).await?;
    run_honest(&server, 1, &hostile).await?;
    Ok(())
}
