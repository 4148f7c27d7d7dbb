//! Launches `kernels/rows.cu`: embedding, norms, the gated activation, quantisation.

use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr, Grid, Kernel, kernel_params, launch};
use crate::pack::Panels;
use crate::step::StepPointers;
use crate::tensor::{ActivationParams, Norm, Tensor};

/// Columns next to each other that a thread owns.
const GROUP: usize = 8;
const EMBED_THREADS: usize = 128;
const GEGLU_THREADS: usize = 128;
/// Columns that a block of `geglu` computes: two groups a thread.
const GEGLU_COLS: usize = GEGLU_THREADS * 2 * GROUP;
/// Of the kernels that take rows of any length, and the longest such row.
const ANY_THREADS: u32 = 512;
const ANY_COLS: usize = 8192;
/// Twice the sums of at most 64 pieces of a row and the largest values of at most 18 warps.
const SCRATCH_BYTES: usize = 4 * 2 * (64 + 20);

/// Kernels of one operation.
#[derive(Debug)]
struct Family {
    /// For rows that are whole groups long: the longest that each takes, shortest first.
    whole: Vec<(usize, Kernel)>,
    /// For rows of any length up to 8192 columns.
    any: Kernel,
}

impl Family {
    /// `whole`: name, longest row, threads of each.
    fn load(
        device: &mut dyn Device,
        whole: &[(&'static str, usize, u32)],
        any: &'static str,
    ) -> Result<Self, BackendError> {
        let whole = whole
            .iter()
            .map(|(name, longest, threads)| Ok((*longest, device.kernel(name, *threads)?)));
        Ok(Self {
            whole: whole.collect::<Result<_, BackendError>>()?,
            any: device.kernel(any, ANY_THREADS)?,
        })
    }

    fn for_length(&self, cols: usize) -> Result<&Kernel, BackendError> {
        let found = if cols.is_multiple_of(GROUP) {
            self.whole
                .iter()
                .find(|(longest, _)| cols <= *longest)
                .map(|(_, kernel)| kernel)
        } else {
            (cols <= ANY_COLS).then_some(&self.any)
        };
        found.ok_or_else(|| BackendError::Unsupported(format!("rows of {cols} columns")))
    }
}

/// Blocks that stay on a multiprocessor and walk rows, for more rows than run at once otherwise.
#[derive(Debug)]
struct Walk {
    kernel: Kernel,
    /// The longest row, in whole groups.
    longest: usize,
    /// Of a block: rows on their way, and the scratch.
    shared_bytes: usize,
    blocks_per_multiprocessor: usize,
}

impl Walk {
    /// As the kernel is declared; `stages`: rows it has room for.
    fn load_add_norm(
        device: &mut dyn Device,
        name: &'static str,
        threads: usize,
        stages: usize,
        blocks_per_multiprocessor: usize,
    ) -> Result<Self, BackendError> {
        let longest = threads * GROUP;
        // x is bf16, the residual f32, as are the weights of both norms.
        let shared_bytes = longest * (stages * (2 + 4) + 2 * 4) + SCRATCH_BYTES;
        Ok(Self {
            kernel: device.kernel(name, threads as u32)?,
            longest,
            shared_bytes,
            blocks_per_multiprocessor,
        })
    }

    fn blocks(&self, multiprocessors: usize) -> usize {
        self.blocks_per_multiprocessor * multiprocessors
    }
}

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
    norm_f32: Family,
    norm_bf16: Family,
    add_norm: Family,
    /// Shortest rows first.
    add_norm_many: [Walk; 3],
    last_norm: Family,
    quantize: Family,
    geglu: [Kernel; 2],
    geglu_token: [Kernel; 2],
    multiprocessors: usize,
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
    eps: f32,
    inverse_cols: f32,
    cols: i32,
    padding: i32,
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
    eps: f32,
    inverse_cols: f32,
    cols: i32,
    padding: i32,
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
            eps: self.eps,
            inverse_cols: 1.0 / self.x.cols as f32,
            cols: self.x.cols as i32,
            padding: 0,
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
            norm_f32: Family::load(device, &[("norm_f32_16384", 16384, 512)], "norm_f32_any")?,
            norm_bf16: Family::load(device, &[("norm_bf16_16384", 16384, 512)], "norm_bf16_any")?,
            add_norm: Family::load(
                device,
                &[
                    ("add_norm_2560", 2560, 320),
                    ("add_norm_3584", 3584, 448),
                    ("add_norm_4608", 4608, 576),
                    ("add_norm_16384", 16384, 512),
                ],
                "add_norm_any",
            )?,
            add_norm_many: [
                Walk::load_add_norm(device, "add_norm_many_2560", 320, 3, 3)?,
                Walk::load_add_norm(device, "add_norm_many_3584", 448, 3, 2)?,
                Walk::load_add_norm(device, "add_norm_many_4608", 576, 2, 2)?,
            ],
            last_norm: Family::load(device, &[("last_norm_16384", 16384, 512)], "last_norm_any")?,
            quantize: Family::load(
                device,
                &[("quantize_4096", 4096, 512), ("quantize_16384", 16384, 512)],
                "quantize_any",
            )?,
            geglu: [
                device.kernel("geglu", GEGLU_THREADS as u32)?,
                device.kernel("geglu_any", GEGLU_THREADS as u32)?,
            ],
            geglu_token: [
                device.kernel("geglu_token", 512)?,
                device.kernel("geglu_token_any", ANY_THREADS)?,
            ],
            multiprocessors: device.multiprocessors(),
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
        launch(device, kernel, grid(tokens.min(out.rows), pieces), &params)
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
        let family = if x.is_wide { &self.norm_f32 } else { &self.norm_bf16 };
        let kernel = family.for_length(x.cols)?;
        let params = norm_params(rows, x, weights.factors, eps, out);
        launch(device, kernel, grid(rows.at_most.min(x.rows), 1), &params)
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
        let kernel = self.quantize.for_length(x.cols)?;
        let params = norm_params(rows, x, DevicePtr::NULL, 0.0, out);
        launch(device, kernel, grid(rows.at_most.min(x.rows), 1), &params)
    }

    /// `residual += norm_post(x)`, then `out = quantise(norm_pre(residual))`, with the same bits for any number of rows.
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
        let params = branch.params(rows.on_device, DevicePtr::NULL, out);
        let rows = rows.at_most.min(branch.x.rows).min(branch.residual.rows);
        if let Some(walk) = self.walk_for(branch.x.cols, rows) {
            let grid = Grid::line(walk.blocks(self.multiprocessors)).shared(walk.shared_bytes);
            return launch(device, &walk.kernel, grid, &params);
        }
        let kernel = self.add_norm.for_length(branch.x.cols)?;
        launch(device, kernel, grid(rows, 1), &params)
    }

    /// For rows that its blocks would not all have at once.
    fn walk_for(&self, cols: usize, rows: usize) -> Option<&Walk> {
        let fits = |walk: &&Walk| cols.is_multiple_of(GROUP) && cols <= walk.longest;
        let walk = self.add_norm_many.iter().find(fits)?;
        (rows > walk.blocks(self.multiprocessors)).then_some(walk)
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
        let kernel = self.last_norm.for_length(branch.x.cols)?;
        let params = branch.params(step.num_samples(), step.sample_rows, out);
        launch(device, kernel, grid(samples, 1), &params)
    }

    /// `out = quantise(gelu_tanh(gate) * up)` of rows that hold gate and up in turns (`kernels/common/gated.cuh`).
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
        // Kernels read rows before they know how many are asked for.
        let rows = rows.at_most.min(gate_up.rows);
        let any = usize::from(!cols.is_multiple_of(GROUP));
        if out.has_token_scales() {
            launch(device, &self.geglu_token[any], grid(rows, 1), &params)
        } else {
            let pieces = cols.div_ceil(GEGLU_COLS);
            launch(device, &self.geglu[any], grid(rows, pieces), &params)
        }
    }
}

fn norm_params(rows: RowCount, x: &Tensor, weights: DevicePtr, eps: f32, out: ActivationParams) -> NormParams {
    NormParams {
        num_rows: rows.on_device,
        x: x.data,
        weights,
        out,
        eps,
        inverse_cols: 1.0 / x.cols as f32,
        cols: x.cols as i32,
        padding: 0,
    }
}

fn grid(rows: usize, pieces: usize) -> Grid {
    let grid = Grid {
        blocks: [rows as u32, pieces as u32, 1],
        shared_bytes: 0,
    };
    grid.shared(SCRATCH_BYTES)
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
