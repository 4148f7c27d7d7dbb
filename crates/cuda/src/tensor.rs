//! What the backend's associated types are in device memory.

use lapidary_model::{ActivationScheme, BackendError, KvScales};

use crate::device::{Device, DevicePtr};
use crate::pack::{Element, PANEL_BYTES, Panels};

/// Rows of activations are padded to a multiple of this: the height of the prefill GEMM's tile.
const ACTIVATION_ROW_MULTIPLE: usize = 128;

/// `[rows, cols]` row-major, bf16; f32 if wide.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) data: DevicePtr,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) is_wide: bool,
}

impl Tensor {
    pub(crate) fn bytes(rows: usize, cols: usize, is_wide: bool) -> usize {
        rows * cols * if is_wide { 4 } else { 2 }
    }

    pub(crate) fn alloc(
        device: &mut dyn Device,
        what: &'static str,
        [rows, cols]: [usize; 2],
        is_wide: bool,
    ) -> Result<Self, BackendError> {
        let bytes = Self::bytes(rows, cols, is_wide);
        let data = device.alloc(what, bytes)?;
        // What is never written must be finite: a kernel may load it and discard the product.
        device.zero(data, bytes)?;
        Ok(Self {
            data,
            rows,
            cols,
            is_wide,
        })
    }
}

/// Input of a linear layer: panels of e4m3 or bf16 and, for e4m3, a scale for each row.
#[derive(Debug)]
pub struct Activation {
    panels: DevicePtr,
    scales: DevicePtr,
    pub(crate) cols: usize,
    /// Capacity, a multiple of 128.
    row_stride: usize,
    pub(crate) scheme: ActivationScheme,
}

/// The kernels' `Activation` (`kernels/common/numbers.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ActivationParams {
    pub(crate) panels: DevicePtr,
    pub(crate) scales: DevicePtr,
    pub(crate) row_stride: i32,
    pub(crate) scheme: i32,
    pub(crate) static_scale: f32,
    pub(crate) padding: i32,
}

impl ActivationParams {
    /// Whether all rows have the one scale that is known beforehand.
    pub(crate) fn has_static_scale(&self) -> bool {
        self.scheme == 1
    }

    /// Whether each row gets the scale of its largest value.
    pub(crate) fn has_token_scales(&self) -> bool {
        self.scheme == 2
    }
}

impl Activation {
    pub(crate) fn bytes(rows: usize, cols: usize) -> usize {
        let rows = rows.next_multiple_of(ACTIVATION_ROW_MULTIPLE);
        // bf16 is the larger of the two forms.
        Element::Bf16.panels(cols) * rows * PANEL_BYTES + 4 * rows
    }

    pub(crate) fn alloc(device: &mut dyn Device, rows: usize, cols: usize) -> Result<Self, BackendError> {
        let row_stride = rows.next_multiple_of(ACTIVATION_ROW_MULTIPLE);
        let panel_bytes = Self::bytes(rows, cols) - 4 * row_stride;
        let panels = device.alloc("an activation", panel_bytes)?;
        let scales = device.alloc("an activation's scales", 4 * row_stride)?;
        device.zero(panels, panel_bytes)?;
        device.zero(scales, 4 * row_stride)?;
        Ok(Self {
            panels,
            scales,
            cols,
            row_stride,
            scheme: ActivationScheme::None,
        })
    }

    /// For a kernel that writes it by `scheme`.
    pub(crate) fn write(
        &mut self,
        device: &mut dyn Device,
        scheme: ActivationScheme,
    ) -> Result<ActivationParams, BackendError> {
        let (before, after) = (Element::of_input(self.scheme), Element::of_input(scheme));
        if before != after && !self.cols.is_multiple_of(PANEL_BYTES) {
            // The last panel's padding lies elsewhere now.
            device.zero(
                self.panels,
                Element::Bf16.panels(self.cols) * self.row_stride * PANEL_BYTES,
            )?;
        }
        self.scheme = scheme;
        Ok(self.params())
    }

    /// For a kernel that reads it.
    pub(crate) fn params(&self) -> ActivationParams {
        let (scheme, static_scale) = match self.scheme {
            ActivationScheme::None => (0, 1.0),
            ActivationScheme::Fp8Static { scale } => (1, scale),
            ActivationScheme::Fp8Token => (2, 1.0),
        };
        ActivationParams {
            panels: self.panels,
            scales: self.scales,
            row_stride: self.row_stride as i32,
            scheme,
            static_scale,
            padding: 0,
        }
    }
}

/// Weights of one (stacked) projection.
#[derive(Debug)]
pub struct Linear {
    pub(crate) weights: Panels,
    /// One f32 for each padded row; null for weights that have none.
    pub(crate) scales: DevicePtr,
    pub(crate) input: ActivationScheme,
}

/// Weights of gate and up, the outputs of which take turns (`kernels/common/gated.cuh`).
#[derive(Debug)]
pub struct GatedLinear(pub(crate) Linear);

/// `1 + weight` of an RMS norm, f32.
#[derive(Debug)]
pub struct Norm {
    pub(crate) factors: DevicePtr,
}

/// The embedding table in bf16 panels, which is the output projection too.
#[derive(Debug)]
pub struct Embedding {
    pub(crate) table: Panels,
}

/// Keys and values of one layer: bf16 or e4m3 `[num_blocks][2: K, V][num_kv_heads][block_size][head_dim]`.
#[derive(Debug)]
pub struct KvLayer {
    pub(crate) data: DevicePtr,
    pub(crate) block_size: usize,
    pub(crate) scales: KvScales,
}
