//! The router over a scripted engine and a small tokenizer of Gemma's kind.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::needless_pass_by_value, reason = "tests pass literals")]

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use lapidary_engine::{
    Engine, EngineConfig, EngineHandle, KvCacheConfig, Script, ScriptedConfig, ScriptedExecutor, TokenId,
};
use lapidary_server::access::Access;
use lapidary_server::{AppState, Grammars, Limits, Metrics, Phase, SamplingDefaults, ServedModel};
use lapidary_text::{ChatTemplate, SystemRole, Tokenizer};
use serde_json::Value;
use tower::ServiceExt;

pub(crate) const MODEL: &str = "tiny";
pub(crate) const END_OF_TURN: TokenId = 107;
pub(crate) const EOS: TokenId = 1;
/// Far more than the end of a step takes.
const IDLE_WITHIN: Duration = Duration::from_secs(60);

/// What the server under test is made of.
pub(crate) struct Setup {
    /// The answer to every request, token by token in the vocabulary's spelling; then `<end_of_turn>` for ever.
    pub(crate) answer: Vec<&'static str>,
    pub(crate) engine: EngineConfig,
    pub(crate) scripted: ScriptedConfig,
    pub(crate) limits: Limits,
    pub(crate) access: Access,
    pub(crate) is_loaded: bool,
    /// Of the model's steps.
    pub(crate) stall_limit: Option<Duration>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            answer: vec!["▁hello", "▁world"],
            engine: EngineConfig {
                max_model_len: 256,
                ..EngineConfig::default()
            },
            scripted: ScriptedConfig {
                kv_cache: KvCacheConfig {
                    num_blocks: 256,
                    block_size: 16,
                },
                ..ScriptedConfig::default()
            },
            limits: Limits::default(),
            access: Access::default(),
            is_loaded: true,
            stall_limit: None,
        }
    }
}

impl Setup {
    pub(crate) fn answering(answer: &[&'static str]) -> Self {
        Self {
            answer: answer.to_vec(),
            ..Self::default()
        }
    }

    /// Steps wait for a message each; all run once the sender is dropped.
    pub(crate) fn gated(mut self) -> (Self, mpsc::Sender<()>) {
        let (sender, gate) = mpsc::channel();
        self.scripted.gate = Some(gate);
        (self, sender)
    }

    pub(crate) fn failing_at(mut self, attempts: impl IntoIterator<Item = u64>) -> Self {
        self.scripted.failing_collects = attempts.into_iter().collect::<BTreeSet<_>>();
        self
    }

    pub(crate) fn start(self) -> Server {
        let tokenizer = Arc::new(tokenizer());
        let answer: Vec<TokenId> = self.answer.iter().map(|piece| id_of(&tokenizer, piece)).collect();
        let mut scripted = self.scripted;
        scripted.vocab_size = u32::try_from(tokenizer.vocab_size()).unwrap();
        if scripted.script.is_none() {
            scripted.script = Some(always(answer));
        }
        let build = move || Ok::<_, Infallible>(ScriptedExecutor::new(scripted));
        let engine = Engine::spawn(self.engine, build).unwrap();
        let state = AppState::with_access(self.limits, Metrics::new(MODEL), self.access);
        if self.is_loaded {
            let model = ServedModel {
                stall_limit: self.stall_limit,
                ..served(tokenizer, engine.clone())
            };
            state.model.set(model).unwrap();
            state.lifecycle.enter(Phase::Ready);
        }
        Server {
            router: lapidary_server::router(state.clone()),
            state,
            engine,
        }
    }
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::load(&tiny_dir()).unwrap()
}

fn tiny_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../text/tests/tiny"))
}

fn id_of(tokenizer: &Tokenizer, piece: &str) -> TokenId {
    tokenizer
        .token_to_id(piece)
        .unwrap_or_else(|| panic!("no token {piece:?}"))
}

/// The same answer to every request.
fn always(answer: Vec<TokenId>) -> Script {
    let told = Mutex::new(HashMap::new());
    Script::new(move |row| {
        let mut told = told.lock().unwrap();
        let count: &mut usize = told.entry(row.request_id).or_default();
        *count += 1;
        Some(answer.get(*count - 1).copied().unwrap_or(END_OF_TURN))
    })
}

pub(crate) fn served(tokenizer: Arc<Tokenizer>, engine: EngineHandle) -> ServedModel {
    let stop_token_ids: Arc<[TokenId]> = Arc::from([EOS, END_OF_TURN]);
    let vocab_size = u32::try_from(tokenizer.vocab_size()).unwrap();
    let template = ChatTemplate::load(&tiny_dir(), &tokenizer, SystemRole::Merge).unwrap();
    ServedModel {
        names: vec![MODEL.to_owned(), "org/tiny".to_owned()],
        root: "/models/tiny".to_owned(),
        created: 1_755_500_000,
        max_model_len: engine.max_model_len(),
        vocab_size,
        grammars: Grammars::new(Arc::clone(&tokenizer), vocab_size, Arc::clone(&stop_token_ids)),
        chat_template: template.map(Arc::new),
        tokenizer,
        system_role: SystemRole::Merge,
        eos_token_id: EOS,
        stop_token_ids,
        device: "cpu".to_owned(),
        kv_cache_dtype: "auto",
        defaults: SamplingDefaults::default(),
        system_fingerprint: "fp_test".to_owned(),
        stall_limit: None,
        engine,
    }
}

/// A running server, reached without sockets.
pub(crate) struct Server {
    pub(crate) router: Router,
    pub(crate) state: AppState,
    pub(crate) engine: EngineHandle,
}

/// A response, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Data of all events.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.body
            .split_terminator("\n\n")
            .map(|event| event.strip_prefix("data: ").expect("an event"))
            .collect()
    }

    /// Events as JSON, without the end mark.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        let (done, chunks) = events.split_last().expect("a stream has events");
        assert_eq!(*done, "[DONE]");
        chunks
            .iter()
            .map(|chunk| serde_json::from_str(chunk).expect("chunks are JSON"))
            .collect()
    }
}

impl Server {
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    pub(crate) async fn post(&self, path: &str, body: impl ToString) -> Answer {
        self.send(post_request(path, body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat/completions", with_messages(body)).await
    }

    pub(crate) async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", body).await
    }

    /// The sum of a metric's samples whose labels contain `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let value = |line: &str| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap();
        let is_sample = |line: &&str| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']);
        text.lines()
            .filter(is_sample)
            .filter(|line| line.contains(label))
            .map(value)
            .sum()
    }

    /// Outcomes that were counted, as `(outcome, count)`.
    pub(crate) async fn outcomes(&self) -> Vec<(String, u64)> {
        let text = self.get("/metrics").await.body;
        let lines = text
            .lines()
            .filter(|line| line.starts_with("lapidary_requests_finished_total"));
        let mut counted: Vec<(String, u64)> = Vec::new();
        for line in lines {
            let outcome = line.split("outcome=\"").nth(1).unwrap().split('"').next().unwrap();
            let count: u64 = line.rsplit_once(' ').unwrap().1.parse().unwrap();
            if count > 0 {
                counted.push((outcome.to_owned(), count));
            }
        }
        counted
    }

    /// Every block is free and nothing runs; soon, where a step in flight still writes to some.
    pub(crate) async fn assert_idle(&self) {
        self.engine.idle().await;
        let since = Instant::now();
        loop {
            let stats = self.engine.stats();
            let is_free = stats.blocks_free == stats.blocks_total;
            if is_free && (stats.num_running, stats.num_waiting) == (0, 0) {
                return;
            }
            assert!(since.elapsed() < IDLE_WITHIN, "{stats:?}");
            tokio::task::yield_now().await;
        }
    }
}

pub(crate) fn post_request(path: &str, body: impl ToString) -> Request<Body> {
    Request::post(path).body(Body::from(body.to_string())).unwrap()
}

/// `body` with a message, unless it has some.
pub(crate) fn with_messages(mut body: Value) -> Value {
    if body.get("messages").is_none() {
        body["messages"] = serde_json::json!([{ "role": "user", "content": "hello" }]);
    }
    body
}
