//! Which instructions this CPU has, and how a kernel is compiled for each.
#![expect(
    unsafe_code,
    reason = "functions compiled for more instructions than the crate's baseline"
)]

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use super::avx512::{Avx512, Avx512Pairs};
use super::portable::Portable;
use super::{LANES, PairDot, Simd};

/// An instruction set kernels are compiled for, least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target's baseline has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VBMI (Intel from Ice Lake, AMD from Zen 4).
    Avx512,
    /// AVX-512 with BF16: FP8 times FP8 runs on pairs of bfloat16.
    Avx512Bf16,
}

/// A computation that [`Dispatch::run`] compiles for each instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// As [`Kernel`], for [`Isa::Avx512Bf16`] only.
pub(crate) trait PairKernel {
    type Output;
    fn run<P: PairDot>(self, pairs: P) -> Self::Output;
}

impl Isa {
    /// All of them, least first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The fastest this CPU has.
    ///
    /// AMD multiplies pairs of bfloat16 twice as fast as floats. Intel (measured on Granite Rapids) does not: two
    /// multiply-adds take less time than the one instruction that replaces them.
    #[must_use]
    pub fn detect() -> Self {
        let wanted = |isa: Self| isa.is_available() && (isa != Self::Avx512Bf16 || is_amd());
        Self::ALL
            .into_iter()
            .rev()
            .find(|isa| wanted(*isa))
            .unwrap_or(Self::Portable)
    }

    /// Where element `index` of 64 e4m3 codes is stored for [`Simd::load_e4m3`].
    pub(crate) const fn e4m3_order(self, index: usize) -> usize {
        match self {
            Self::Portable | Self::Avx2 => index,
            Self::Avx512 | Self::Avx512Bf16 => {
                // A 32-bit lane holds two neighbours of `e4m3_pair_order`, which become lanes of two vectors.
                let (vector, lane) = (index / LANES, index % LANES);
                Self::e4m3_pair_order(vector / 2 * 32 + 2 * lane + vector % 2)
            }
        }
    }

    /// Where element `index` of 64 e4m3 codes is stored for [`PairDot::decode`]: low and high bytes of all 64 bfloat16
    /// are looked up at once and interleaved, which works within 128-bit lanes.
    pub(crate) const fn e4m3_pair_order(index: usize) -> usize {
        let (half, rest) = (index / 32, index % 32);
        let (lane, position) = (rest / 8, rest % 8);
        lane * 16 + half * 8 + position
    }

    /// Whether this CPU has it.
    #[must_use]
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
        };
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2(),
            Self::Avx512 => avx2() && avx512(),
            Self::Avx512Bf16 => avx2() && avx512() && is_x86_feature_detected!("avx512bf16"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}

/// An instruction set this CPU was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dispatch(Isa);

impl Dispatch {
    /// Nothing when this CPU lacks it.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then_some(Self(isa))
    }

    pub(crate) fn isa(self) -> Isa {
        self.0
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Isa::Portable => kernel.run(Portable),
            // SAFETY: `new` found the instructions.
            Isa::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: `new` found the instructions.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe { run_avx512(kernel) },
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(Portable)
    }

    /// Whether [`Dispatch::run_pairs`] runs anything.
    pub(crate) fn has_pairs(self) -> bool {
        self.0 == Isa::Avx512Bf16
    }

    /// Nothing when the CPU has no such instructions.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn run_pairs<K: PairKernel>(self, kernel: K) -> Option<K::Output> {
        // SAFETY: `new` found the instructions.
        self.has_pairs().then(|| unsafe { run_avx512_pairs(kernel) })
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn run_pairs<K: PairKernel>(self, _kernel: K) -> Option<K::Output> {
        None
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2::new())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::new())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
fn run_avx512_pairs<K: PairKernel>(kernel: K) -> K::Output {
    kernel.run(Avx512Pairs::new())
}
