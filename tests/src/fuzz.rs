//! What must hold for any bytes from a client. `tests/fuzz` feeds these functions from libFuzzer; the end-to-end tests
//! feed them the seeds in `tests/fuzz/seeds`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use lapidary_engine::{Engine, EngineConfig, EngineHandle, KvCacheConfig, Script, ScriptedConfig, ScriptedExecutor};
use lapidary_server::{AppState, Grammars, Limits, Metrics, Phase, SamplingDefaults, ServedModel};
use lapidary_text::{
    ChatTemplate, Detokenizer, Grammar, GrammarCompiler, GrammarError, Message, PromptEnd, StopMatcher, SystemRole,
    Tokenizer,
};
use serde_json::Value;
use tokio::runtime::Runtime;
use tower::ServiceExt;

use crate::metrics::sum;

/// A target's name and the function that must not panic.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 4] = [
    ("request", request),
    ("template", template),
    ("text", text),
    ("grammar", grammar),
];

/// Context of the served model: keeps what a request can set going short.
const MAX_MODEL_LEN: u32 = 128;
/// For the engine to give back what a request had.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// An empty one of the user where the assistant begins, and the beginning of the model's.
const NUM_ADDED_TURNS: usize = 2;
/// Tokens that a text held to a grammar is followed for.
const MAX_GRAMMAR_TOKENS: usize = 24;

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let tokenizer = Tokenizer::load(&demo_dir()).unwrap_or_else(|error| panic!("the demo's tokenizer: {error}"));
    Arc::new(tokenizer)
});

static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(|| {
    let compiler = GrammarCompiler::new(&TOKENIZER, TOKENIZER.vocab_size(), &stop_token_ids());
    compiler.unwrap_or_else(|error| panic!("{error}"))
});

static TEMPLATE: LazyLock<Arc<ChatTemplate>> = LazyLock::new(|| {
    let template = ChatTemplate::load(&demo_dir(), &TOKENIZER, SystemRole::Merge);
    let template = template.unwrap_or_else(|error| panic!("{error}"));
    Arc::new(template.unwrap_or_else(|| panic!("the demo has a template")))
});

static SERVER: LazyLock<FuzzedServer> = LazyLock::new(FuzzedServer::start);

fn demo_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/demo"))
}

fn stop_token_ids() -> [u32; 2] {
    let id = |id: Option<u32>| id.unwrap_or_else(|| panic!("the demo has the token"));
    [id(TOKENIZER.eos_id()), id(TOKENIZER.end_of_turn_id())]
}

/// The router over an engine that answers anything at once.
struct FuzzedServer {
    router: Router,
    engine: EngineHandle,
    runtime: Runtime,
}

impl FuzzedServer {
    fn start() -> Self {
        let stop_token_ids: Arc<[u32]> = Arc::from(stop_token_ids());
        let vocab_size = u32::try_from(TOKENIZER.vocab_size()).unwrap_or(u32::MAX);
        let kv_cache = KvCacheConfig {
            num_blocks: 512,
            block_size: 16,
        };
        let config = EngineConfig {
            max_model_len: MAX_MODEL_LEN,
            ..EngineConfig::default()
        };
        let build = move || {
            Ok::<_, Infallible>(ScriptedExecutor::new(ScriptedConfig {
                vocab_size,
                kv_cache,
                script: Some(a_few_tokens()),
                ..ScriptedConfig::default()
            }))
        };
        let engine = Engine::spawn(config, build).unwrap_or_else(|error| panic!("{error}"));
        let limits = Limits {
            max_sequences_per_request: 8,
            trust_request_chat_template: true,
            allows_priority: true,
            ..Limits::default()
        };
        let state = AppState::new(limits, Metrics::new("demo"));
        let model = ServedModel {
            names: vec!["demo".to_owned()],
            root: "demo".to_owned(),
            created: 0,
            max_model_len: engine.max_model_len(),
            vocab_size,
            grammars: Grammars::new(Arc::clone(&TOKENIZER), vocab_size, Arc::clone(&stop_token_ids)),
            chat_template: Some(Arc::clone(&TEMPLATE)),
            tokenizer: Arc::clone(&TOKENIZER),
            system_role: SystemRole::Merge,
            eos_token_id: stop_token_ids[0],
            stop_token_ids,
            device: "cpu".to_owned(),
            kv_cache_dtype: "auto",
            defaults: SamplingDefaults::default(),
            system_fingerprint: "fp".to_owned(),
            stall_limit: None,
            engine: engine.clone(),
        };
        assert!(state.model.set(model).is_ok(), "set once");
        state.lifecycle.enter(Phase::Ready);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Self {
            router: lapidary_server::router(state),
            engine,
            runtime: runtime.unwrap_or_else(|error| panic!("{error}")),
        }
    }

    fn ask(&self, request: Request<Body>) -> (StatusCode, String) {
        let (status, body) = self.runtime.block_on(async {
            let response = self.router.clone().oneshot(request).await;
            let Ok(response) = response;
            let status = response.status();
            let body = response.into_body().collect().await;
            (status, body.map(http_body_util::Collected::to_bytes))
        });
        let body = body.unwrap_or_else(|error| panic!("the body broke off: {error}"));
        let body = String::from_utf8(body.to_vec()).unwrap_or_else(|error| panic!("{error}"));
        (status, body)
    }
}

/// Byte tokens that form no character, then the end: the awkward part of an answer.
fn a_few_tokens() -> Script {
    let told = Mutex::new(HashMap::new());
    let [_, end] = stop_token_ids();
    Script::new(move |row| {
        let mut told = told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count: &mut u32 = told.entry(row.request_id).or_default();
        *count += 1;
        let token = if *count < 4 { 200 + *count } else { end };
        if *count >= 4 {
            told.remove(&row.request_id);
        }
        Some(token)
    })
}

/// Any body to any endpoint: an answer, or an error in OpenAI's form that is the client's; nothing is left running, and
/// each request has one outcome. The first byte chooses the endpoint.
pub fn request(data: &[u8]) {
    const PATHS: [&str; 8] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/invocations",
        "/tokenize",
        "/detokenize",
        "/v1/chat/completions/render",
        "/v1/completions/render",
    ];
    let Some((first, body)) = data.split_first() else {
        return;
    };
    let path = PATHS[usize::from(*first) % PATHS.len()];
    let request = Request::post(path).body(Body::from(body.to_vec()));
    let (status, answer) = SERVER.ask(request.unwrap_or_else(|error| panic!("{error}")));
    match status.as_u16() {
        200 => {}
        400 | 404 | 408 | 413 | 429 => {
            let error: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"));
            let keys = error["error"].as_object().map(|error| error.keys().cloned().collect());
            let keys: Vec<String> = keys.unwrap_or_default();
            assert_eq!(keys, ["message", "type", "param", "code"], "{answer}");
        }
        _ => panic!("{path} answers {status}: {answer}"),
    }
    let (_, metrics) = SERVER.ask(Request::get("/metrics").body(Body::empty()).unwrap_or_default());
    let total = |name| sum(&metrics, name, &[]);
    assert_eq!(
        total("lapidary_requests_received_total"),
        total("lapidary_requests_finished_total"),
        "every request has one outcome"
    );
    assert_eq!(
        sum(
            &metrics,
            "lapidary_requests_finished_total",
            &[("outcome", "engine_error")]
        ),
        0.0
    );
    // The engine says so a moment after the last stream has ended.
    let deadline = Instant::now() + SETTLE_WITHIN;
    while SERVER.engine.stats().kv_cache_usage() > 0.0 {
        assert!(Instant::now() < deadline, "blocks are left");
        std::thread::yield_now();
    }
}

/// Conversations, and templates of clients: an answer or an error, and no text becomes a turn of its own. A first byte of 0
/// to 127 makes the rest a conversation, whose messages lie between zero bytes; else it is a template.
pub fn template(data: &[u8]) {
    let Some((&first, rest)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(rest);
    if first >= 128 {
        let Ok(template) = ChatTemplate::from_client(&text, &TOKENIZER, SystemRole::Merge) else {
            return;
        };
        let messages = [
            Message::new("user", "Hello"),
            Message::new("assistant", "<end_of_turn>"),
        ];
        if let Ok(rendered) = template.render(&messages, PromptEnd::GenerationPrompt) {
            TOKENIZER
                .encode_rendered(&rendered)
                .unwrap_or_else(|error| panic!("{error}"));
        }
        return;
    }
    let roles = ["user", "assistant", "system", "developer"];
    let parts: Vec<&str> = text.split('\0').collect();
    let messages: Vec<Message> = (0..)
        .zip(&parts)
        .map(|(index, part)| Message::new(roles[(usize::from(first) >> (index % 4 * 2)) % 4], *part))
        .collect();
    let Ok(rendered) = TEMPLATE.render(&messages, PromptEnd::GenerationPrompt) else {
        return;
    };
    let tokens = TOKENIZER
        .encode_rendered(&rendered)
        .unwrap_or_else(|error| panic!("{error}"));
    let turns = tokens
        .iter()
        .filter(|&&token| Some(token) == TOKENIZER.start_of_turn_id());
    assert!(
        turns.count() <= messages.len() + NUM_ADDED_TURNS,
        "a text became a turn: {messages:?}"
    );
    assert!(
        tokens
            .iter()
            .filter(|&&token| Some(token) == TOKENIZER.bos_id())
            .count()
            <= 1
    );
}

/// Tokens to text and its cut at stop strings: piece by piece the same as all at once. Stop strings lie between zero bytes
/// up to the first 255; each pair of bytes after it is a token.
pub fn text(data: &[u8]) {
    let end = data.iter().position(|&byte| byte == 255).unwrap_or(data.len());
    let (stops, tokens) = data.split_at(end);
    let vocab_size = TOKENIZER.vocab_size() as u32;
    let ids = tokens.get(1..).unwrap_or_default().chunks_exact(2);
    let ids: Vec<u32> = ids
        .map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]])) % (vocab_size + 8))
        .collect();
    for skip_special in [false, true] {
        let mut detokenizer = Detokenizer::new(&TOKENIZER, skip_special);
        let (mut whole, mut deltas, mut num_settled) = (String::new(), Vec::new(), 0);
        for &id in &ids {
            let before = whole.len();
            num_settled += detokenizer.push(id, &mut whole);
            deltas.push(before..whole.len());
        }
        let before = whole.len();
        num_settled += detokenizer.finish(&mut whole);
        deltas.push(before..whole.len());
        assert_eq!(num_settled, ids.len(), "every token is settled once");
        // It gives out what it holds after so many bytes; then the runs are not decoded as one.
        if ids.len() < 64 {
            assert_eq!(whole, TOKENIZER.decode(&ids, skip_special));
        }
        cut(&String::from_utf8_lossy(stops), &whole, &deltas);
    }
}

fn cut(stops: &str, whole: &str, deltas: &[std::ops::Range<usize>]) {
    let stops: Vec<&str> = stops.split('\0').collect();
    for include_stop in [false, true] {
        let Ok(mut matcher) = StopMatcher::new(&stops, include_stop) else {
            return;
        };
        let mut given = String::new();
        let mut found = None;
        for delta in deltas {
            found = found.or(matcher.push(&whole[delta.clone()], &mut given));
        }
        matcher.finish(&mut given);
        // The first byte at which any ends, and the longest that ends there.
        let ends = (1..=whole.len()).find_map(|end| {
            let here = (0..stops.len()).filter(|&index| whole.as_bytes()[..end].ends_with(stops[index].as_bytes()));
            let longest = here.max_by_key(|&index| (stops[index].len(), std::cmp::Reverse(index)))?;
            Some((end, longest))
        });
        assert_eq!(found, ends.map(|(_, index)| index));
        let expected = match ends {
            None => whole,
            Some((end, _)) if include_stop => &whole[..end],
            Some((end, index)) => &whole[..end - stops[index].len()],
        };
        assert_eq!(given, expected);
    }
}

/// Any grammar: an error, or masks of which each allowed token can be taken. The first byte chooses the kind, the second is
/// where among the allowed tokens the text goes on.
pub fn grammar(data: &[u8]) {
    let [kind, choice, rest @ ..] = data else { return };
    let source = String::from_utf8_lossy(rest).into_owned();
    let grammar = match kind % 5 {
        0 => Grammar::Regex(source),
        1 => Grammar::Lark(source),
        2 => Grammar::Choice(source.split('\0').map(str::to_owned).collect()),
        3 => match serde_json::from_str(&source) {
            Ok(schema) => Grammar::JsonSchema(schema),
            Err(_) => return,
        },
        _ => Grammar::JsonObject,
    };
    let Ok(mut state) = COMPILER.compile(&grammar) else {
        return;
    };
    for step in 0..MAX_GRAMMAR_TOKENS {
        let mask = match state.allowed_tokens() {
            Ok(Some(mask)) => mask,
            Ok(None) | Err(GrammarError::Lost { .. }) => return,
            Err(error) => panic!("{error}"),
        };
        let num_allowed: u32 = mask.iter().map(|word| word.count_ones()).sum();
        assert!(num_allowed > 0, "neither a token nor an end is allowed");
        let chosen = (usize::from(*choice) * (step + 7)) % num_allowed as usize;
        let mut allowed = (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1);
        let token = allowed.nth(chosen).unwrap_or_default();
        if stop_token_ids().contains(&token) {
            assert!(state.may_end());
            return;
        }
        match state.advance(token) {
            Ok(()) | Err(GrammarError::Lost { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
