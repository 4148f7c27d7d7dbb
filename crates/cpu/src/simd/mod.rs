//! Vectors of 16 floats on every instruction set, chosen at run time.
//!
//! Kernels are written once, in safe code, over [`Simd`]. All instruction sets have the same 16 lanes and add them up in
//! the same order, so AVX2 and AVX-512 give the same bits; the portable one multiplies and adds in two roundings, since
//! a fused multiply-add without hardware for it is a slow library call.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
mod dot;
mod isa;
mod portable;
mod tensor_core;

pub(crate) use buffer::{Buffer, Plain, make_pages};
pub(crate) use dot::{Arith, Bf16, Bf16Pairs, E4m3, E4m3Pairs, F16, F32, Fma, WeightBlock, dot_tile};
pub use isa::Isa;
pub(crate) use isa::{Dispatch, Kernel, PairKernel};
pub(crate) use portable::sum_lanes;
pub(crate) use tensor_core::{BLOCK as TENSOR_CORE_BLOCK, Bf16Sums, E4m3Sums, add_bf16 as add_bf16_products};

/// Floats in a vector.
pub(crate) const LANES: usize = 16;

/// A value of a type that implements this is the proof that the CPU has the instructions.
pub(crate) trait Simd: Copy {
    /// 16 floats.
    type V: Copy;
    /// Whether there are registers for large tiles (AVX-512 has 32, and each holds 16 floats).
    const WIDE: bool;

    fn zero(self) -> Self::V;
    fn splat(self, x: f32) -> Self::V;
    fn load(self, from: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    /// 16 bfloat16, widened.
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V;
    /// 16 half-precision floats, widened.
    fn load_f16(self, from: &[u16; LANES]) -> Self::V;
    /// 64 finite e4m3 codes, stored in [`Isa::e4m3_order`], widened in their natural order.
    fn load_e4m3(self, from: &[u8; 64]) -> [Self::V; 4];
    /// 16 e4m3 codes in their natural order, NaN among them, widened.
    fn load_e4m3_lanes(self, from: &[u8; LANES]) -> Self::V;
    /// `a * b + c`, in one rounding where the CPU can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of the lanes: halves are added until one lane is left.
    fn sum(self, v: Self::V) -> f32;
    /// Four times `sum`, to the bit.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
}

/// The four instructions [`E4m3Pairs`] is made of.
pub(crate) trait PairDot: Copy {
    /// 32 bfloat16.
    type Pairs: Copy;
    /// 16 floats.
    type V: Copy;

    fn zero(self) -> Self::V;
    fn load(self, from: &[u16; 32]) -> Self::Pairs;
    /// Decodes 64 codes stored in [`Isa::e4m3_pair_order`].
    fn decode(self, from: &[u8; 64]) -> [Self::Pairs; 2];
    fn store(self, pairs: Self::Pairs, to: &mut [u16; 32]);
    /// Adds to each lane the products of its two pairs.
    fn dot(self, sum: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;
    fn sum(self, v: Self::V) -> f32;
    /// Four times `sum`, to the bit.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
}
