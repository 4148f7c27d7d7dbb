//! What the kernels of `lapidary-cuda` for Hopper do to floats between products, to the bit: the same operations, rounded in
//! the same places and added in the same order. With [`crate::Sums::TensorCore`] this backend computes so, and whole models
//! can be compared with the kernels bit by bit; a rounding to FP8 that turns would otherwise turn thousands after it.
//!
//! Not here: attention without soft-cap, and sequences of one query token, whose kernel adds in another order.

use crate::simd::{TENSOR_CORE_BLOCK, add_bf16_products};

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Columns of a row that one thread adds up, and that one warp does.
const THREAD_COLUMNS: usize = 8;
const WARP_COLUMNS: usize = 256;
/// Keys of a product with values; blocks of keys are whole numbers of them.
pub(crate) const KEYS: usize = TENSOR_CORE_BLOCK / 2;

/// `2^x` for -126 <= x <= 127.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    power_of_two(
        x,
        [
            0.001_327_647_2,
            0.009_675_541,
            0.055_507_13,
            0.240_221_2,
            0.693_146_94,
            1.000_000_1,
        ],
    )
}

/// The same of what is rounded to bf16 next.
#[inline(always)]
fn rough_exp2(x: f32) -> f32 {
    power_of_two(x, [0.055_171_672, 0.242_611_13, 0.693_260_97, 0.999_928_06])
}

/// A polynomial in what `x` is off the nearest integer, highest coefficient first, times two to the power of that.
#[inline(always)]
fn power_of_two<const N: usize>(x: f32, polynomial: [f32; N]) -> f32 {
    const ROUNDER: f32 = 12_582_912.0;
    let shifted = x + ROUNDER;
    let r = x - (shifted - ROUNDER);
    let mut p = polynomial[0];
    for coefficient in &polynomial[1..] {
        p = p.mul_add(r, *coefficient);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// `gelu_tanh(gate) * up`.
#[inline(always)]
pub(crate) fn gated(gate: f32, up: f32) -> f32 {
    const LINEAR: f32 = 2.0 * 0.797_884_6 * LOG2_E;
    const CUBIC: f32 = LINEAR * 0.044_715;
    let exponent = gate * CUBIC.mul_add(gate * gate, LINEAR);
    let e = exp2(exponent.clamp(-126.0, 32.0));
    gate * (e * (1.0 / (1.0 + e))) * up
}

/// `rsqrt(mean(x^2) + eps)`.
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0; 4];
    for (index, piece) in x.chunks(WARP_COLUMNS).enumerate() {
        let mut lanes = [0.0_f32; WARP_COLUMNS / THREAD_COLUMNS];
        for (lane, columns) in lanes.iter_mut().zip(piece.chunks(THREAD_COLUMNS)) {
            *lane = columns.iter().fold(0.0, |sum, x| x.mul_add(*x, sum));
        }
        let mut half = lanes.len() / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        sums[index % 4] += lanes[0];
    }
    let sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    let mean = sum.mul_add(1.0 / x.len() as f32, eps);
    (1.0 / f64::from(mean).sqrt()) as f32
}

/// Products of queries and keys to probabilities that are not yet divided by their sum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CappedSoftmax {
    score_scale: f32,
    cap: f32,
    near: [f32; 4],
    near_limit: f32,
}

impl CappedSoftmax {
    /// Of scores `scale * product`.
    pub(crate) fn new(scale: f64, softcap: f32) -> Self {
        let (log2_e, cap) = (std::f64::consts::LOG2_E, f64::from(softcap));
        let score_scale = 2.0 * scale * log2_e / cap;
        let mut power = cap / 2.0 * score_scale;
        let near = [1.0, -4.003_699_1e-2, 1.918_970_4e-3, -8.532_181_7e-5].map(|coefficient| {
            let scaled = coefficient * power;
            power *= score_scale * score_scale;
            scaled as f32
        });
        Self {
            score_scale: score_scale as f32,
            cap: (cap * log2_e) as f32,
            near,
            near_limit: (cap / (2.0 * scale * log2_e)) as f32,
        }
    }

    /// Before it is rounded to bf16.
    #[inline(always)]
    pub(crate) fn probability(self, product: f32) -> f32 {
        let exponent = if product.abs() > self.near_limit {
            let e = exp2((product * self.score_scale).clamp(-64.0, 64.0));
            f32::mul_add(-2.0, 1.0 / (1.0 + e), 1.0) * self.cap
        } else {
            let [first, second, third, fourth] = self.near;
            let square = product * product;
            let ratio = fourth
                .mul_add(square, third)
                .mul_add(square, second)
                .mul_add(square, first);
            product * ratio
        };
        rough_exp2(exponent)
    }
}

/// Sum of the probabilities of the keys from `first` on: each of four lanes has two neighbours in eight.
pub(crate) fn sum_of_probabilities(first: usize, probabilities: &[f32]) -> f32 {
    let mut lanes = [0.0; 4];
    let mut odd = 0.0;
    for (key, probability) in (first..).zip(probabilities) {
        // A lane adds its two before it adds them to what it has; a neighbour that is not there is zero.
        let lane = key % 8 / 2;
        if key % 2 == 0 {
            odd = *probability;
            if key + 1 == first + probabilities.len() {
                lanes[lane] += odd;
            }
        } else {
            lanes[lane] += odd + probability;
            odd = 0.0;
        }
    }
    (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
}

/// Adds `probabilities` of the keys from `first` on times their values to `sums`. `value(key, column)` is any number for a
/// key of `probabilities`; all keys are of one product: `first` to the next multiple of [`KEYS`] at most.
pub(crate) fn add_values(sums: &mut [f32], first: usize, probabilities: &[f32], value: impl Fn(usize, usize) -> f32) {
    let start = first % KEYS;
    let mut factors = [0.0; KEYS];
    factors[start..start + probabilities.len()].copy_from_slice(probabilities);
    for (column, sum) in sums.iter_mut().enumerate() {
        let mut values = [0.0; KEYS];
        for (key, to) in values[start..start + probabilities.len()].iter_mut().enumerate() {
            *to = value(key, column);
        }
        *sum = add_bf16_products(*sum, &factors, &values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_and_gates_are_as_good_as_the_libraries() {
        for i in -12_000..12_000 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / want - 1.0).abs() < 3e-7, "2^{x}");
            let gate = x / 8.0;
            let u = (2.0 / std::f64::consts::PI).sqrt() * (f64::from(gate) + 0.044_715 * f64::from(gate).powi(3));
            let want = 0.5 * f64::from(gate) * (1.0 + u.tanh());
            assert!(
                (f64::from(gated(gate, 1.0)) - want).abs() < 1e-6 * want.abs() + 1e-7,
                "gelu of {gate}"
            );
        }
        assert!(gated(f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn probabilities_are_those_of_capped_scores() {
        let softmax = CappedSoftmax::new(0.1, 50.0);
        for i in -3000..3000 {
            let product = i as f32;
            let want = (50.0 * (f64::from(product) * 0.1 / 50.0).tanh()).exp();
            let error = (f64::from(softmax.probability(product)) / want - 1.0).abs();
            assert!(error < 1e-4, "product {product}: {error}");
        }
    }

    #[test]
    fn an_rms_is_that_of_all_columns() {
        for cols in [8, 100, 255, 256, 257, 2304, 4608, 5000] {
            let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / cols as f64;
            let error = f64::from(inverse_rms(&x, 1e-6)) * (mean + 1e-6).sqrt() - 1.0;
            assert!(error.abs() < 1e-6, "{cols} columns: {error}");
        }
    }

    #[test]
    fn every_probability_counts_once() {
        let probabilities: Vec<f32> = (1..=40).map(|i| i as f32).collect();
        for first in 0..9 {
            for len in 0..=probabilities.len() {
                let want: f32 = probabilities[..len].iter().sum();
                assert_eq!(
                    sum_of_probabilities(first, &probabilities[..len]),
                    want,
                    "{len} from {first}"
                );
            }
        }
    }

    #[test]
    fn values_are_added_by_their_probabilities() {
        let mut sums = [1.0; 3];
        add_values(&mut sums, 13, &[0.5, 2.0, 1.0], |key, column| {
            (10 * key + column) as f32
        });
        assert_eq!(sums, [41.0, 44.5, 48.0]);
    }
}
