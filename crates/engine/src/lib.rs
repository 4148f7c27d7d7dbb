//! Decides which tokens run next; knows no tensors, text or HTTP.

mod batch;
mod executor;
mod request;

pub use batch::{Batch, BlockId, FedToken, SampleRow, TokenHistory};
pub use executor::{Executor, ExecutorError, KvCacheConfig};
pub use request::{
    FinishReason, Request, RequestId, SampledToken, SamplingParams, StopCriteria, TokenEvent, TokenId, TokenLogprobs,
};
