//! The CUDA backend: Gemma-2 on the project's own kernels.
//!
//! | module | hides |
//! |---|---|
//! | `device` | the CUDA driver, or the emulator that runs the same kernels on a CPU |
//! | `pack`, `tensor` | how weights and activations lie in device memory |
//! | `slab_gemm` | matrix products of few tokens: linear layers and logits of a decode step |
//!
//! Tests of the kernels take their device from `testing::device()`: the emulator, or a GPU where the environment says
//! `LAPIDARY_TEST_DEVICE=gpu` (and then a missing GPU is a failure).

mod device;
mod pack;
mod slab_gemm;
mod tensor;
#[cfg(all(test, feature = "emulator"))]
mod testing;

pub use device::{DeviceInfo, Driver, Unavailable, devices};
