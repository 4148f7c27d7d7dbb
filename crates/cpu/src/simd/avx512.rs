//! [`Simd`] and [`PairDot`] with AVX-512.
#![expect(unsafe_code, reason = "intrinsics")]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a line of intrinsics has one obligation: the CPU has them"
)]

use std::arch::x86_64::*;

use super::avx2::{e4m3_or_nan_to_halves, sum8};
use super::{LANES, PairDot, Simd};
use crate::e4m3;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(E4m3Tables);

impl Avx512 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    pub(super) fn new() -> Self {
        Self(E4m3Tables::new())
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        // SAFETY: `self` exists, so the CPU has the instructions; the store fills the whole array.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_e4m3(self, from: &[u8; 64]) -> [Self::V; 4] {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe {
            let [a, b] = self.0.decode(from);
            let odd = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
                _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
            ]
        }
    }

    #[inline(always)]
    fn load_e4m3_lanes(self, from: &[u8; LANES]) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe {
            let halves = e4m3_or_nan_to_halves(_mm_loadu_si128(from.as_ptr().cast()));
            _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
        }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum16(v) }
    }

    #[inline(always)]
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum16x4(v) }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum16(v: __m512) -> f32 {
    sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)))
}

/// Four times [`sum16`]: each step adds the same halves, of several vectors at once.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn sum16x4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    let eighths = |a, b| {
        let (low, high) = (
            _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b),
        );
        _mm512_add_ps(low, high)
    };
    let (ab, cd) = (eighths(a, b), eighths(c, d));
    let (even, odd) = (
        _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd),
        _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd),
    );
    let fours = _mm512_add_ps(even, odd);
    let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0b11_10_11_10>(fours));
    let ones = _mm512_add_ps(twos, _mm512_permute_ps::<0b01_01_01_01>(twos));
    let firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    let sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, ones));
    let mut array = [0.0; 4];
    // SAFETY: the store fills the whole array.
    unsafe { _mm_storeu_ps(array.as_mut_ptr(), sums) };
    array
}

/// Low and high bytes of the bfloat16 of each non-negative code: e4m3 is exact in bfloat16.
static LOW_BYTES: [u8; 128] = bfloat16_bytes(0);
static HIGH_BYTES: [u8; 128] = bfloat16_bytes(8);

const fn bfloat16_bytes(shift: u32) -> [u8; 128] {
    let mut bytes = [0; 128];
    let mut code = 0;
    while code < 128 {
        bytes[code] = (e4m3::decode(code as u8).to_bits() >> 16 >> shift & 0xff) as u8;
        code += 1;
    }
    bytes
}

/// In four registers for as long as a kernel runs.
#[derive(Debug, Clone, Copy)]
struct E4m3Tables {
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl E4m3Tables {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        let load = |table: &[u8; 128]| {
            let table = table.as_ptr().cast::<__m512i>();
            // SAFETY: the table has two times 64 bytes.
            unsafe { [_mm512_loadu_si512(table), _mm512_loadu_si512(table.add(1))] }
        };
        Self {
            low: load(&LOW_BYTES),
            high: load(&HIGH_BYTES),
        }
    }

    /// The bfloat16 of 64 codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn decode(self, codes: &[u8; 64]) -> [__m512i; 2] {
        // SAFETY: the load takes the whole array.
        let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        // The lookups ignore the sign bit; the ternary operation is `high | (codes & 0x80)`.
        let low = _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]);
        let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
        let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, _mm512_set1_epi8(-128));
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Pairs(E4m3Tables);

impl Avx512Pairs {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")]
    pub(super) fn new() -> Self {
        Self(E4m3Tables::new())
    }
}

impl PairDot for Avx512Pairs {
    type Pairs = __m512i;
    type V = __m512;

    #[inline(always)]
    fn zero(self) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn load(self, from: &[u16; 32]) -> Self::Pairs {
        // SAFETY: `self` exists, so the CPU has the instructions; the load takes the whole array.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline(always)]
    fn decode(self, from: &[u8; 64]) -> [Self::Pairs; 2] {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { self.0.decode(from) }
    }

    #[inline(always)]
    fn store(self, pairs: Self::Pairs, to: &mut [u16; 32]) {
        // SAFETY: `self` exists, so the CPU has the instructions; the store fills the whole array.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs) }
    }

    #[inline(always)]
    fn dot(self, sum: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
        // SAFETY: `self` exists, so the CPU has the instructions; both types are 64 bytes of bfloat16.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            )
        }
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum16(v) }
    }

    #[inline(always)]
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: `self` exists, so the CPU has the instructions.
        unsafe { sum16x4(v) }
    }
}
