//! The CUDA backend: Gemma-2 on the project's own kernels.
//!
//! | module | hides |
//! |---|---|
//! | `backend` | the operations of the model crate's `Backend` in terms of the modules below |
//! | `graphs` | steps that are recorded once and replayed |
//! | `device` | the CUDA driver, or the emulator that runs the same kernels on a CPU |
//! | `pack`, `tensor` | how weights and activations lie in device memory |
//! | `step` | how a step's inputs get to the device |
//! | `matmul` | which kernel takes which matrix product: `slab_gemm` for few tokens on Hopper, `gemm` for all others |
//! | `rows`, `rope` | norms, gating, quantisation; rotation, and where keys and values go |
//! | `sample` | how tokens are chosen from logits |
//! | `attention` | how a step's attention is split between two kernels |
//!
//! Tests of the kernels take their device from `testing::device()`: the emulator, or a GPU where the environment says
//! `LAPIDARY_TEST_DEVICE=gpu` (and then a missing GPU is a failure).

mod attention;
mod backend;
mod device;
#[cfg(all(test, feature = "emulator"))]
mod faults;
mod gemm;
mod graphs;
mod matmul;
pub mod measure;
mod pack;
mod rope;
mod rows;
mod sample;
mod slab_gemm;
mod step;
mod tensor;
#[cfg(all(test, feature = "emulator"))]
mod testing;

pub use backend::{Cuda, CudaConfig, Plan};
pub use device::{DeviceInfo, Unavailable, devices};
pub use sample::MAX_LOGPROBS;
pub use tensor::{Activation, Embedding, KvLayer, Linear, Norm, Tensor};
