//! Gemma-2, written once for every backend.

mod backend;

pub use backend::{
    ActivationScheme, AttentionConfig, Backend, BackendError, DType, FP8_MAX, FP8_MIN_TOKEN_SCALE, HostTensor,
    LastHidden, LinearWeights, MemoryInfo, NormArgs, StepLimits,
};
