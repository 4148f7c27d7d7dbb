//! Matrix products: which kernel takes which.

use lapidary_model::BackendError;

use crate::device::Device;
use crate::gemm::Gemm;
use crate::slab_gemm::{self, SlabGemm};

pub(crate) use crate::slab_gemm::Product;

/// Compute capability of the kernels with wgmma.
const HOPPER: u32 = 90;

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

    /// Computes a product. All kernels add in the same order, so that a row's bits do not depend on which one it was.
    ///
    /// # Errors
    /// The launch failed.
    pub(crate) fn run(&self, device: &mut dyn Device, product: &Product<'_>) -> Result<(), BackendError> {
        match &self.slabs {
            Some(slabs) if product.max_rows <= slab_gemm::MAX_TOKENS => slabs.launch(device, product),
            _ => self.gemm.launch(device, product),
        }
    }
}
