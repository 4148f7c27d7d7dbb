//! The whole front end without a model: engine thread, scheduler, detokenizer, SSE, HTTP, sockets.
//!
//! `cargo bench -p lapidary-tests --bench frontend`. The executor chooses tokens for free; the load generator shares the
//! machine's cores. First as fast as it goes (tokens a second), then paced (how much later than the executor chose it
//! does a token reach the client).

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lapidary_engine::{
    Batch, Engine, EngineConfig, Executor, ExecutorError, KvCacheConfig, RequestId, SampledToken, TokenId,
};
use lapidary_server::config::HttpConfig;
use lapidary_server::serve::{Listener, serve_on};
use lapidary_server::{AppState, Grammars, Limits, Metrics, SamplingDefaults, ServedModel};
use lapidary_tests::http::Connection;
use lapidary_text::{SystemRole, Tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

const STREAMS: usize = 256;
const TOKENS_FAST: usize = 2000;
const TOKENS_PACED: usize = 500;
const PACE: Duration = Duration::from_millis(20);
const BLOCK_SIZE: u32 = 16;
/// Prompts are `[BOS, FIRST_SLOT_TOKEN + slot]`, so that the executor knows which client a row belongs to.
const BOS: TokenId = 2;
const FIRST_SLOT_TOKEN: TokenId = 1000;
/// Answers walk through this many ordinary tokens.
const ANSWER_TOKENS: TokenId = 500;

fn nanos_now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// When the executor chose each token of each stream.
#[derive(Debug)]
struct ChosenAt(Vec<Vec<AtomicU64>>);

impl ChosenAt {
    fn new(tokens: usize) -> Arc<Self> {
        Arc::new(Self(
            (0..STREAMS)
                .map(|_| (0..tokens).map(|_| AtomicU64::new(0)).collect())
                .collect(),
        ))
    }
}

struct FreeExecutor {
    slots: HashMap<RequestId, usize>,
    chosen_at: Arc<ChosenAt>,
    pace: Option<Duration>,
    last_step: Instant,
    /// Per sample of the launched step: slot and index of the token in its answer.
    launched: Vec<(usize, usize)>,
}

impl Executor for FreeExecutor {
    fn kv_cache_config(&self) -> KvCacheConfig {
        let blocks_per_stream = (TOKENS_FAST as u32 + 2).div_ceil(BLOCK_SIZE) + 1;
        KvCacheConfig {
            num_blocks: blocks_per_stream * STREAMS as u32,
            block_size: BLOCK_SIZE,
        }
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), ExecutorError> {
        for (sequence, id) in batch.request_ids.iter().enumerate() {
            let row = batch.query_start[sequence] as usize;
            if batch.positions[row] <= 1 {
                let slot_row = row + 1 - batch.positions[row] as usize;
                self.slots
                    .insert(*id, (batch.token_ids[slot_row] - FIRST_SLOT_TOKEN) as usize);
            }
        }
        let sequence_of = |row: u32| batch.query_start.partition_point(|start| *start <= row) - 1;
        self.launched.clear();
        self.launched.extend(batch.samples.iter().map(|sample| {
            let id = batch.request_ids[sequence_of(sample.row)];
            (self.slots[&id], sample.position as usize - 2)
        }));
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError> {
        if let Some(pace) = self.pace {
            std::thread::sleep(pace.saturating_sub(self.last_step.elapsed()));
            self.last_step = Instant::now();
        }
        let now = nanos_now();
        let choose = |&(slot, index): &(usize, usize)| {
            self.chosen_at.0[slot][index].store(now, Ordering::Relaxed);
            SampledToken {
                token: FIRST_SLOT_TOKEN + (index as TokenId % ANSWER_TOKENS),
                logprobs: None,
            }
        };
        Ok(self.launched.iter().map(choose).collect())
    }
}

/// What `lapidary serve` would have loaded, around an engine that runs `FreeExecutor`.
fn model(tokenizer: Tokenizer, executor: impl FnOnce() -> FreeExecutor + Send + 'static) -> ServedModel {
    let config = EngineConfig {
        enable_prefix_caching: false,
        ..EngineConfig::default()
    };
    let engine = Engine::spawn(config, move || Ok::<_, io::Error>(executor())).expect("the executor cannot fail");
    let tokenizer = Arc::new(tokenizer);
    let vocab_size = u32::try_from(tokenizer.vocab_size()).expect("a vocabulary fits u32");
    let stop_token_ids: Arc<[TokenId]> = Arc::from([1]);
    ServedModel {
        names: vec!["bench".to_owned()],
        root: "bench".to_owned(),
        created: 0,
        max_model_len: config.max_model_len,
        vocab_size,
        grammars: Grammars::new(Arc::clone(&tokenizer), vocab_size, Arc::clone(&stop_token_ids)),
        tokenizer,
        chat_template: None,
        system_role: SystemRole::Merge,
        eos_token_id: 1,
        stop_token_ids,
        device: "cpu".to_owned(),
        kv_cache_dtype: "auto",
        defaults: SamplingDefaults::default(),
        system_fingerprint: "bench".to_owned(),
        stall_limit: None,
        engine,
    }
}

/// The production server, accept loop included, on its own runtime and port.
fn serve(chosen_at: Arc<ChosenAt>, pace: Option<Duration>) -> Result<(Runtime, SocketAddr), Box<dyn Error>> {
    let http = HttpConfig {
        addresses: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        max_connections: 4096,
        header_read_timeout: Duration::from_secs(60),
        tls: None,
        write_timeout: Duration::from_secs(60),
        shutdown_timeout: Duration::from_secs(1),
        drain_grace: Duration::ZERO,
    };
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo");
    let tokenizer = Tokenizer::load(&demo)?;
    let state = AppState::new(Limits::default(), Metrics::new("bench"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let listener = runtime.block_on(Listener::bind(&http))?;
    let address = listener.local_address();
    runtime.spawn(async move {
        let executor = move || FreeExecutor {
            slots: HashMap::new(),
            chosen_at,
            pace,
            last_step: Instant::now(),
            launched: Vec::new(),
        };
        serve_on(listener, &http, state, move |_| Ok(model(tokenizer, executor))).await
    });
    Ok((runtime, address))
}

/// One client: nanoseconds from choice to arrival for each token.
async fn stream(address: SocketAddr, slot: usize, tokens: usize, chosen_at: Arc<ChosenAt>) -> io::Result<Vec<u64>> {
    let body = format!(
        r#"{{"prompt":[{BOS},{}],"max_tokens":{tokens},"stream":true,"ignore_eos":true,"temperature":0}}"#,
        FIRST_SLOT_TOKEN as usize + slot
    );
    let mut socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).await?;

    let event = memchr::memmem::Finder::new(b"data: {");
    let mut latencies = Vec::with_capacity(tokens);
    let mut buffer = Vec::with_capacity(64 << 10);
    loop {
        if socket.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let now = nanos_now();
        let mut used = 0;
        while let Some(found) = event.find(&buffer[used..]) {
            used += found + event.needle().len();
            if let Some(chosen) = chosen_at.0[slot].get(latencies.len()) {
                latencies.push(now.saturating_sub(chosen.load(Ordering::Relaxed)));
            }
        }
        if memchr::memmem::find(&buffer[used..], b"data: [DONE]").is_some() {
            return Ok(latencies);
        }
        // An event's start may lie across two reads.
        let keep_from = used.max(buffer.len().saturating_sub("data: [DONE]".len()));
        buffer.drain(..keep_from);
    }
}

async fn ready(address: SocketAddr) -> io::Result<()> {
    while Connection::open(address)
        .await?
        .request("GET", "/ready", "")
        .await?
        .head
        .status
        != 200
    {
        tokio::task::yield_now().await;
    }
    Ok(())
}

fn run(tokens: usize, pace: Option<Duration>) -> Result<(Duration, Vec<u64>), Box<dyn Error>> {
    let chosen_at = ChosenAt::new(tokens);
    let (_server, address) = serve(Arc::clone(&chosen_at), pace)?;
    let clients = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    clients.block_on(ready(address))?;
    let started = Instant::now();
    let streams: Vec<_> = (0..STREAMS)
        .map(|slot| clients.spawn(stream(address, slot, tokens, Arc::clone(&chosen_at))))
        .collect();
    let mut latencies = Vec::with_capacity(STREAMS * tokens);
    for stream in streams {
        let answer = clients.block_on(stream)??;
        assert_eq!(answer.len(), tokens, "a stream lost tokens");
        latencies.extend(answer);
    }
    Ok((started.elapsed(), latencies))
}

fn main() -> Result<(), Box<dyn Error>> {
    nanos_now();
    let (elapsed, latencies) = run(TOKENS_FAST, None)?;
    println!(
        "{STREAMS} streams, as fast as it goes: {:.0} tokens/s ({} tokens in {:.2} s)",
        latencies.len() as f64 / elapsed.as_secs_f64(),
        latencies.len(),
        elapsed.as_secs_f64()
    );
    let (_, mut latencies) = run(TOKENS_PACED, Some(PACE))?;
    latencies.sort_unstable();
    let percentile = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize] as f64 / 1e6;
    println!(
        "{STREAMS} streams, a step each {PACE:?} ({:.0} tokens/s): added latency p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        STREAMS as f64 / PACE.as_secs_f64(),
        percentile(0.5),
        percentile(0.9),
        percentile(0.99),
        percentile(1.0)
    );
    Ok(())
}
