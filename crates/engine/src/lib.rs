//! Decides which tokens run next; knows no tensors, text or HTTP.

mod batch;
mod engine;
mod error;
mod executor;
mod handle;
mod request;
mod stats;

pub use batch::{Batch, BlockId, FedToken, SampleRow, TokenHistory};
pub use engine::Engine;
pub use error::{EngineError, SpawnError, SubmitError};
pub use executor::{Executor, ExecutorError, KvCacheConfig};
pub use handle::{EngineConfig, EngineHandle, TokenStream};
pub use request::{
    FinishReason, Request, RequestId, SampledToken, SamplingParams, StopCriteria, TokenEvent, TokenId, TokenLogprobs,
};
pub use stats::{Heartbeat, ITERATION_TOKENS_BUCKETS, StatsSnapshot};
