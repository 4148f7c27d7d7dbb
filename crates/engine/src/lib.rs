//! Decides which tokens run next; knows no tensors, text or HTTP.

mod batch;
mod block_pool;
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

pub use batch::{Batch, BlockId, FedToken, SampleRow, TokenHistory};
pub use engine::Engine;
pub use error::{EngineError, SpawnError, SubmitError};
pub use executor::{Executor, ExecutorError, KvCacheConfig};
#[cfg(any(test, feature = "testing"))]
pub use fake::{Script, ScriptRow, ScriptedConfig, ScriptedExecutor, ScriptedFailure};
pub use handle::{EngineConfig, EngineHandle, TokenStream};
pub use kv_cache::{BlockTable, KvCacheManager, OutOfBlocks, PrefixHashes};
pub use request::{
    FinishReason, Request, RequestId, SampledToken, SamplingParams, StopCriteria, TokenEvent, TokenId, TokenLogprobs,
};
pub use scheduler::{Scheduler, SchedulerConfig, SequenceOutput};
pub use stats::{Heartbeat, ITERATION_TOKENS_BUCKETS, StatsSnapshot, StepCounts};
