//! Elementary functions without branches or calls, so that loops over them vectorise. Plain multiplies and adds: every
//! instruction set gives the same bits.

use std::f32::consts::{LN_2, LOG2_E};

/// Adding and subtracting it rounds to the nearest integer.
const ROUNDER: f32 = 12_582_912.0;

/// `e^x` to 2 units in the last place; 0 below -87, where results would be subnormal. `x` is at most 88.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // ln 2 in two parts; the first has few enough bits that its multiples are exact (Cephes).
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const { assert!(LN_2_HIGH + LN_2_LOW == LN_2) };
    let clamped = if x < -87.0 { -87.0 } else { x };
    let n = (clamped * LOG2_E + ROUNDER) - ROUNDER;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let mantissa = p * (r * r) + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23).cast_unsigned());
    if x < -87.0 { 0.0 } else { mantissa * power }
}

/// `tanh(x)` to 5e-7: the quotient of polynomials Eigen uses.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    /// Beyond it the quotient would leave ±1; tanh itself rounds to ±1 a little further out.
    const LIMIT: f32 = 7.905_311;
    let limited = if x > LIMIT { LIMIT } else { x };
    let limited = if limited < -LIMIT { -LIMIT } else { limited };
    let square = limited * limited;
    let mut p = -2.760_768_5e-16;
    for coefficient in [
        2.000_188e-13,
        -8.604_672e-11,
        5.122_297e-8,
        1.485_722_4e-5,
        6.372_619_3e-4,
        4.893_524_6e-3,
    ] {
        p = p * square + coefficient;
    }
    let mut q = 1.198_258_4e-6;
    for coefficient in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
        q = q * square + coefficient;
    }
    limited * p / q
}

/// GELU in its tanh form, `gelu_pytorch_tanh`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    /// sqrt(2 / pi).
    const SCALE: f32 = 0.797_884_6;
    0.5 * x * (1.0 + tanh(SCALE * (x + 0.044_715 * (x * x * x))))
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// Sum of `map(x)`: 16 partial sums in order, then their halves added until one is left.
#[inline(always)]
pub(crate) fn sum_of(values: &[f32], map: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            lanes[lane] += map(block[lane]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += map(*value);
    }
    crate::simd::sum_lanes(lanes)
}

/// Largest of `values`; NaN is passed over.
#[inline(always)]
pub(crate) fn max_of(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            lanes[lane] = greater(lanes[lane], block[lane]);
        }
    }
    rest.iter()
        .chain(&lanes)
        .fold(f32::NEG_INFINITY, |max, value| greater(max, *value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest_error(range: std::ops::Range<f32>, error: impl Fn(f32) -> f64) -> f64 {
        let steps = 2_000_000;
        let at = |i: i32| range.start + (range.end - range.start) * i as f32 / steps as f32;
        (0..steps).map(|i| error(at(i))).fold(0.0, f64::max)
    }

    #[test]
    fn tanh_is_as_good_as_the_libraries() {
        let error = |x: f32| (f64::from(tanh(x)) - f64::from(x).tanh()).abs();
        assert!(largest_error(-12.0..12.0, error) < 5e-7);
        let relative = |x: f32| error(x) / f64::from(x).tanh().abs().max(1e-30);
        assert!(largest_error(1e-6..0.5, relative) < 6e-7);
        assert_eq!(
            (tanh(0.0), tanh(100.0), tanh(-f32::INFINITY)),
            (0.0, tanh(9.0), -tanh(9.0))
        );
    }

    #[test]
    fn exp_is_as_good_as_the_libraries() {
        let relative = |x: f32| (f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs();
        assert!(largest_error(-87.0..87.0, relative) < 2.5e-7);
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
    }

    #[test]
    fn nan_stays_nan() {
        assert!(tanh(f32::NAN).is_nan() && exp(f32::NAN).is_nan() && gelu_tanh(f32::NAN).is_nan());
    }
}
