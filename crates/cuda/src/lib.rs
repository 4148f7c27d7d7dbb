//! The CUDA backend: Gemma-2 on the project's own kernels.
//!
//! | module | hides |
//! |---|---|
//! | `device` | the CUDA driver, or the emulator that runs the same kernels on a CPU |

mod device;

pub use device::{DeviceInfo, Driver, Unavailable, devices};
