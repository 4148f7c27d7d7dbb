//! Launches `kernels/rows.cu`: embedding, norms, the gated activation, quantisation.

use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr, Grid, Kernel, kernel_params, launch};
use crate::pack::Panels;
use crate::step::StepPointers;
use crate::tensor::{ActivationParams, Norm, Tensor};

/// Columns that a thread of the embedding or of a norm owns.
const GROUP: usize = 8;
const EMBED_THREADS: usize = 128;
const GEGLU_THREADS: usize = 128;
/// Columns that a block of `geglu` computes.
const GEGLU_COLS: usize = GEGLU_THREADS * 16;
/// Sums, largest values, twice, of at most 32 warps.
const SCRATCH_BYTES: usize = 4 * 2 * 2 * 32;
/// The longest row that norms hold in registers.
const MAX_COLS: usize = 16384;

/// Kernels that differ in the longest row they take, shortest first.
type ByLength = Vec<(usize, Kernel)>;

/// Rows of a launch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowCount {
    /// Where the kernels read how many rows there are.
    pub(crate) on_device: DevicePtr,
    /// No more than these: the size of the grid.
    pub(crate) at_most: usize,
}

/// The kernels of one device.
#[derive(Debug)]
pub(crate) struct RowKernels {
    embed_f32: Kernel,
    embed_bf16: Kernel,
    norm_f32: Kernel,
    norm_bf16: Kernel,
    add_norm: ByLength,
    last_norm: Kernel,
    quantize: ByLength,
    geglu: Kernel,
    geglu_token: Kernel,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct EmbedParams {
    step: StepPointers,
    table: DevicePtr,
    out: DevicePtr,
    table_rows: i32,
    cols: i32,
    scale: f32,
    padding: i32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct NormParams {
    num_rows: DevicePtr,
    x: DevicePtr,
    weights: DevicePtr,
    out: ActivationParams,
    allocated_rows: i32,
    cols: i32,
    eps: f32,
    inverse_cols: f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AddNormParams {
    num_rows: DevicePtr,
    x: DevicePtr,
    post_weights: DevicePtr,
    pre_weights: DevicePtr,
    residual: DevicePtr,
    rows: DevicePtr,
    out: ActivationParams,
    allocated_rows: i32,
    cols: i32,
    eps: f32,
    inverse_cols: f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GegluParams {
    num_rows: DevicePtr,
    gate_up: DevicePtr,
    out: ActivationParams,
    cols: i32,
    padding: i32,
}

kernel_params!(EmbedParams, NormParams, AddNormParams, GegluParams);

/// A branch on its way into the residual stream, and the norms around it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Branch<'a> {
    /// Output of a sub-layer, native.
    pub(crate) x: &'a Tensor,
    /// Of `x`.
    pub(crate) post: &'a Norm,
    /// Of the sum.
    pub(crate) pre: &'a Norm,
    /// Wide.
    pub(crate) residual: &'a Tensor,
    pub(crate) eps: f32,
}

impl Branch<'_> {
    fn params(&self, num_rows: DevicePtr, rows: DevicePtr, out: ActivationParams) -> AddNormParams {
        AddNormParams {
            num_rows,
            x: self.x.data,
            post_weights: self.post.factors,
            pre_weights: self.pre.factors,
            residual: self.residual.data,
            rows,
            out,
            allocated_rows: self.x.rows.min(self.residual.rows) as i32,
            cols: self.x.cols as i32,
            eps: self.eps,
            inverse_cols: 1.0 / self.x.cols as f32,
        }
    }
}

impl RowKernels {
    /// # Errors
    /// The program has no kernels for this device.
    pub(crate) fn load(device: &mut dyn Device) -> Result<Self, BackendError> {
        Ok(Self {
            embed_f32: device.kernel("embed_f32", EMBED_THREADS as u32)?,
            embed_bf16: device.kernel("embed_bf16", EMBED_THREADS as u32)?,
            norm_f32: device.kernel("norm_f32_16384", 512)?,
            norm_bf16: device.kernel("norm_bf16_16384", 512)?,
            add_norm: vec![
                (2560, device.kernel("add_norm_2560", 320)?),
                (3584, device.kernel("add_norm_3584", 448)?),
                (4608, device.kernel("add_norm_4608", 576)?),
                (MAX_COLS, device.kernel("add_norm_16384", 512)?),
            ],
            last_norm: device.kernel("last_norm_16384", 512)?,
            quantize: vec![
                (4096, device.kernel("quantize_4096", 512)?),
                (MAX_COLS, device.kernel("quantize_16384", 512)?),
            ],
            geglu: device.kernel("geglu", GEGLU_THREADS as u32)?,
            geglu_token: device.kernel("geglu_token", 512)?,
        })
    }

    /// `out[t] = table[token_ids[t]] * scale` for at most `tokens` rows; `out` of either width.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn embed(
        &self,
        device: &mut dyn Device,
        step: &StepPointers,
        tokens: usize,
        (table, scale): (&Panels, f32),
        out: &Tensor,
    ) -> Result<(), BackendError> {
        let kernel = if out.is_wide { &self.embed_f32 } else { &self.embed_bf16 };
        let params = EmbedParams {
            step: *step,
            table: table.data,
            out: out.data,
            table_rows: table.padded_rows as i32,
            cols: table.cols as i32,
            scale,
            padding: 0,
        };
        let pieces = table.cols.div_ceil(GROUP * EMBED_THREADS);
        launch(device, kernel, grid(tokens, pieces), &params)
    }

    /// `out = quantise(norm(x))`; `x` of either width.
    ///
    /// # Errors
    /// Rows longer than norms can hold, or the device failed.
    pub(crate) fn norm(
        &self,
        device: &mut dyn Device,
        rows: RowCount,
        x: &Tensor,
        (weights, eps): (&Norm, f32),
        out: ActivationParams,
    ) -> Result<(), BackendError> {
        check_length(x.cols)?;
        let kernel = if x.is_wide { &self.norm_f32 } else { &self.norm_bf16 };
        let params = norm_params(rows, x, weights.factors, eps, out);
        launch(device, kernel, grid(rows.at_most, 1), &params)
    }

    /// `out = quantise(x)`; `x` is native.
    ///
    /// # Errors
    /// Rows longer than this can hold, or the device failed.
    pub(crate) fn quantize(
        &self,
        device: &mut dyn Device,
        rows: RowCount,
        x: &Tensor,
        out: ActivationParams,
    ) -> Result<(), BackendError> {
        let kernel = for_length(&self.quantize, x.cols)?;
        let params = norm_params(rows, x, DevicePtr::NULL, 0.0, out);
        launch(device, kernel, grid(rows.at_most, 1), &params)
    }

    /// `residual += norm_post(x)`, then `out = quantise(norm_pre(residual))`.
    ///
    /// # Errors
    /// Rows longer than norms can hold, or the device failed.
    pub(crate) fn add_norm(
        &self,
        device: &mut dyn Device,
        rows: RowCount,
        branch: Branch<'_>,
        out: ActivationParams,
    ) -> Result<(), BackendError> {
        let kernel = for_length(&self.add_norm, branch.x.cols)?;
        let params = branch.params(rows.on_device, DevicePtr::NULL, out);
        launch(device, kernel, grid(rows.at_most, 1), &params)
    }

    /// Row `s` of `out` is `quantise(norm_pre(residual + norm_post(x)))` of the step's `s`th sampled row, of which there
    /// are `samples` at most. The residual stays as it is.
    ///
    /// # Errors
    /// Rows longer than norms can hold, or the device failed.
    pub(crate) fn last_norm(
        &self,
        device: &mut dyn Device,
        step: &StepPointers,
        samples: usize,
        branch: Branch<'_>,
        out: ActivationParams,
    ) -> Result<(), BackendError> {
        check_length(branch.x.cols)?;
        let params = branch.params(step.num_samples(), step.sample_rows, out);
        launch(device, &self.last_norm, grid(samples, 1), &params)
    }

    /// `out = quantise(gelu_tanh(gate) * up)` of rows that hold gate, then up.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn geglu(
        &self,
        device: &mut dyn Device,
        rows: RowCount,
        gate_up: &Tensor,
        out: ActivationParams,
    ) -> Result<(), BackendError> {
        let cols = gate_up.cols / 2;
        let params = GegluParams {
            num_rows: rows.on_device,
            gate_up: gate_up.data,
            out,
            cols: cols as i32,
            padding: 0,
        };
        if out.has_token_scales() {
            launch(device, &self.geglu_token, grid(rows.at_most, 1), &params)
        } else {
            launch(
                device,
                &self.geglu,
                grid(rows.at_most, cols.div_ceil(GEGLU_COLS)),
                &params,
            )
        }
    }
}

fn norm_params(rows: RowCount, x: &Tensor, weights: DevicePtr, eps: f32, out: ActivationParams) -> NormParams {
    NormParams {
        num_rows: rows.on_device,
        x: x.data,
        weights,
        out,
        allocated_rows: x.rows as i32,
        cols: x.cols as i32,
        eps,
        inverse_cols: 1.0 / x.cols as f32,
    }
}

fn grid(rows: usize, pieces: usize) -> Grid {
    let grid = Grid {
        blocks: [rows as u32, pieces as u32, 1],
        shared_bytes: 0,
    };
    grid.shared(SCRATCH_BYTES)
}

fn check_length(cols: usize) -> Result<(), BackendError> {
    if cols <= MAX_COLS {
        Ok(())
    } else {
        Err(BackendError::Unsupported(format!("rows of {cols} columns")))
    }
}

fn for_length(kernels: &ByLength, cols: usize) -> Result<&Kernel, BackendError> {
    check_length(cols)?;
    let fitting = kernels.iter().find(|(longest, _)| cols <= *longest);
    fitting
        .map(|(_, kernel)| kernel)
        .ok_or_else(|| BackendError::Unsupported(format!("rows of {cols} columns")))
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
