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
}

/// `MR * NR` dot products over all blocks of K; rows must be equally long.
#[inline(always)]
pub(crate) fn dot_tile<A: Arith, const MR: usize, const NR: usize>(
    arith: A,
    x: [&[A::X]; MR],
    w: [&[A::W]; NR],
) -> [[f32; NR]; MR] {
    let len = w[0].len();
    let x = x.map(|row| &row[..len]);
    let w = w.map(|row| &row[..len]);
    let mut sums = [[arith.zero(); NR]; MR];
    for k in 0..len {
        for n in 0..NR {
            let block = arith.decode(&w[n][k]);
            for m in 0..MR {
                sums[m][n] = arith.mul_add(sums[m][n], &x[m][k], block);
            }
        }
    }
    sums.map(|row| row.map(|sums| arith.sum(sums)))
}

/// A storage type of weights that [`Fma`] widens to floats.
pub(crate) trait WeightBlock: Copy + 'static {
    type Block: 'static;
    fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V;
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

impl WeightBlock for F32 {
    type Block = [f32; LANES];
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V {
        simd.load(from)
    }
}

impl WeightBlock for Bf16 {
    type Block = [u16; LANES];
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V {
        simd.load_bf16(from)
    }
}

impl WeightBlock for F16 {
    type Block = [u16; LANES];
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V {
        simd.load_f16(from)
    }
}

impl WeightBlock for E4m3 {
    type Block = [u8; LANES];
    #[inline(always)]
    fn load<S: Simd>(simd: S, from: &Self::Block) -> S::V {
        simd.load_e4m3(from)
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
    type X = [f32; LANES];
    type W = W::Block;
    type Decoded = S::V;
    type Sums = S::V;
    const WIDE: bool = S::WIDE;

    #[inline(always)]
    fn zero(self) -> S::V {
        self.0.zero()
    }

    #[inline(always)]
    fn decode(self, w: &W::Block) -> S::V {
        W::load(self.0, w)
    }

    #[inline(always)]
    fn mul_add(self, sums: S::V, x: &Self::X, w: S::V) -> S::V {
        self.0.mul_add(self.0.load(x), w, sums)
    }

    #[inline(always)]
    fn sum(self, sums: S::V) -> f32 {
        self.0.sum(sums)
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
}
