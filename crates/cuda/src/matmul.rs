//! Matrix products: which kernel takes which.

use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr};
use crate::gemm::Gemm;
use crate::pack::{Element, Panels};
use crate::slab_gemm::{self, SlabGemm};
use crate::tensor::{ActivationParams, Tensor};

/// Columns of gate, and of up, that a thread of the gating kernels stores together.
const GATED_COLUMNS: usize = 8;

/// Compute capability of the kernels with wgmma.
const HOPPER: u32 = 90;

/// `out[m][n] = (sum over k of x[m][k] * w[n][k])`, times the scales of both, soft-capped if asked, for every row of the step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a> {
    /// `[rows, K]`, of the weights' element.
    pub(crate) x: &'a ActivationParams,
    /// `[N, K]`.
    pub(crate) w: &'a Panels,
    /// One f32 for each padded row of `w`; null for none.
    pub(crate) w_scales: DevicePtr,
    /// `[rows, N]`: bf16, or f32 if wide.
    pub(crate) out: &'a Tensor,
    /// `c`, for f32: results become `c * tanh(result / c)`.
    pub(crate) softcap: Option<f32>,
    /// An i32 in device memory: how many rows the step has. Rows from there on are not written.
    pub(crate) num_rows: DevicePtr,
    /// The most it can be, at a launch or any replay of it.
    pub(crate) max_rows: usize,
}

impl Product<'_> {
    /// The tokens' scales; null for bf16, which has none.
    pub(crate) fn x_scales(&self) -> DevicePtr {
        match self.w.element {
            Element::E4m3 => self.x.scales,
            Element::Bf16 => DevicePtr::NULL,
        }
    }

    /// Refuses operands that are not of one kind or do not fit.
    fn check(&self) -> Result<(), BackendError> {
        let Self {
            x, w, out, max_rows, ..
        } = self;
        let of_one_kind = (w.element == Element::E4m3) == (x.scheme != 0);
        let fits = *max_rows <= out.rows.min(x.row_stride as usize) && out.cols >= w.rows;
        if of_one_kind && fits && (out.is_wide || w.rows.is_multiple_of(8)) {
            return Ok(());
        }
        Err(BackendError::Unsupported(format!(
            "a product of {max_rows} rows by scheme {} and {:?} [{}, {}] as [{}, {}]",
            x.scheme, w.element, w.rows, w.cols, out.rows, out.cols
        )))
    }
}

/// The kernels of one device.
#[derive(Debug)]
pub(crate) struct Matmul {
    /// For up to [`slab_gemm::MAX_TOKENS`] tokens, on Hopper.
    slabs: Option<SlabGemm>,
    /// For all others.
    gemm: Gemm,
}

impl Matmul {
    /// # Errors
    /// The program has no kernels for this device.
    pub(crate) fn load(device: &mut dyn Device) -> Result<Self, BackendError> {
        let is_hopper = device.compute_capability() == HOPPER;
        Ok(Self {
            slabs: is_hopper.then(|| SlabGemm::load(device)).transpose()?,
            gemm: Gemm::load(device)?,
        })
    }

    /// Those for few tokens.
    ///
    /// # Errors
    /// The device is no Hopper.
    pub(crate) fn slabs(&self) -> Result<&SlabGemm, BackendError> {
        let none = || BackendError::Unsupported("products of slabs need compute capability 9.0".to_owned());
        self.slabs.as_ref().ok_or_else(none)
    }

    /// Those for many tokens, or for any number.
    pub(crate) fn gemm(&self) -> &Gemm {
        &self.gemm
    }

    /// Computes a product. All kernels add in the same order, so that a row's bits do not depend on which one it was.
    ///
    /// # Errors
    /// Operands that do not fit, or the launch failed.
    pub(crate) fn run(&self, device: &mut dyn Device, product: &Product<'_>) -> Result<(), BackendError> {
        product.check()?;
        match &self.slabs {
            Some(slabs) if product.max_rows <= slab_gemm::MAX_TOKENS => slabs.launch(device, product),
            _ => self.gemm.multiply(device, product),
        }
    }

    /// Whether [`Self::run_gated`] takes a product of gate and up. Of few tokens the product is bound by the bytes of the
    /// weights, and what is added to it costs more than another kernel.
    pub(crate) fn gates(&self, product: &Product<'_>, gated: &ActivationParams) -> bool {
        product.max_rows > slab_gemm::MAX_TOKENS
            && gated.has_static_scale()
            && product.w.rows.is_multiple_of(2 * GATED_COLUMNS)
            && self.gemm.can_gate(product.w.element)
    }

    /// `gated[m][n] = gelu_tanh(gate) * up`, quantised, where gate and up are the columns of the product in turns of eight,
    /// rounded to bf16. The product itself is not written.
    ///
    /// # Errors
    /// Operands that do not fit, or the launch failed.
    pub(crate) fn run_gated(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        gated: ActivationParams,
    ) -> Result<(), BackendError> {
        product.check()?;
        self.gemm.multiply_gated(device, product, gated)
    }
}
