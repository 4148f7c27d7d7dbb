//! Linear layers and the output projection of few tokens (`kernels/slab_gemm.sm90a.cu`): Hopper only.

use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr, Grid, Kernel, kernel_params, launch};
use crate::matmul::Product;
use crate::pack::{PANEL_BYTES, Panels};
use crate::slab_gemm::plan::{Plan, Shape, Tuning, VARIANTS};
use crate::tensor::Tensor;

mod plan;
#[cfg(all(test, feature = "emulator"))]
mod tests;

/// Tokens of a launch.
pub(crate) const MAX_TOKENS: usize = 64;
/// Of a warpgroup.
const GROUP_THREADS: u32 = 128;
/// Those that copy.
const COPY_THREADS: u32 = 64;

/// The kernels' `SlabGemmParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SlabGemmParams {
    x: DevicePtr,
    x_scales: DevicePtr,
    w: DevicePtr,
    w_scales: DevicePtr,
    out: DevicePtr,
    num_rows: DevicePtr,
    first_row: i32,
    x_rows: i32,
    w_rows: i32,
    k_panels: i32,
    out_stride: i32,
    out_is_f32: i32,
    softcap: f32,
    slab_rows: i32,
    long_slabs: i32,
    pass_rows: i32,
    panel_rows: i32,
    w_stages: i32,
    x_stages: i32,
    prefetched_panels: i32,
}
kernel_params!(SlabGemmParams);

/// The loaded kernels.
#[derive(Debug)]
pub(crate) struct SlabGemm {
    kernels: Vec<Kernel>,
    multiprocessors: usize,
}

impl SlabGemm {
    /// # Errors
    /// The device is no Hopper.
    pub(crate) fn load(device: &mut dyn Device) -> Result<Self, BackendError> {
        let kernels = VARIANTS
            .iter()
            .map(|variant| device.kernel(variant.name, variant.groups as u32 * GROUP_THREADS + COPY_THREADS))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            kernels,
            multiprocessors: device.multiprocessors(),
        })
    }

    /// Computes a product.
    ///
    /// # Errors
    /// The launch failed.
    pub(crate) fn launch(&self, device: &mut dyn Device, product: &Product<'_>) -> Result<(), BackendError> {
        for first_row in (0..product.max_rows).step_by(MAX_TOKENS) {
            let tokens = MAX_TOKENS.min(product.max_rows - first_row);
            let shape = Shape::new(product.w, tokens);
            let plan = Plan::new(shape, Tuning::of(shape, self.multiprocessors))
                .expect("the standard tuning of a shape is possible");
            self.launch_plan(device, product, first_row, &plan)?;
        }
        Ok(())
    }

    /// Ways to cut a product of at most 64 tokens: the standard one first, then all that could be faster somewhere.
    pub(crate) fn plans(&self, w: &Panels, tokens: usize) -> Vec<Plan> {
        let shape = Shape::new(w, tokens);
        let standard = Tuning::of(shape, self.multiprocessors);
        let tunings = std::iter::once(standard).chain(standard.others());
        tunings.filter_map(|tuning| Plan::new(shape, tuning)).collect()
    }

    /// Computes the rows from `first_row` on as planned.
    pub(crate) fn launch_plan(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        first_row: usize,
        plan: &Plan,
    ) -> Result<(), BackendError> {
        let kernel = VARIANTS
            .iter()
            .zip(&self.kernels)
            .find_map(|(variant, kernel)| (*variant == *plan.variant).then_some(kernel))
            .expect("a kernel was loaded for every variant");
        let grid = Grid::line(plan.blocks).shared(plan.shared_bytes);
        launch(device, kernel, grid, &SlabGemmParams::new(product, first_row, plan))
    }
}

impl SlabGemmParams {
    fn new(product: &Product<'_>, first_row: usize, plan: &Plan) -> Self {
        let Product { x, w, out, .. } = *product;
        assert!(first_row.is_multiple_of(8), "the swizzle repeats every 8 rows");
        let out_bytes = Tensor::bytes(first_row, out.cols, out.is_wide);
        Self {
            x: x.panels.offset(first_row * PANEL_BYTES),
            x_scales: match product.x_scales() {
                DevicePtr::NULL => DevicePtr::NULL,
                scales => scales.offset(4 * first_row),
            },
            w: w.data,
            w_scales: product.w_scales,
            out: out.data.offset(out_bytes),
            num_rows: product.num_rows,
            first_row: first_row as i32,
            x_rows: x.row_stride,
            w_rows: w.padded_rows as i32,
            k_panels: w.panels as i32,
            out_stride: out.cols as i32,
            out_is_f32: i32::from(out.is_wide),
            softcap: product.softcap.unwrap_or(0.0),
            slab_rows: plan.slab_rows as i32,
            long_slabs: plan.long_slabs as i32,
            pass_rows: plan.pass_rows as i32,
            panel_rows: plan.panel_rows as i32,
            w_stages: plan.w_stages as i32,
            x_stages: plan.x_stages as i32,
            prefetched_panels: plan.prefetched_panels as i32,
        }
    }
}
