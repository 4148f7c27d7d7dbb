//! The CUDA backend: Gemma-2 on the project's own kernels.
//!
//! | module | hides |
//! |---|---|
//! | `device` | the CUDA driver, or the emulator that runs the same kernels on a CPU |
//! | `gemm` | which kernel multiplies many tokens with weights, and with what tiles |
//! | `pack`, `tensor` | how weights and activations lie in device memory |
//! | `step` | how a step's inputs get to the device |
//! | `matmul` | which kernel takes which matrix product: `slab_gemm` for few tokens on Hopper, `gemm` for all others |
//! | `rows`, `rope` | norms, gating, quantisation; rotation, and where keys and values go |
//! | `attention` | how a step's attention is split between two kernels |
//!
//! Tests of the kernels take their device from `testing::device()`: the emulator, or a GPU where the environment says
//! `LAPIDARY_TEST_DEVICE=gpu` (and then a missing GPU is a failure).

mod attention;
mod device;
mod gemm;
mod graphs;
mod matmul;
mod pack;
mod rope;
mod rows;
mod sample;
mod slab_gemm;
mod step;
mod tensor;
#[cfg(all(test, feature = "emulator"))]
mod testing;

pub use device::{DeviceInfo, Driver, Unavailable, devices};
