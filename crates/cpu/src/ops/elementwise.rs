//! Operations on one row at a time: norms, residuals, GeGLU, and the quantisation that ends each.

use lapidary_model::ActivationScheme;

use super::rows_per_task;
use crate::math;
use crate::parallel::Pool;
use crate::simd::{Dispatch, Kernel, Simd};
use crate::tensor::{Activation, ActivationRow, Norm, Tensor};

/// Where work runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct On<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) dispatch: Dispatch,
}

impl On<'_> {
    /// Fills the first `num_rows` rows of `out` by `fill(row index, values)`, then quantises them.
    pub(crate) fn fill_rows(
        self,
        out: &mut Activation,
        num_rows: usize,
        scheme: ActivationScheme,
        fill: impl Fn(usize, &mut [f32]) + Sync + Copy,
    ) {
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
                    fill,
                });
            });
    }

    /// Updates the first `num_rows` rows of `tensor` by `update(row index, values)`.
    pub(crate) fn update_rows(
        self,
        tensor: &mut Tensor,
        num_rows: usize,
        update: impl Fn(usize, &mut [f32]) + Sync + Copy,
    ) {
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

struct FillRows<'a, F> {
    rows: &'a mut [ActivationRow],
    first: usize,
    cols: usize,
    scheme: ActivationScheme,
    to_pairs: bool,
    fill: F,
}

impl<F: Fn(usize, &mut [f32])> Kernel for FillRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (index, row) in self.rows.iter_mut().enumerate() {
            (self.fill)(self.first + index, &mut row.values[..self.cols]);
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

impl<F: Fn(usize, &mut [f32])> Kernel for UpdateRows<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (index, row) in self.rows.chunks_exact_mut(self.cols).enumerate() {
            (self.update)(self.first + index, row);
        }
    }
}

/// `rsqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (math::sum_of(x, |x| x * x) / x.len() as f32 + eps).sqrt()
}

/// `out = norm(x)`.
#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], norm: &Norm, eps: f32, out: &mut [f32]) {
    let factor = inverse_rms(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(&norm.factors) {
        *out = x * factor * weight;
    }
}

/// `residual += norm(x)`.
#[inline(always)]
pub(crate) fn add_rms_norm(x: &[f32], norm: &Norm, eps: f32, residual: &mut [f32]) {
    let factor = inverse_rms(x, eps);
    for ((residual, x), weight) in residual.iter_mut().zip(x).zip(&norm.factors) {
        *residual += x * factor * weight;
    }
}

/// `out = gelu_tanh(gate) * up` of a row that holds gate, then up.
#[inline(always)]
pub(crate) fn geglu(gate_up: &[f32], out: &mut [f32]) {
    let (gate, up) = gate_up.split_at(out.len());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = math::gelu_tanh(*gate) * up;
    }
}

/// `out = norm(residual + norm_post(x))`.
#[inline(always)]
pub(crate) fn last_norms(x: &[f32], post: &Norm, residual: &[f32], norm: &Norm, eps: f32, out: &mut [f32]) {
    out.copy_from_slice(residual);
    add_rms_norm(x, post, eps, out);
    let factor = inverse_rms(out, eps);
    for (out, weight) in out.iter_mut().zip(&norm.factors) {
        *out = *out * factor * weight;
    }
}
