//! The CUDA backend: Gemma-2 on the project's own kernels.
//!
//! | module | hides |
//! |---|---|
//! | `device` | the CUDA driver, or the emulator that runs the same kernels on a CPU |
//! | `gemm` | which kernel multiplies many tokens with weights, and with what tiles |
//! | `pack`, `tensor` | how weights and activations lie in device memory |
//!
//! Tests of the kernels take their device from `testing::device()`: the emulator, or a GPU where the environment says
//! `LAPIDARY_TEST_DEVICE=gpu` (and then a missing GPU is a failure).

mod device;
mod gemm;
mod pack;
mod tensor;
#[cfg(all(test, feature = "emulator"))]
mod testing;

pub use device::{DeviceInfo, Driver, Unavailable, devices};
