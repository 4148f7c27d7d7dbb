//! The model crate's suite, on every instruction set this machine has.
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use lapidary_cpu::{Cpu, CpuConfig, Isa, Storage, Sums};
use lapidary_model::conformance::{self, Bounds};

fn cpu(isa: Isa, storage: Storage) -> Cpu {
    cpu_that_adds(Sums::F32, isa, storage)
}

fn cpu_that_adds(sums: Sums, isa: Isa, storage: Storage) -> Cpu {
    // An instruction set this machine lacks is tested as the best it has: the same code as another module's.
    let isa = if isa.is_available() { isa } else { Isa::detect() };
    Cpu::new(CpuConfig {
        threads: 2,
        isa,
        storage,
        sums,
    })
    .unwrap()
}

mod portable {
    lapidary_model::conformance_tests!(
        super::cpu(super::Isa::Portable, super::Storage::F32),
        super::Bounds::F32
    );
}

mod avx2 {
    lapidary_model::conformance_tests!(super::cpu(super::Isa::Avx2, super::Storage::F32), super::Bounds::F32);
}

mod avx512 {
    lapidary_model::conformance_tests!(super::cpu(super::Isa::Avx512, super::Storage::F32), super::Bounds::F32);
}

mod avx512_bf16 {
    lapidary_model::conformance_tests!(
        super::cpu(super::Isa::Avx512Bf16, super::Storage::F32),
        super::Bounds::F32
    );
}

/// The oracle of backends that store bf16, whose bounds it must keep.
mod bf16_storage {
    lapidary_model::conformance_tests!(
        super::cpu(super::Isa::detect(), super::Storage::Bf16),
        super::Bounds::BF16
    );
}

/// The same as tensor cores add.
mod tensor_core_sums {
    lapidary_model::conformance_tests!(
        super::cpu_that_adds(super::Sums::TensorCore, super::Isa::detect(), super::Storage::Bf16),
        super::Bounds::BF16
    );

    /// Every rounding in it is written down, so that how a CPU multiplies and adds does not matter.
    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let make = |isa| super::cpu_that_adds(super::Sums::TensorCore, isa, super::Storage::Bf16);
        for isa in super::Isa::ALL {
            let (oracle, other, bounds) = (|| make(super::Isa::Portable), || make(isa), super::Bounds::BF16);
            super::conformance::linear_equals(&oracle, &other, &bounds);
            super::conformance::row_operations_equal(&oracle, &other, &bounds);
            super::conformance::attention_equals(&oracle, &other, &bounds);
        }
    }
}
