//! [`Simd`] for whatever the target's baseline is: the compiler vectorises the loops.

use half::{bf16, f16};

use super::{LANES, Simd};
use crate::e4m3;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::V {
        [0.0; LANES]
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, from: &[f32; LANES]) -> Self::V {
        *from
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        *to = v;
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| bf16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn load_f16(self, from: &[u16; LANES]) -> Self::V {
        from.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn load_e4m3(self, from: &[u8; 64]) -> [Self::V; 4] {
        let (quarters, _) = from.as_chunks();
        [
            self.load_e4m3_lanes(&quarters[0]),
            self.load_e4m3_lanes(&quarters[1]),
            self.load_e4m3_lanes(&quarters[2]),
            self.load_e4m3_lanes(&quarters[3]),
        ]
    }

    #[inline(always)]
    fn load_e4m3_lanes(self, from: &[u8; LANES]) -> Self::V {
        from.map(|code| e4m3::DECODED[usize::from(code)])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let mut sum = c;
        for lane in 0..LANES {
            sum[lane] += a[lane] * b[lane];
        }
        sum
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        sum_lanes(v)
    }

    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        [sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)]
    }
}

/// Halves are added until one lane is left: the order every instruction set follows.
#[inline(always)]
pub(crate) fn sum_lanes(mut v: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            v[lane] += v[lane + half];
        }
        half /= 2;
    }
    v[0]
}
