//! The model crate's suite on the kernels: those for Hopper, and the portable ones. On the emulator, or on a GPU where
//! `LAPIDARY_TEST_DEVICE=gpu` (which then must be there).

use lapidary_cuda::{Cuda, CudaConfig};
use lapidary_model::conformance::Bounds;

fn cuda(emulated_capability: u32) -> Cuda {
    if std::env::var("LAPIDARY_TEST_DEVICE").as_deref() == Ok("gpu") {
        let device = lapidary_cuda::devices().expect("a GPU was asked for").swap_remove(0);
        return Cuda::open(device, CudaConfig::default()).expect("the GPU can be opened");
    }
    Cuda::emulated(emulated_capability, CudaConfig::default()).expect("the emulator has every kernel")
}

mod hopper {
    lapidary_model::conformance_tests!(super::cuda(90), super::Bounds::BF16);
}

mod portable {
    lapidary_model::conformance_tests!(super::cuda(89), super::Bounds::BF16);
}
