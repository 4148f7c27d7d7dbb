//! Operations on one row at a time: norms, residuals, GeGLU, and the quantisation that ends each.

use lapidary_model::ActivationScheme;

use super::rows_per_task;
use crate::backend::{Storage, Sums};
use crate::parallel::Pool;
use crate::simd::{Dispatch, Kernel, Simd};
use crate::tensor::{Activation, ActivationRow, Norm, Tensor};
use crate::{hopper, math};

/// Where work runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct On<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) dispatch: Dispatch,
    pub(crate) storage: Storage,
    pub(crate) sums: Sums,
}

impl On<'_> {
    /// Fills the first `num_rows` rows of `out` by `fill`, then quantises them.
    pub(crate) fn fill_rows(self, out: &mut Activation, num_rows: usize, scheme: ActivationScheme, fill: impl RowOp) {
        out.scheme = scheme;
        let (cols, to_pairs) = (out.cols, out.has_pairs);
        let per_task = rows_per_task(num_rows, cols, self.pool.num_threads());
        self.pool
            .for_chunks(&mut out.rows[..num_rows], per_task, |_, task, rows| {
                self.dispatch.run(FillRows {
                    rows,
                    first: task * per_task,
                    cols,
                    scheme,
                    to_pairs,
                    storage: self.storage,
                    fill,
                });
            });
    }

    /// Leaves the first `num_rows` rows of `tensor` as they are stored.
    pub(crate) fn store_rows(self, tensor: &mut Tensor, num_rows: usize) {
        if self.storage != Storage::F32 {
            self.update_rows(tensor, num_rows, |_: usize, row: &mut [f32]| self.storage.round(row));
        }
    }

    /// Updates the first `num_rows` rows of `tensor` by `update`.
    pub(crate) fn update_rows(self, tensor: &mut Tensor, num_rows: usize, update: impl RowOp) {
        let cols = tensor.cols;
        let per_task = rows_per_task(num_rows, cols, self.pool.num_threads());
        self.pool
            .for_chunks(tensor.rows_mut(num_rows), per_task * cols, |_, task, rows| {
                self.dispatch.run(UpdateRows {
                    rows,
                    first: task * per_task,
                    cols,
                    update,
                });
            });
    }
}

/// What becomes of a row.
///
/// Arithmetic is a type of its own rather than a closure: the compiler may leave a closure a function by itself, compiled
/// without the instructions of the [`Kernel`] that calls it. Copies may as well be closures.
pub(crate) trait RowOp: Copy + Sync {
    /// Must be `#[inline(always)]`.
    fn apply(self, row: usize, values: &mut [f32]);
}

impl<F: Fn(usize, &mut [f32]) + Copy + Sync> RowOp for F {
    #[inline(always)]
    fn apply(self, row: usize, values: &mut [f32]) {
        self(row, values);
    }
}

struct FillRows<'a, F> {
    rows: &'a mut [ActivationRow],
    first: usize,
    cols: usize,
    scheme: ActivationScheme,
    to_pairs: bool,
    storage: Storage,
    fill: F,
}

impl<F: RowOp> Kernel for FillRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (index, row) in self.rows.iter_mut().enumerate() {
            self.fill.apply(self.first + index, &mut row.values[..self.cols]);
            if self.scheme == ActivationScheme::None {
                self.storage.round(&mut row.values[..self.cols]);
            }
            row.quantize(self.cols, self.scheme, self.to_pairs);
        }
    }
}

struct UpdateRows<'a, F> {
    rows: &'a mut [f32],
    first: usize,
    cols: usize,
    update: F,
}

impl<F: RowOp> Kernel for UpdateRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (index, row) in self.rows.chunks_exact_mut(self.cols).enumerate() {
            self.update.apply(self.first + index, row);
        }
    }
}

/// A norm's weights, what is added to the mean square, and whose arithmetic it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) weight: &'a Norm,
    pub(crate) eps: f32,
    pub(crate) sums: Sums,
}

impl RmsNorm<'_> {
    /// `rsqrt(mean(x^2) + eps)`.
    #[inline(always)]
    fn inverse_rms(self, x: &[f32]) -> f32 {
        match self.sums {
            Sums::F32 => 1.0 / (math::sum_of(x, |x| x * x) / x.len() as f32 + self.eps).sqrt(),
            Sums::TensorCore => hopper::inverse_rms(x, self.eps),
        }
    }

    #[inline(always)]
    fn apply(self, x: &mut [f32]) {
        let factor = self.inverse_rms(x);
        let columns = x.iter_mut().zip(&self.weight.factors);
        match self.sums {
            Sums::F32 => columns.for_each(|(x, weight)| *x = *x * factor * weight),
            Sums::TensorCore => columns.for_each(|(x, weight)| *x = *x * weight * factor),
        }
    }

    /// `residual += norm(x)`
    #[inline(always)]
    fn add(self, x: &[f32], residual: &mut [f32]) {
        let factor = self.inverse_rms(x);
        let columns = residual.iter_mut().zip(x).zip(&self.weight.factors);
        match self.sums {
            Sums::F32 => columns.for_each(|((residual, x), weight)| *residual += x * factor * weight),
            Sums::TensorCore => {
                columns.for_each(|((residual, x), weight)| *residual = (x * factor).mul_add(*weight, *residual));
            }
        }
    }
}

/// `norm(x)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Normed<'a> {
    pub(crate) x: &'a Tensor,
    pub(crate) norm: RmsNorm<'a>,
}

impl RowOp for Normed<'_> {
    #[inline(always)]
    fn apply(self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(self.x.row(row));
        self.norm.apply(out);
    }
}

/// `+ norm(x)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlusNormed<'a>(pub(crate) Normed<'a>);

impl RowOp for PlusNormed<'_> {
    #[inline(always)]
    fn apply(self, row: usize, residual: &mut [f32]) {
        let Normed { x, norm } = self.0;
        norm.add(x.row(row), residual);
    }
}

/// `norm(residual + norm_post(x))` of some rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LastNormed<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) residual: &'a Tensor,
    pub(crate) plus: PlusNormed<'a>,
    pub(crate) norm: RmsNorm<'a>,
}

impl RowOp for LastNormed<'_> {
    #[inline(always)]
    fn apply(self, index: usize, out: &mut [f32]) {
        let row = self.rows[index] as usize;
        out.copy_from_slice(self.residual.row(row));
        self.plus.apply(row, out);
        self.norm.apply(out);
    }
}

/// `gelu_tanh(gate) * up` of rows that hold gate, then up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geglu<'a> {
    pub(crate) gate_up: &'a Tensor,
    pub(crate) sums: Sums,
}

impl RowOp for Geglu<'_> {
    #[inline(always)]
    fn apply(self, row: usize, out: &mut [f32]) {
        let (gate, up) = self.gate_up.row(row).split_at(out.len());
        let columns = out.iter_mut().zip(gate).zip(up);
        match self.sums {
            Sums::F32 => columns.for_each(|((out, gate), up)| *out = math::gelu_tanh(*gate) * up),
            Sums::TensorCore => columns.for_each(|((out, gate), up)| *out = hopper::gated(*gate, *up)),
        }
    }
}
