//! Gemma-2, written once for every backend.
//!
//! | module | hides |
//! |---|---|
//! | `config`, `quantization` | what `config.json` may say, its defaults and its traps |
//! | `weights` | safetensors files: mapped, sharded, checked |
//! | `checkpoint` | where the files are: a directory or the program itself |
//! | `tensors`, `problem`, `scalars` | which tensors there must be, and every way they can be wrong |
//! | `loader` | how they get to the device |
//! | `backend` | the seam: what a device must be able to do |
//! | `decoder` | the model |
//! | `runner` | a model that runs the engine's batches |
//! | `conformance` (feature `testing`) | what every backend must prove |
//! | `testing` (feature `testing`) | small checkpoints made in memory |
//!
//! ```no_run
//! use lapidary_model::{Backend, Checkpoint, ConfigOverrides, ModelRunner, RunnerConfig};
//!
//! fn load<B: Backend>(backend: B) -> Result<ModelRunner<B>, Box<dyn std::error::Error>> {
//!     let checkpoint = Checkpoint::open_dir("gemma-2-9b-it-FP8".as_ref(), ConfigOverrides::default())?;
//!     Ok(ModelRunner::load(backend, &checkpoint, RunnerConfig::default(), &mut |_| ())?)
//! }
//! ```

mod backend;
mod checkpoint;
mod config;
#[cfg(feature = "testing")]
pub mod conformance;
mod decoder;
mod loader;
mod problem;
mod quantization;
mod runner;
mod scalars;
mod tensors;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod warning;
mod weights;

pub use backend::{
    ActivationScheme, AttentionConfig, Backend, BackendError, DType, FP8_MAX, FP8_MIN_TOKEN_SCALE, HostTensor,
    KvCacheDtype, KvScales, LastHidden, LinearWeights, MemoryInfo, NormArgs, Rehearsal, StepLimits, Width,
};
pub use checkpoint::{Checkpoint, CheckpointError, EmbeddedFiles};
pub use config::{ConfigError, ConfigOverrides, GenerationDefaults, ModelConfig};
pub use loader::{CheckpointReport, LoadError, LoadPhase, LoadProgress, ProjectionScales};
pub use problem::{Problem, Problems};
pub use quantization::{InputScheme, LinearScheme, Quantization, QuantizationError};
pub use runner::{KvCacheSize, MemoryPlan, ModelRunner, RunnerConfig, RunnerError};
pub use warning::Warning;
pub use weights::{StoredTensor, Weights, WeightsError};
