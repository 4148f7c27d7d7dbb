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
    fn load_e4m3(self, from: &[u8; 64]) -> [Self::V; 4] {
        let from = from.as_ptr().cast::<__m128i>();
        // SAFETY: `self` exists, so the CPU has the instructions; all four quarters are in the array.
        unsafe {
            [
                e4m3_to_f32(_mm_loadu_si128(from)),
                e4m3_to_f32(_mm_loadu_si128(from.add(1))),
                e4m3_to_f32(_mm_loadu_si128(from.add(2))),
                e4m3_to_f32(_mm_loadu_si128(from.add(3))),
            ]
        }
    }

    #[inline(always)]
    fn load_e4m3_lanes(self, from: &[u8; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe {
            let halves = e4m3_or_nan_to_halves(_mm_loadu_si128(from.as_ptr().cast()));
            halves_to_f32(halves)
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

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum4([quarter(a), quarter(b), quarter(c), quarter(d)]) }
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn e4m3_to_f32(codes: __m128i) -> [__m256; 2] {
    halves_to_f32(e4m3_to_halves(codes))
}

/// By way of half precision, whose bias is 8 more: the codes, shifted into place, are numbers 2^-8 times as large.
#[inline]
#[target_feature(enable = "avx2")]
fn e4m3_to_halves(codes: __m128i) -> __m256i {
    // The arithmetic shift leaves two copies of the sign; the mask clears the second.
    let signed = _mm256_srai_epi16::<1>(_mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(codes)));
    _mm256_and_si256(signed, _mm256_set1_epi16(0xbfff_u16.cast_signed()))
}

/// As [`e4m3_to_halves`]; NaN stays NaN, which shifted would be 480.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn e4m3_or_nan_to_halves(codes: __m128i) -> __m256i {
    let halves = e4m3_to_halves(codes);
    let magnitude = _mm256_set1_epi16(0x3f80);
    let is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(halves, magnitude), magnitude);
    _mm256_or_si256(halves, is_nan)
}

/// What [`e4m3_to_halves`] made smaller becomes what it was.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves_to_f32(halves: __m256i) -> [__m256; 2] {
    let scale = _mm256_set1_ps(256.0);
    let low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves));
    [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]
}

/// The first two steps of a sum: 16 lanes to 4.
#[inline]
#[target_feature(enable = "avx2")]
fn quarter(v: [__m256; 2]) -> __m128 {
    let v = _mm256_add_ps(v[0], v[1]);
    _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v))
}

/// The last two steps of four sums.
#[inline]
#[target_feature(enable = "avx2")]
fn sum4([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
    let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
    let cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
    let sums = _mm_add_ps(
        _mm_shuffle_ps::<0b10_00_10_00>(ab, cd),
        _mm_shuffle_ps::<0b11_01_11_01>(ab, cd),
    );
    let mut array = [0.0; 4];
    // SAFETY: the store fills the whole array.
    unsafe { _mm_storeu_ps(array.as_mut_ptr(), sums) };
    array
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum8(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    let v = _mm_add_ss(v, _mm_shuffle_ps::<1>(v, v));
    _mm_cvtss_f32(v)
}
