//! The model crate's suite on the kernels: those for Hopper, and the portable ones. On the emulator, or on a GPU where
//! `LAPIDARY_TEST_DEVICE=gpu` (which then must be there).

use lapidary_cpu::{Cpu, CpuConfig, Storage, Sums};
use lapidary_cuda::{Cuda, CudaConfig};
use lapidary_model::conformance::{self, Bounds};

fn cuda(emulated_capability: u32) -> Cuda {
    if std::env::var("LAPIDARY_TEST_DEVICE").as_deref() == Ok("gpu") {
        let device = lapidary_cuda::devices().expect("a GPU was asked for").swap_remove(0);
        return Cuda::open(device, CudaConfig::default()).expect("the GPU can be opened");
    }
    Cuda::emulated(emulated_capability, CudaConfig::default()).expect("the emulator has every kernel")
}

/// The CPU as it computes like the kernels.
fn cpu() -> Cpu {
    let config = CpuConfig {
        storage: Storage::Bf16,
        sums: Sums::TensorCore,
        ..CpuConfig::default()
    };
    Cpu::new(config).expect("the CPU has its own instructions")
}

mod hopper {
    lapidary_model::conformance_tests!(super::cuda(90), super::Bounds::BF16);

    /// What the CPU takes tensor cores to do (`lapidary_cpu::Sums`), on a GPU what they do.
    #[test]
    fn sums_are_those_of_tensor_cores() {
        super::conformance::linear_equals(&super::cpu, &|| super::cuda(90), &super::Bounds::BF16);
    }

    /// What else the CPU takes the kernels to do: to the bit, so that whole models can be compared.
    #[test]
    fn row_operations_are_the_cpus() {
        super::conformance::row_operations_equal(&super::cpu, &|| super::cuda(90), &super::Bounds::BF16);
    }

    #[test]
    fn attention_of_many_tokens_is_the_cpus() {
        super::conformance::attention_equals(&super::cpu, &|| super::cuda(90), &super::Bounds::BF16);
    }
}

mod portable {
    lapidary_model::conformance_tests!(super::cuda(89), super::Bounds::BF16);
}
