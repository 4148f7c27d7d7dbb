//! What every handler can reach. Handlers get it by clone; it is one `Arc`.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lapidary_engine::{EngineHandle, TokenId};
use lapidary_text::{ChatTemplate, SystemRole, Tokenizer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::access::Access;
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use crate::traces::Tracer;

/// Shared by all handlers.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Shared>);

/// The parts of [`AppState`].
#[derive(Debug)]
pub struct Shared {
    /// Loading, ready, draining.
    pub lifecycle: Lifecycle,
    /// Set once, when the model is loaded: the listener is up before that.
    pub model: OnceLock<ServedModel>,
    /// Counters and histograms.
    pub metrics: Metrics,
    /// Takes a span of each request; set before the first one, if traces are exported.
    pub traces: OnceLock<Tracer>,
    /// What a client may ask for.
    pub limits: Limits,
    /// Who may ask.
    pub access: Access,
    /// One permit for each long text that may be parsed or tokenised at the same time: as many as there are cores.
    long_work: Arc<Semaphore>,
    /// One permit for each KiB of large bodies that may be in memory at the same time.
    body_room: Arc<Semaphore>,
    max_body_room: u32,
}

impl AppState {
    /// A state without a model that lets everybody in.
    #[must_use]
    pub fn new(limits: Limits, metrics: Metrics) -> Self {
        Self::with_access(limits, metrics, Access::default())
    }

    /// A state without a model.
    #[must_use]
    pub fn with_access(limits: Limits, metrics: Metrics, access: Access) -> Self {
        let max_body_room = kib(limits.max_bodies_bytes);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Shared {
            lifecycle: Lifecycle::default(),
            model: OnceLock::new(),
            metrics,
            traces: OnceLock::new(),
            limits,
            access,
            long_work: Arc::new(Semaphore::new(cores)),
            body_room: Arc::new(Semaphore::new(max_body_room as usize)),
            max_body_room,
        }))
    }

    /// The model a request may use. While the process drains it still is: the engine says when it takes no more.
    pub(crate) fn served_model(&self, name: Option<&str>) -> Result<&ServedModel, ApiError> {
        let phase = self.lifecycle.phase();
        let Some(model) = self.model.get() else {
            return Err(match phase {
                Phase::Failed => ApiError::EngineDead,
                Phase::Draining => ApiError::ShuttingDown,
                _ => ApiError::ModelLoading { phase: phase.as_str() },
            });
        };
        if let Some(name) = name.filter(|name| !model.names.iter().any(|known| known == name)) {
            return Err(ApiError::ModelNotFound { model: name.to_owned() });
        }
        match phase {
            Phase::Ready | Phase::Draining => Ok(model),
            Phase::Failed => Err(ApiError::EngineDead),
            _ => Err(ApiError::ModelLoading { phase: phase.as_str() }),
        }
    }

    /// Computes here if that is short; else on a thread where it holds up no other request.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        is_long: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        if !is_long {
            return Ok(work());
        }
        let permit = Arc::clone(&self.long_work).acquire_owned().await;
        let work = move || {
            let result = work();
            drop(permit);
            result
        };
        tokio::task::spawn_blocking(work).await.map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "work on a request panicked");
            ApiError::Internal { is_deterministic: true }
        })
    }

    /// Room in memory for a body of so many bytes, once there is.
    pub(crate) async fn body_room(&self, num_bytes: usize) -> OwnedSemaphorePermit {
        let room = kib(num_bytes).min(self.max_body_room);
        let acquired = Arc::clone(&self.body_room).acquire_many_owned(room).await;
        acquired.expect("the semaphore is never closed")
    }

    /// Why nothing will run any more.
    pub(crate) fn engine_death(&self) -> Option<&str> {
        self.model.get()?.engine.death()
    }

    /// Since when the engine is stuck in a step.
    pub(crate) fn engine_stall(&self) -> Option<Duration> {
        let model = self.model.get()?;
        let heartbeat = model.engine.heartbeat();
        let is_stuck = heartbeat.busy && heartbeat.since_progress > model.stall_limit?;
        is_stuck.then_some(heartbeat.since_progress)
    }
}

/// Permits of [`AppState::body_room`] for so many bytes.
pub(crate) fn kib(num_bytes: usize) -> u32 {
    u32::try_from(num_bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

impl std::ops::Deref for AppState {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// The loaded model and the engine that runs it.
#[derive(Debug)]
pub struct ServedModel {
    /// Names clients may call it by; the first is the one answers carry.
    pub names: Vec<String>,
    /// Path or repository it came from.
    pub root: String,
    /// Unix time it was loaded.
    pub created: u64,
    /// Prompt and answer together, in tokens.
    pub max_model_len: u32,
    /// Rows of the embedding table: token ids are below this.
    pub vocab_size: u32,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Absent: `/v1/chat/completions` refuses.
    pub chat_template: Option<Arc<ChatTemplate>>,
    /// What happens to system messages.
    pub system_role: SystemRole,
    /// The token whose stop is reported with `stop_reason: null`.
    pub eos_token_id: TokenId,
    /// Compiles what answers are held to.
    pub grammars: Arc<Grammars>,
    /// All tokens that end an answer, `eos_token_id` included.
    pub stop_token_ids: Arc<[TokenId]>,
    /// What runs it: `cpu`, or the GPU's name.
    pub device: String,
    /// How keys and values are kept, as it was set.
    pub kv_cache_dtype: &'static str,
    /// Used where a request is silent.
    pub defaults: SamplingDefaults,
    /// Identifies build, checkpoint, KV cache and backend: equal fingerprints and seeds give equal answers.
    pub system_fingerprint: String,
    /// A step that takes longer makes `/health` and `/ready` fail; `None` where nobody knows what a step may take.
    pub stall_limit: Option<Duration>,
    /// Runs it.
    pub engine: EngineHandle,
}

/// Sampling values of the checkpoint's `generation_config.json`, OpenAI's defaults where it has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// 1 unless the checkpoint says otherwise.
    pub temperature: f32,
    /// 1 unless the checkpoint says otherwise.
    pub top_p: f32,
    /// 0 (off) unless the checkpoint says otherwise.
    pub top_k: u32,
    /// 0 (off) unless the checkpoint says otherwise.
    pub min_p: f32,
    /// 1 (off) unless the checkpoint says otherwise.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// Bounds on what one request may cost, and what it may ask for.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Alternatives a `logprobs` request may name (`--max-logprobs`).
    pub max_logprobs: u32,
    /// Whether requests may name a `priority` (`--scheduling-policy priority`).
    pub allows_priority: bool,
    /// Log-probabilities of prompt tokens and their alternatives in one request; an answer takes some 50 bytes for each.
    pub max_scored_logprobs: u64,
    /// Sequences of one request: `n` times the number of prompts.
    pub max_sequences_per_request: u32,
    /// Stop strings of one request.
    pub max_stop_strings: usize,
    /// Bytes of a request body.
    pub max_body_bytes: usize,
    /// Bytes of all large request bodies that are read and parsed at the same time; further ones wait.
    pub max_bodies_bytes: usize,
    /// Requests may bring a chat template of their own (`--trust-request-chat-template`).
    pub trust_request_chat_template: bool,
    /// Usage says how many prompt tokens were cached (`--enable-prompt-tokens-details`).
    pub prompt_tokens_details: bool,
    /// Every stream ends with usage (`--enable-force-include-usage`).
    pub force_include_usage: bool,
    /// Answers say how long they took (`--enable-per-request-metrics`).
    pub per_request_metrics: bool,
    /// Silence on a stream after which a comment line is sent; zero sends none.
    pub sse_keep_alive: Duration,
    /// Server-wide bound on a request's life; none by default.
    pub request_timeout: Option<Duration>,
    /// Foreseen wait for the first step above which a request is refused at once; none by default.
    pub max_queue_wait: Option<Duration>,
    /// Server-wide bound on the wait for the first step; none by default.
    pub queue_timeout: Option<Duration>,
    /// Time for a request's body to arrive.
    pub body_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_logprobs: 20,
            allows_priority: false,
            // 128 contexts of 8192 tokens with one alternative each, twice.
            max_scored_logprobs: 1 << 22,
            max_sequences_per_request: 128,
            max_stop_strings: 16,
            max_body_bytes: 32 << 20,
            max_bodies_bytes: 256 << 20,
            trust_request_chat_template: false,
            prompt_tokens_details: true,
            force_include_usage: false,
            per_request_metrics: false,
            sse_keep_alive: Duration::from_secs(15),
            max_queue_wait: None,
            request_timeout: None,
            queue_timeout: None,
            body_timeout: Duration::from_secs(60),
        }
    }
}
