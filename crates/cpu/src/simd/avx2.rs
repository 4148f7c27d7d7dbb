//! [`Simd`] with AVX2, FMA and F16C: a vector is two registers.
#![expect(unsafe_code, reason = "intrinsics")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a line of intrinsics has one obligation: the CPU has them"
)]

use std::arch::x86_64::*;

use super::{LANES, Simd};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn new() -> Self {
        Self(())
    }
}

/// e4m3 codes in 16-bit lanes become half-precision numbers 2^-8 times as large: the two formats differ in bias by 8.
const E4M3_TO_F16: f32 = 256.0;

impl Simd for Avx2 {
    type V = [__m256; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; both halves are in the array.
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        let to = to.as_mut_ptr();
        // SAFETY: `self` exists, so the CPU has the instructions; both halves are in the array.
        unsafe {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        let from = from.as_ptr().cast::<__m128i>();
        // SAFETY: `self` exists, so the CPU has the instructions; both halves are in the array.
        unsafe {
            [0, 1].map(|half| {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(half)));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            })
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        let from = from.as_ptr().cast::<__m128i>();
        // SAFETY: `self` exists, so the CPU has the instructions; both halves are in the array.
        unsafe { [0, 1].map(|half| _mm256_cvtph_ps(_mm_loadu_si128(from.add(half)))) }
    }

    #[inline(always)]
    fn load_e4m3(self, from: &[u8; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe {
            let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.as_ptr().cast()));
            // The arithmetic shift leaves two copies of the sign; the mask clears the second.
            let signed = _mm256_srai_epi16::<1>(_mm256_slli_epi16::<8>(codes));
            let halves = _mm256_and_si256(signed, _mm256_set1_epi16(0xbfff_u16.cast_signed()));
            let scale = _mm256_set1_ps(E4M3_TO_F16);
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
            [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
        }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum8(_mm256_add_ps(v[0], v[1])) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    let v = _mm_add_ss(v, _mm_shuffle_ps::<1>(v, v));
    _mm_cvtss_f32(v)
}
