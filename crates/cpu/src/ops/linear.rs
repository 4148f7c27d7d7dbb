//! Matrix products with weights in their stored type.
//!
//! A task takes some output columns, that is, weight rows. For a few tokens it decodes weights in registers, straight
//! from memory; for more it decodes them once into its thread's cache and goes over the tokens in tiles. Both compute
//! each output element by the same operations in the same order (see [`crate::simd`]'s `dot`).

use std::sync::{Mutex, PoisonError};

use lapidary_model::{ActivationScheme, BackendError};

use super::elementwise::On;
use crate::backend::Sums;
use crate::math;
use crate::parallel::Columns;
use crate::simd::{
    Arith, Bf16, Bf16Pairs, Bf16Sums, Buffer, E4m3, E4m3Pairs, E4m3Sums, F16, F32, Fma, Kernel, LANES, PairDot,
    PairKernel, Simd, TENSOR_CORE_BLOCK, WeightBlock, dot_tile,
};
use crate::tensor::{Activation, ActivationRow, Elements, Linear, Matrix, ROW_BLOCK, Tensor};

/// Tokens up to which weights are decoded in registers, as often as there are tiles of tokens: twice costs less than
/// writing them down and reading them back.
const MAX_DIRECT_TOKENS: usize = 8;

/// Tokens up to which each weight is loaded once.
const MAX_TILE_TOKENS: usize = 4;

/// Bytes of decoded weights of a task, to stay in a second-level cache while all tokens pass by. The more, the less often
/// they pass: 8 rows of 9216 instead of 24 halve the speed of 512 tokens.
const MAX_DECODED_BYTES: usize = 1 << 20;

/// Weight bytes times tokens worth a task: a microsecond or so.
const MIN_TASK_BYTES: usize = 32 << 10;

/// Tasks for each thread, if they are large enough: some threads may be slower than others.
const TASKS_PER_THREAD: usize = 8;

/// Decoded weights of one thread.
#[derive(Debug, Default)]
pub(crate) struct LinearScratch {
    floats: Buffer<f32>,
    pairs: Buffer<u16>,
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy)]
enum Finish<'a> {
    Keep,
    /// `* scale[column]`
    Scale(&'a [f32]),
    /// `* token's scale * scale[column]`
    ScaleBoth(&'a [f32]),
    Softcap(f32),
}

impl Finish<'_> {
    #[inline(always)]
    fn apply(self, token: &ActivationRow, first_column: usize, sums: &mut [f32]) {
        match self {
            Self::Keep => (),
            Self::Scale(scales) => {
                for (sum, scale) in sums.iter_mut().zip(&scales[first_column..]) {
                    *sum *= scale;
                }
            }
            Self::ScaleBoth(scales) => {
                for (sum, scale) in sums.iter_mut().zip(&scales[first_column..]) {
                    *sum = *sum * token.scale * scale;
                }
            }
            Self::Softcap(cap) => sums.iter_mut().for_each(|sum| *sum = math::softcap(*sum, cap)),
        }
    }
}

/// `out[..num_tokens] = x * weights^T`.
pub(crate) fn linear(
    on: On<'_>,
    scratch: &[Mutex<LinearScratch>],
    num_tokens: usize,
    x: &Activation,
    weights: &Linear,
    out: &mut Tensor,
) -> Result<(), BackendError> {
    if x.scheme != weights.input {
        let (given, wanted) = (x.scheme, weights.input);
        return Err(BackendError::Unsupported(format!(
            "input quantised as {given:?}, weights want {wanted:?}"
        )));
    }
    assert_eq!(
        (x.cols, out.cols),
        (weights.matrix.cols, weights.matrix.rows),
        "shapes of a linear layer"
    );
    let finish = match (weights.scales.is_empty(), weights.input) {
        (true, _) => Finish::Keep,
        (false, ActivationScheme::None) => Finish::Scale(&weights.scales),
        (false, _) => Finish::ScaleBoth(&weights.scales),
    };
    multiply(
        on,
        scratch,
        &x.rows[..num_tokens],
        &weights.matrix,
        finish,
        out.rows_mut(num_tokens),
    );
    Ok(())
}

/// `logits[..hidden.len()] = softcap(hidden * table^T)`.
pub(crate) fn logits(
    on: On<'_>,
    scratch: &[Mutex<LinearScratch>],
    hidden: &[ActivationRow],
    table: &Matrix,
    softcap: Option<f32>,
    logits: &mut Tensor,
) {
    assert_eq!(logits.cols, table.rows, "shape of the logits");
    let finish = softcap.map_or(Finish::Keep, Finish::Softcap);
    multiply(on, scratch, hidden, table, finish, logits.rows_mut(hidden.len()));
}

fn multiply(
    on: On<'_>,
    scratch: &[Mutex<LinearScratch>],
    x: &[ActivationRow],
    weights: &Matrix,
    finish: Finish<'_>,
    out: &mut [f32],
) {
    let decodes = x.len() > MAX_TILE_TOKENS || on.sums == Sums::TensorCore;
    let width = columns_per_task(weights, x.len(), decodes, on.pool.num_threads());
    on.pool.for_columns(out, weights.rows, width, |worker, mut columns| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let stride = weights.stride();
        let elements =
            columns.first() * stride..(columns.first() + columns.width().next_multiple_of(ROW_BLOCK)) * stride;
        let task = Task {
            x,
            stride,
            finish,
            scratch: &mut scratch,
            out: &mut columns,
        };
        let dispatch = on.dispatch;
        match (&weights.elements, on.sums, finish) {
            (Elements::E4m3(data), Sums::TensorCore, Finish::ScaleBoth(_)) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(TensorCorePanel::<E4m3, _> {
                    arith: E4m3Sums,
                    task,
                    w,
                });
            }
            // Kernels widen such weights to bf16.
            (Elements::E4m3(data), Sums::TensorCore, _) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(TensorCorePanel::<E4m3, _> {
                    arith: Bf16Sums,
                    task,
                    w,
                });
            }
            (Elements::Bf16(data), Sums::TensorCore, _) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(TensorCorePanel::<Bf16, _> {
                    arith: Bf16Sums,
                    task,
                    w,
                });
            }
            (Elements::F32(data), ..) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(Panel::<F32> { task, w });
            }
            (Elements::Bf16(data), ..) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(Panel::<Bf16> { task, w });
            }
            (Elements::F16(data), ..) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(Panel::<F16> { task, w });
            }
            (Elements::E4m3(data), ..) => {
                let w = data[elements].as_chunks().0;
                dispatch.run(Panel::<E4m3> { task, w });
            }
            (Elements::E4m3Pairs(data), ..) => {
                let w = data[elements].as_chunks().0;
                let ran = dispatch.run_pairs(PairPanel { task, w });
                assert!(
                    ran.is_some(),
                    "weights are stored in pairs only where the CPU multiplies pairs"
                );
            }
        }
    });
}

/// Output columns to a task: enough to be worth it, few enough to decode into the cache and to share out evenly.
fn columns_per_task(weights: &Matrix, num_tokens: usize, decodes: bool, threads: usize) -> usize {
    let row_bytes = weights.row_bytes() * num_tokens.max(1);
    let even = weights.rows.div_ceil(threads * TASKS_PER_THREAD);
    let worth = MIN_TASK_BYTES.div_ceil(row_bytes);
    let fitting = if decodes {
        (MAX_DECODED_BYTES / (weights.stride() * size_of::<f32>())).max(ROW_BLOCK)
    } else {
        usize::MAX
    };
    even.max(worth)
        .min(fitting)
        .max(1)
        .next_multiple_of(ROW_BLOCK)
        .min(fitting / ROW_BLOCK * ROW_BLOCK)
}

/// Some columns of the output.
struct Task<'a, 'c> {
    x: &'a [ActivationRow],
    /// Elements of a row of weights.
    stride: usize,
    finish: Finish<'a>,
    scratch: &'a mut LinearScratch,
    out: &'a mut Columns<'c>,
}

/// A task by fused multiply-add.
struct Panel<'a, 'c, W: WeightBlock> {
    task: Task<'a, 'c>,
    w: &'a [W::Block],
}

impl<W: WeightBlock> Kernel for Panel<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Task {
            x: tokens,
            stride,
            finish,
            scratch,
            out,
        } = self.task;
        if tokens.len() <= MAX_DIRECT_TOKENS {
            let x = |token: usize| W::blocks(&tokens[token].values);
            let per_row = x(0).len();
            all_tokens(Fma::<S, W>::new(simd), tokens, x, (self.w, per_row), finish, out);
            return;
        }
        let decoded = decode_rows::<S, W>(simd, scratch, out.width(), stride, self.w);
        let x = |token: usize| F32::blocks(&tokens[token].values);
        let per_row = stride / LANES;
        all_tokens(
            Fma::<S, F32>::new(simd),
            tokens,
            x,
            (F32::blocks(decoded), per_row),
            finish,
            out,
        );
    }
}

/// Widens the weights of `width` columns.
#[inline(always)]
fn decode_rows<'s, S: Simd, W: WeightBlock>(
    simd: S,
    scratch: &'s mut LinearScratch,
    width: usize,
    stride: usize,
    w: &[W::Block],
) -> &'s [f32] {
    let len = width.next_multiple_of(ROW_BLOCK) * stride;
    scratch.floats.reserve(len);
    let decoded = &mut scratch.floats[..len];
    for (to, from) in W::blocks_mut(decoded).iter_mut().zip(w) {
        W::store(simd, W::load(simd, from), to);
    }
    decoded
}

/// A task, added up as tensor cores do; weights are decoded into the cache however few the tokens.
struct TensorCorePanel<'a, 'c, W: WeightBlock, A> {
    arith: A,
    task: Task<'a, 'c>,
    w: &'a [W::Block],
}

impl<W: WeightBlock, A> Kernel for TensorCorePanel<'_, '_, W, A>
where
    A: Arith<X = [f32; TENSOR_CORE_BLOCK], W = [f32; TENSOR_CORE_BLOCK]>,
{
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Task {
            x: tokens,
            stride,
            finish,
            scratch,
            out,
        } = self.task;
        let decoded = decode_rows::<S, W>(simd, scratch, out.width(), stride, self.w);
        let x = |token: usize| tokens[token].values.as_chunks().0;
        let w = (decoded.as_chunks().0, stride / TENSOR_CORE_BLOCK);
        all_tokens(self.arith, tokens, x, w, finish, out);
    }
}

/// A task by dot products of pairs.
struct PairPanel<'a, 'c> {
    task: Task<'a, 'c>,
    w: &'a [[u8; 64]],
}

impl PairKernel for PairPanel<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<P: PairDot>(self, pairs: P) {
        let Task {
            x: tokens,
            stride,
            finish,
            scratch,
            out,
        } = self.task;
        let per_row = stride / 64;
        let x = |token: usize| tokens[token].pairs.as_chunks().0.as_chunks().0;
        if tokens.len() <= MAX_DIRECT_TOKENS {
            all_tokens(E4m3Pairs(pairs), tokens, x, (self.w, per_row), finish, out);
            return;
        }
        scratch.pairs.reserve(self.w.len() * 64);
        let decoded = &mut scratch.pairs.as_chunks_mut::<32>().0.as_chunks_mut::<2>().0[..self.w.len()];
        for (to, from) in decoded.iter_mut().zip(self.w) {
            let [low, high] = pairs.decode(from);
            pairs.store(low, &mut to[0]);
            pairs.store(high, &mut to[1]);
        }
        all_tokens(Bf16Pairs(pairs), tokens, x, (decoded, per_row), finish, out);
    }
}

/// Goes over the tokens in tiles as large as the registers allow.
#[inline(always)]
fn all_tokens<'x, A: Arith>(
    arith: A,
    tokens: &[ActivationRow],
    x: impl Fn(usize) -> &'x [A::X] + Copy,
    (w, per_row): (&[A::W], usize),
    finish: Finish<'_>,
    out: &mut Columns<'_>,
) {
    let mut first = 0;
    while first < tokens.len() {
        let x = |index: usize| &x(first + index)[..per_row];
        let sink = &mut |token: usize, row: usize, sums: &[f32]| {
            let out = out.row(first + token);
            if let Some(out) = out.get_mut(row..row + sums.len()) {
                out.copy_from_slice(sums);
            } else if let Some(out) = out.get_mut(row..) {
                // The tile ends in rows of padding.
                out.copy_from_slice(&sums[..out.len()]);
            }
        };
        let left = tokens.len() - first;
        let done = dot_rows(arith, left, x, (w, per_row), sink);
        let first_column = out.first();
        for (token, row) in (first..first + done).zip(&tokens[first..]) {
            finish.apply(row, first_column, out.row(token));
        }
        first += done;
    }
}

/// Multiplies the first rows of x, at most `left`, with all rows of w; `sink(x row, first w row, sums)` takes the
/// results. Returns how many rows of x it took.
#[inline(always)]
pub(crate) fn dot_rows<'x, A: Arith>(
    arith: A,
    left: usize,
    x: impl Fn(usize) -> &'x [A::X],
    w: (&[A::W], usize),
    sink: &mut impl FnMut(usize, usize, &[f32]),
) -> usize {
    if A::WIDE {
        match left {
            1 => strip::<A, 1, 8>(arith, x, w, sink),
            2 => strip::<A, 2, 8>(arith, x, w, sink),
            3 => strip::<A, 3, 4>(arith, x, w, sink),
            // Where weights are decoded in registers, these are needed for the tables.
            4..=MAX_DIRECT_TOKENS => strip::<A, 4, 4>(arith, x, w, sink),
            _ => strip::<A, 6, 4>(arith, x, w, sink),
        }
    } else {
        match left {
            1 => strip::<A, 1, 4>(arith, x, w, sink),
            _ => strip::<A, 2, 2>(arith, x, w, sink),
        }
    }
}

#[inline(always)]
fn strip<'x, A: Arith, const MR: usize, const NR: usize>(
    arith: A,
    x: impl Fn(usize) -> &'x [A::X],
    (w, per_row): (&[A::W], usize),
    sink: &mut impl FnMut(usize, usize, &[f32]),
) -> usize {
    let x: [&[A::X]; MR] = std::array::from_fn(x);
    let mut row = 0;
    let mut rows = w.chunks_exact(per_row);
    while rows.len() >= NR {
        let tile: [&[A::W]; NR] = std::array::from_fn(|_| rows.next().unwrap_or_default());
        for (token, sums) in dot_tile(arith, x, tile).iter().enumerate() {
            sink(token, row, sums);
        }
        row += NR;
    }
    for tile in rows {
        for (token, sums) in dot_tile(arith, x, [tile]).iter().enumerate() {
            sink(token, row, sums);
        }
        row += 1;
    }
    MR
}
