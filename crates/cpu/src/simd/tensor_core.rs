//! Dot products whose sums are those of Hopper's tensor cores, to the bit.
//!
//! One instruction adds its products (32 of e4m3, 16 of bfloat16) and what it adds them to in one go: everything is
//! aligned to the largest exponent, where a product's is the sum of its factors', and cut off some bits below it; the
//! sum is cut once more. Of e4m3 that leaves 13 bits behind the leading one. How kernels chain the instructions is
//! theirs: those of `lapidary-cuda` add what 512 products of e4m3 gave to f32 sums, and have one chain of bfloat16.
//!
//! Found by comparing with an H200, instruction by instruction, of finite operands; infinities and NaN are not looked
//! for. `sums_are_those_of_tensor_cores` of `lapidary-cuda` compares whole products on any device.

use super::Arith;

/// Floats of a block of K: one instruction's of e4m3, two's of bfloat16.
pub(crate) const BLOCK: usize = 32;
/// e4m3 products after which sums are added to f32.
const PROMOTED_PRODUCTS: usize = 512;

/// Exponents as f32 stores them, 127 more than they are.
const BIAS: i32 = 127;
/// Of the least normal e4m3 and bfloat16; smaller values have the same.
const MIN_E4M3_EXPONENT: i32 = BIAS - 6;
const MIN_BF16_EXPONENT: i32 = BIAS - 126;
/// Bits below the largest exponent that take part.
const E4M3_FRACTION_BITS: i32 = 13;
const BF16_FRACTION_BITS: i32 = 25;
/// Of f32's 23 bits behind the leading one those that a sum of e4m3 products lacks.
const E4M3_LOST_BITS: u32 = 10;
/// Of f64's 52 bits those that f32 lacks.
const F64_EXTRA_BITS: u32 = 29;
/// Less than any sum of two exponents.
const NO_EXPONENT: i32 = -1000;

/// e4m3 inputs and weights, both widened to f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct E4m3Sums;

/// bfloat16 inputs and weights, both widened to f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Sums;

/// Of one output element.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct E4m3Partial {
    promoted: f32,
    chain: f32,
    num_products: usize,
}

#[inline(always)]
fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 255) as i32
}

#[inline(always)]
fn exponent_of_sum(x: f32) -> i32 {
    if x == 0.0 { NO_EXPONENT } else { exponent(x) }
}

/// Products of factors that are exact in f32, and the largest of their exponents and `top`.
#[inline(always)]
fn multiply<const N: usize>(x: &[f32; N], w: &[f32; N], min_exponent: i32, mut top: i32) -> ([f32; N], i32) {
    let mut products = [0.0; N];
    for k in 0..N {
        products[k] = x[k] * w[k];
        let sum = exponent(x[k]).max(min_exponent) + exponent(w[k]).max(min_exponent) - BIAS;
        top = top.max(if products[k] == 0.0 { NO_EXPONENT } else { sum });
    }
    (products, top)
}

/// 2 to the power of `exponent` - [`BIAS`].
#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent as u32) << 23)
}

#[inline(always)]
fn wide_power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent - BIAS + 1023) as u64) << 52)
}

/// One instruction. Every step is exact: cut values are integers below 2^15, 33 of them. (Conversions cut as `trunc`
/// does, by instructions that every CPU has for vectors.)
#[inline(always)]
fn add_e4m3(chain: f32, x: &[f32; BLOCK], w: &[f32; BLOCK]) -> f32 {
    let (products, top) = multiply(x, w, MIN_E4M3_EXPONENT, exponent_of_sum(chain));
    if top == NO_EXPONENT {
        return 0.0;
    }
    let units = power_of_two(2 * BIAS + E4M3_FRACTION_BITS - top);
    let mut sum = (chain * units) as i32;
    for product in products {
        sum += (product * units) as i32;
    }
    let sum = sum as f32;
    let kept = f32::from_bits(sum.to_bits() >> E4M3_LOST_BITS << E4M3_LOST_BITS);
    kept * power_of_two(top - E4M3_FRACTION_BITS)
}

/// As [`add_e4m3`]; cut values are below 2^27, for which f32 would not do.
#[inline(always)]
pub(crate) fn add_bf16(chain: f32, x: &[f32; BLOCK / 2], w: &[f32; BLOCK / 2]) -> f32 {
    let (products, top) = multiply(x, w, MIN_BF16_EXPONENT, exponent_of_sum(chain));
    if top == NO_EXPONENT {
        return 0.0;
    }
    let units = wide_power_of_two(2 * BIAS + BF16_FRACTION_BITS - top);
    let mut sum = f64::from((f64::from(chain) * units) as i32);
    for product in products {
        sum += f64::from((f64::from(product) * units) as i32);
    }
    let kept = f64::from_bits(sum.to_bits() >> F64_EXTRA_BITS << F64_EXTRA_BITS);
    (kept * wide_power_of_two(top - BF16_FRACTION_BITS)) as f32
}

impl Arith for E4m3Sums {
    type X = [f32; BLOCK];
    type W = [f32; BLOCK];
    type Decoded = [f32; BLOCK];
    type Sums = E4m3Partial;
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> E4m3Partial {
        E4m3Partial::default()
    }

    #[inline(always)]
    fn decode(self, w: &[f32; BLOCK]) -> [f32; BLOCK] {
        *w
    }

    #[inline(always)]
    fn mul_add(self, mut sums: E4m3Partial, x: &[f32; BLOCK], w: [f32; BLOCK]) -> E4m3Partial {
        sums.chain = add_e4m3(sums.chain, x, &w);
        sums.num_products += BLOCK;
        if sums.num_products.is_multiple_of(PROMOTED_PRODUCTS) {
            sums.promoted += sums.chain;
            sums.chain = 0.0;
        }
        sums
    }

    #[inline(always)]
    fn sum(self, sums: E4m3Partial) -> f32 {
        sums.promoted + sums.chain
    }

    #[inline(always)]
    fn sum4(self, sums: [E4m3Partial; 4]) -> [f32; 4] {
        sums.map(|sums| self.sum(sums))
    }
}

impl Arith for Bf16Sums {
    type X = [f32; BLOCK];
    type W = [f32; BLOCK];
    type Decoded = [f32; BLOCK];
    type Sums = f32;
    const WIDE: bool = false;

    #[inline(always)]
    fn zero(self) -> f32 {
        0.0
    }

    #[inline(always)]
    fn decode(self, w: &[f32; BLOCK]) -> [f32; BLOCK] {
        *w
    }

    #[inline(always)]
    fn mul_add(self, mut sum: f32, x: &[f32; BLOCK], w: [f32; BLOCK]) -> f32 {
        let (x, w) = (x.as_chunks().0, w.as_chunks().0);
        for (x, w) in x.iter().zip(w) {
            sum = add_bf16(sum, x, w);
        }
        sum
    }

    #[inline(always)]
    fn sum(self, sum: f32) -> f32 {
        sum
    }

    #[inline(always)]
    fn sum4(self, sums: [f32; 4]) -> [f32; 4] {
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many factors as given, the rest zeros, times ones.
    fn sum_of<A>(arith: A, blocks: &[&[f32]]) -> f32
    where
        A: Arith<X = [f32; BLOCK], W = [f32; BLOCK], Decoded = [f32; BLOCK]>,
    {
        let mut sums = arith.zero();
        for block in blocks {
            let mut x = [0.0; BLOCK];
            x[..block.len()].copy_from_slice(block);
            sums = arith.mul_add(sums, &x, [1.0; BLOCK]);
        }
        arith.sum(sums)
    }

    fn two_to(exponent: i32) -> f32 {
        2.0_f32.powi(exponent)
    }

    #[test]
    fn e4m3_loses_what_is_13_bits_below_the_largest() {
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, two_to(-5)]]), 256.0 + two_to(-5));
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, two_to(-6)]]), 256.0);
        // Each by itself, before they are added, towards zero.
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, two_to(-6), two_to(-6)]]), 256.0);
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, -two_to(-6)]]), 256.0);
        assert_eq!(sum_of(E4m3Sums, &[&[-256.0, -1.5 * two_to(-5)]]), -256.0 - two_to(-5));
    }

    #[test]
    fn e4m3_sums_are_cut_to_14_bits() {
        let ulp = two_to(-5);
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, 256.0, ulp]]), 512.0);
        assert_eq!(sum_of(E4m3Sums, &[&[256.0, 256.0, ulp, ulp]]), 512.0 + two_to(-4));
        assert_eq!(sum_of(E4m3Sums, &[&[256.0], &[256.0], &[ulp]]), 512.0);
    }

    #[test]
    fn a_chain_takes_part_in_the_alignment() {
        assert_eq!(sum_of(E4m3Sums, &[&[two_to(-6)], &[256.0]]), 256.0);
        assert_eq!(sum_of(E4m3Sums, &[&[256.0], &[-256.0, two_to(-6)]]), 0.0);
        assert_eq!(sum_of(E4m3Sums, &[&[256.0], &[-256.0], &[two_to(-6)]]), two_to(-6));
    }

    #[test]
    fn chains_of_512_products_are_added_in_f32() {
        let tiny: &[f32] = &[two_to(-9)];
        let mut blocks: Vec<&[f32]> = vec![&[256.0]];
        blocks.extend([tiny; 16]);
        // 15 in the first chain are lost beside 256, the next one is not.
        assert_eq!(sum_of(E4m3Sums, &blocks), 256.0 + two_to(-9));
    }

    #[test]
    fn a_products_exponent_is_that_of_its_factors() {
        // 1.75 * 1.75 counts as 2^0, though it is above 2.
        let mut sums = E4m3Sums.zero();
        let (mut x, mut w) = ([0.0; BLOCK], [0.0; BLOCK]);
        (x[0], w[0]) = (1.75, 1.75);
        (x[1], w[1]) = (two_to(-6), two_to(-7));
        sums = E4m3Sums.mul_add(sums, &x, w);
        // 2^-13 takes part; then the sum, now of exponent 1, is cut to 2^-12.
        assert_eq!(E4m3Sums.sum(sums), 1.75 * 1.75);
        (x[2], w[2]) = (two_to(-6), two_to(-7));
        assert_eq!(
            E4m3Sums.sum(E4m3Sums.mul_add(E4m3Sums.zero(), &x, w)),
            1.75 * 1.75 + two_to(-12)
        );
    }

    #[test]
    fn a_subnormal_factor_counts_as_the_least_normal_one() {
        let (mut x, mut w) = ([0.0; BLOCK], [0.0; BLOCK]);
        (x[0], w[0]) = (256.0, two_to(-9));
        (x[1], w[1]) = (two_to(-6), two_to(-5));
        // 2^8 * 2^-6 = 2^2 leaves 2^-11, which is what the second product is.
        assert_eq!(
            E4m3Sums.sum(E4m3Sums.mul_add(E4m3Sums.zero(), &x, w)),
            0.5 + two_to(-11)
        );
        w[1] = two_to(-6);
        assert_eq!(E4m3Sums.sum(E4m3Sums.mul_add(E4m3Sums.zero(), &x, w)), 0.5);
    }

    #[test]
    fn bf16_keeps_25_bits_and_f32_of_the_sum() {
        assert_eq!(sum_of(Bf16Sums, &[&[1.0, two_to(-23)]]), 1.0 + two_to(-23));
        // Half a unit of the result twice: both take part.
        assert_eq!(sum_of(Bf16Sums, &[&[1.0, two_to(-24), two_to(-24)]]), 1.0 + two_to(-23));
        // The least that takes part, and what no longer does.
        let with_equals = |exponent| [1.0].into_iter().chain([two_to(exponent); 8]).collect::<Vec<_>>();
        assert_eq!(sum_of(Bf16Sums, &[&with_equals(-25)]), 1.0 + two_to(-22));
        assert_eq!(sum_of(Bf16Sums, &[&with_equals(-26)]), 1.0);
        // One after the other, in the next instruction, neither does: the sum is cut, not rounded.
        let mut second = [0.0; BLOCK];
        (second[0], second[16]) = (two_to(-24), two_to(-24));
        assert_eq!(sum_of(Bf16Sums, &[&[1.0], &second]), 1.0);
    }

    #[test]
    fn nothing_but_zeros_is_zero() {
        assert_eq!(sum_of(E4m3Sums, &[&[], &[]]), 0.0);
        assert_eq!(sum_of(Bf16Sums, &[&[], &[]]), 0.0);
        assert_eq!(sum_of(E4m3Sums, &[&[3.0], &[]]), 3.0);
        assert_eq!(sum_of(Bf16Sums, &[&[3.0], &[]]), 3.0);
    }
}
