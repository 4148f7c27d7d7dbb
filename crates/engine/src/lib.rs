//! Decides which tokens run next; knows no tensors, text or HTTP.
//!
//! A caller gives an [`EngineHandle`] a [`Request`] and reads a [`TokenStream`]. A thread of its own asks the scheduler for
//! one [`Batch`] after the other, has an [`Executor`] run them, and sends each stream its tokens.
//!
//! | module | what it hides |
//! |---|---|
//! | `request` | what a caller asks for and what comes back |
//! | `handle` | admission, streams, and the mailbox where a request waits for the engine thread |
//! | `engine` | the thread: mail, deadlines, launch, collect, events, and how it all ends |
//! | `scheduler` | which sequences run, with how many tokens; preemption; what is in flight |
//! | `sequence` | a request's live state |
//! | `constraint` | which tokens may come next, where a request says so; the threads that work it out |
//! | `kv_cache`, `block_pool` | who owns which block, which prefixes can be shared, which free block is used next |
//! | `block_index` | how a published block is found by its hash, and forgotten |
//! | `batch`, `executor` | the seam to whatever runs the model |
//! | `stats` | counters that are read without a message to the thread |
//! | `fake` | an executor for tests (feature `testing`) |
//!
//! ```
//! use std::convert::Infallible;
//! use std::sync::Arc;
//!
//! use lapidary_engine::{
//!     Batch, Engine, EngineConfig, Executor, ExecutorError, KvCacheConfig, Request, SampledToken, SamplingParams,
//!     StopCriteria,
//! };
//!
//! /// A model whose next token is always the position it takes.
//! struct Counter(Vec<SampledToken>);
//!
//! impl Executor for Counter {
//!     fn kv_cache_config(&self) -> KvCacheConfig {
//!         KvCacheConfig { num_blocks: 8, block_size: 16 }
//!     }
//!     fn launch(&mut self, batch: &Batch) -> Result<(), ExecutorError> {
//!         self.0 = batch.samples.iter().map(|row| SampledToken { token: row.position, logprobs: None }).collect();
//!         Ok(())
//!     }
//!     fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError> {
//!         Ok(std::mem::take(&mut self.0))
//!     }
//! }
//!
//! let engine = Engine::spawn(EngineConfig::default(), || Ok::<_, Infallible>(Counter(Vec::new())))?;
//! let mut stream = engine.submit(Request {
//!     prompt: Arc::from([10, 11, 12]),
//!     sampling: Arc::new(SamplingParams::default()),
//!     stop: StopCriteria { max_tokens: 100, min_tokens: 0, stop_token_ids: Arc::from([5]) },
//!     prompt_logprobs: None,
//!     priority: 0,
//!     cache_salt: 0,
//!     deadline: None,
//!     constraint: None,
//!     queue_deadline: None,
//! })?;
//! let mut tokens = Vec::new();
//! while let Some(event) = stream.blocking_recv() {
//!     tokens.push(event?.sampled.token);
//! }
//! assert_eq!(tokens, [3, 4, 5]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod block_index;
mod block_pool;
mod constraint;
mod engine;
mod error;
mod executor;
#[cfg(any(test, feature = "testing"))]
mod fake;
mod handle;
mod kv_cache;
mod request;
mod scheduler;
mod sequence;
mod stats;
mod watchdog;

pub use batch::{Batch, BlockId, FedToken, SampleRow, TokenHistory};
pub use constraint::{Allowed, ConstraintError, MaskJob, MaskOutcome, TokenConstraint, TokenMask};
pub use engine::Engine;
pub use error::{EngineError, SpawnError, SubmitError};
pub use executor::{Executor, ExecutorError, KvCacheConfig};
#[cfg(any(test, feature = "testing"))]
pub use fake::{Script, ScriptRow, ScriptedConfig, ScriptedConstraint, ScriptedExecutor, ScriptedFailure};
pub use handle::{EngineConfig, EngineHandle, TokenStream};
pub use kv_cache::{BlockTable, KvCacheManager, OutOfBlocks, PrefixHashes};
pub use request::{
    FinishReason, Request, RequestId, SampledToken, SamplingParams, StopCriteria, TokenEvent, TokenId, TokenLogprobs,
};
pub use scheduler::{Scheduler, SchedulerConfig, SequenceOutput};
pub use stats::{Heartbeat, ITERATION_TOKENS_BUCKETS, StatsSnapshot, StepCounts};
