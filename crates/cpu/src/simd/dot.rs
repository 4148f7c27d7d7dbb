//! Dot products of rows with rows, several at once.
//!
//! An output element has one vector of partial sums, filled in the order of K, and its lanes are added in one order:
//! whatever the shape of the tile it is computed in, its bits are the same. Speed comes from computing many elements at
//! once, never from splitting K.

use std::marker::PhantomData;

use super::{LANES, PairDot, Simd};

/// How a block of K is multiplied.
pub(crate) trait Arith: Copy {
    /// A block of inputs in memory.
    type X: 'static;
    /// A block of weights in memory.
    type W: 'static;
    /// A block of weights in registers.
    type Decoded: Copy;
    /// Partial sums of an output element.
    type Sums: Copy;
    /// Whether there are registers for large tiles.
    const WIDE: bool;

    fn zero(self) -> Self::Sums;
    fn decode(self, w: &Self::W) -> Self::Decoded;
    fn mul_add(self, sums: Self::Sums, x: &Self::X, w: Self::Decoded) -> Self::Sums;
    fn sum(self, sums: Self::Sums) -> f32;
    /// Four times `sum`, to the bit.
    fn sum4(self, sums: [Self::Sums; 4]) -> [f32; 4];
}

/// `MR * NR` dot products over all blocks of K; rows must be equally long.
#[inline(always)]
pub(crate) fn dot_tile<A: Arith, const MR: usize, const NR: usize>(
    arith: A,
    x: [&[A::X]; MR],
    w: [&[A::W]; NR],
) -> [[f32; NR]; MR] {
    let len = w[0].len();
    assert!(
        x.iter().all(|row| row.len() == len) && w.iter().all(|row| row.len() == len),
        "rows of unequal length"
    );
    let mut sums = [[arith.zero(); NR]; MR];
    for k in 0..len {
        for n in 0..NR {
            let block = arith.decode(&w[n][k]);
            for m in 0..MR {
                sums[m][n] = arith.mul_add(sums[m][n], &x[m][k], block);
            }
        }
    }
    // Loops, not `map`: the compiler leaves that a call, for which every register goes to memory.
    let mut results = [[0.0; NR]; MR];
    for m in 0..MR {
        let (fours, rest) = sums[m].as_chunks::<4>();
        let (four_results, rest_results) = results[m].as_chunks_mut::<4>();
        for (sums, results) in fours.iter().zip(four_results) {
            *results = arith.sum4(*sums);
        }
        for (sums, result) in rest.iter().zip(rest_results) {
            *result = arith.sum(*sums);
        }
    }
    results
}

/// A storage type of weights that [`Fma`] widens to floats.
pub(crate) trait WeightBlock: Copy + 'static {
    type Block: 'static;
    /// As many floats.
    type Floats: 'static;
    type Decoded<S: Simd>: Copy;

    /// Whole blocks of `floats`.
    fn blocks(floats: &[f32]) -> &[Self::Floats];
    fn blocks_mut(floats: &mut [f32]) -> &mut [Self::Floats];
    fn load<S: Simd>(simd: S, from: &Self::Block) -> Self::Decoded<S>;
    fn store<S: Simd>(simd: S, decoded: Self::Decoded<S>, to: &mut Self::Floats);
    fn mul_add<S: Simd>(simd: S, sums: S::V, x: &Self::Floats, w: Self::Decoded<S>) -> S::V;
}

/// f32 weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32;
/// bfloat16 weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16;
/// Half-precision weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F16;
/// e4m3 weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct E4m3;

macro_rules! one_vector {
    ($weights:ty, $element:ty, $load:ident) => {
        impl WeightBlock for $weights {
            type Block = [$element; LANES];
            type Floats = [f32; LANES];
            type Decoded<S: Simd> = S::V;

            #[inline(always)]
            fn blocks(floats: &[f32]) -> &[Self::Floats] {
                floats.as_chunks().0
            }

            #[inline(always)]
            fn blocks_mut(floats: &mut [f32]) -> &mut [Self::Floats] {
                floats.as_chunks_mut().0
            }

            #[inline(always)]
            fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V {
                simd.$load(from)
            }

            #[inline(always)]
            fn store<S: Simd>(simd: S, decoded: S::V, to: &mut Self::Floats) {
                simd.store(decoded, to);
            }

            #[inline(always)]
            fn mul_add<S: Simd>(simd: S, sums: S::V, x: &Self::Floats, w: S::V) -> S::V {
                simd.mul_add(simd.load(x), w, sums)
            }
        }
    };
}

one_vector!(F32, f32, load);
one_vector!(Bf16, u16, load_bf16);
one_vector!(F16, u16, load_f16);

impl WeightBlock for E4m3 {
    type Block = [u8; 64];
    type Floats = [[f32; LANES]; 4];
    type Decoded<S: Simd> = [S::V; 4];

    #[inline(always)]
    fn blocks(floats: &[f32]) -> &[Self::Floats] {
        floats.as_chunks().0.as_chunks().0
    }

    #[inline(always)]
    fn blocks_mut(floats: &mut [f32]) -> &mut [Self::Floats] {
        floats.as_chunks_mut().0.as_chunks_mut().0
    }

    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Self::Block) -> [S::V; 4] {
        simd.load_e4m3(from)
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, decoded: [S::V; 4], to: &mut Self::Floats) {
        for (vector, to) in decoded.into_iter().zip(to) {
            simd.store(vector, to);
        }
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, mut sums: S::V, x: &Self::Floats, w: [S::V; 4]) -> S::V {
        for (x, w) in x.iter().zip(w) {
            sums = simd.mul_add(simd.load(x), w, sums);
        }
        sums
    }
}

/// Floats times weights of type `W`, widened, by fused multiply-add.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fma<S, W>(S, PhantomData<W>);

impl<S: Simd, W: WeightBlock> Fma<S, W> {
    #[inline(always)]
    pub(crate) fn new(simd: S) -> Self {
        Self(simd, PhantomData)
    }
}

impl<S: Simd, W: WeightBlock> Arith for Fma<S, W> {
    type X = W::Floats;
    type W = W::Block;
    type Decoded = W::Decoded<S>;
    type Sums = S::V;
    const WIDE: bool = S::WIDE;

    #[inline(always)]
    fn zero(self) -> S::V {
        self.0.zero()
    }

    #[inline(always)]
    fn decode(self, w: &W::Block) -> W::Decoded<S> {
        W::load(self.0, w)
    }

    #[inline(always)]
    fn mul_add(self, sums: S::V, x: &W::Floats, w: W::Decoded<S>) -> S::V {
        W::mul_add(self.0, sums, x, w)
    }

    #[inline(always)]
    fn sum(self, sums: S::V) -> f32 {
        self.0.sum(sums)
    }

    #[inline(always)]
    fn sum4(self, sums: [S::V; 4]) -> [f32; 4] {
        self.0.sum4(sums)
    }
}

/// e4m3 inputs, held as bfloat16, times e4m3 weights in pair order: exact products, two to a lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct E4m3Pairs<P>(pub(crate) P);

/// As [`E4m3Pairs`], with weights decoded before; the same sums.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Pairs<P>(pub(crate) P);

/// 64 elements as bfloat16.
pub(crate) type PairBlock = [[u16; 32]; 2];

#[inline(always)]
fn dot_pairs<P: PairDot>(pairs: P, sums: P::V, x: &PairBlock, w: [P::Pairs; 2]) -> P::V {
    pairs.dot(pairs.dot(sums, pairs.load(&x[0]), w[0]), pairs.load(&x[1]), w[1])
}

impl<P: PairDot> Arith for E4m3Pairs<P> {
    type X = PairBlock;
    type W = [u8; 64];
    type Decoded = [P::Pairs; 2];
    type Sums = P::V;
    const WIDE: bool = true;

    #[inline(always)]
    fn zero(self) -> P::V {
        self.0.zero()
    }

    #[inline(always)]
    fn decode(self, w: &[u8; 64]) -> Self::Decoded {
        self.0.decode(w)
    }

    #[inline(always)]
    fn mul_add(self, sums: P::V, x: &PairBlock, w: Self::Decoded) -> P::V {
        dot_pairs(self.0, sums, x, w)
    }

    #[inline(always)]
    fn sum(self, sums: P::V) -> f32 {
        self.0.sum(sums)
    }

    #[inline(always)]
    fn sum4(self, sums: [P::V; 4]) -> [f32; 4] {
        self.0.sum4(sums)
    }
}

impl<P: PairDot> Arith for Bf16Pairs<P> {
    type X = PairBlock;
    type W = PairBlock;
    type Decoded = [P::Pairs; 2];
    type Sums = P::V;
    const WIDE: bool = true;

    #[inline(always)]
    fn zero(self) -> P::V {
        self.0.zero()
    }

    #[inline(always)]
    fn decode(self, w: &PairBlock) -> Self::Decoded {
        [self.0.load(&w[0]), self.0.load(&w[1])]
    }

    #[inline(always)]
    fn mul_add(self, sums: P::V, x: &PairBlock, w: Self::Decoded) -> P::V {
        dot_pairs(self.0, sums, x, w)
    }

    #[inline(always)]
    fn sum(self, sums: P::V) -> f32 {
        self.0.sum(sums)
    }

    #[inline(always)]
    fn sum4(self, sums: [P::V; 4]) -> [f32; 4] {
        self.0.sum4(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dispatch, Isa, Kernel};
    use super::*;
    use crate::e4m3;

    struct SumBothWays([[f32; LANES]; 4]);

    impl Kernel for SumBothWays {
        type Output = [[u32; 4]; 2];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let v = self.0.map(|lanes| simd.load(&lanes));
            [v.map(|v| simd.sum(v).to_bits()), simd.sum4(v).map(f32::to_bits)]
        }
    }

    struct WidenLanes([u8; LANES]);

    impl Kernel for WidenLanes {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut floats = [0.0; LANES];
            simd.store(simd.load_e4m3_lanes(&self.0), &mut floats);
            floats
        }
    }

    #[test]
    fn every_instruction_set_widens_every_e4m3_code_to_its_value() {
        let codes: Vec<u8> = (0..=255).collect();
        for dispatch in Isa::ALL.into_iter().filter_map(Dispatch::new) {
            for codes in codes.as_chunks::<LANES>().0 {
                let widened = dispatch.run(WidenLanes(*codes));
                for (code, float) in codes.iter().zip(widened) {
                    let value = e4m3::decode(*code);
                    let is_same = float.to_bits() == value.to_bits() || (float.is_nan() && value.is_nan());
                    assert!(is_same, "{dispatch:?}: code {code:#x} is {float}, not {value}");
                }
            }
        }
    }

    #[test]
    fn every_way_to_add_lanes_gives_the_same_bits() {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 20) as f32 - 8.0
        };
        for _ in 0..1000 {
            let lanes: [[f32; LANES]; 4] = std::array::from_fn(|_| std::array::from_fn(|_| next()));
            let expected = lanes.map(|lanes| super::super::sum_lanes(lanes).to_bits());
            for dispatch in Isa::ALL.into_iter().filter_map(Dispatch::new) {
                assert_eq!(dispatch.run(SumBothWays(lanes)), [expected; 2], "{dispatch:?}");
            }
        }
    }
}
