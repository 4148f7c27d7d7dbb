//! The seam to whatever runs the model.

use crate::{Batch, SampledToken};

/// What an executor can hold, fixed once it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCacheConfig {
    /// KV blocks it allocated.
    pub num_blocks: u32,
    /// Tokens a block holds.
    pub block_size: u32,
}

/// Runs batches on a device.
///
/// `launch` and `collect` are two calls so that step N+1 can be launched before the tokens of step N are read: a row of
/// N+1 may name a token of N as its input ([`crate::FedToken`]). Steps run, and are collected, in launch order.
pub trait Executor: 'static {
    /// The KV cache it allocated.
    fn kv_cache_config(&self) -> KvCacheConfig;

    /// Steps worth having in flight: 1 where `launch` itself does the work (a CPU), 2 where a device works behind it.
    fn max_steps_in_flight(&self) -> usize {
        1
    }

    /// Starts a step. Nothing of `batch` is needed after the call returns.
    ///
    /// # Errors
    /// The step did not start and must not be collected.
    fn launch(&mut self, batch: &Batch) -> Result<(), ExecutorError>;

    /// Waits for the oldest step in flight: one token for each of its [`Batch::samples`], in order.
    ///
    /// # Errors
    /// That step failed; the steps launched after it are still to be collected.
    fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError>;
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// Only the requests of this step are lost.
    #[error("step failed")]
    Step(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device is gone: nothing will run any more.
    #[error("device lost")]
    DeviceLost(#[source] Box<dyn std::error::Error + Send + Sync>),
}
