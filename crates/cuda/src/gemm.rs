//! Products of activations and weights: of many tokens on Hopper (`kernels/gemm.sm90a.cu`), of any number elsewhere
//! (`kernels/gemm_portable.cu`). All tilings of a family give a row the same bits, so the choice is one of speed.

use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr, Grid, Kernel, kernel_params, launch};
use crate::matmul::Product;
use crate::pack::{Element, PANEL_BYTES};
use crate::tensor::{ActivationParams, Tensor};

/// The kernels' `GemmParams` (`kernels/common/gemm.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GemmParams {
    x: DevicePtr,
    x_scales: DevicePtr,
    w: DevicePtr,
    w_scales: DevicePtr,
    out: DevicePtr,
    num_rows: DevicePtr,
    x_stride: i32,
    w_rows: i32,
    columns: i32,
    panels: i32,
    out_stride: i32,
    soft_cap: f32,
    row_tiles_together: i32,
    lead_panels: i32,
}

/// The kernels' `GatedGemmParams` (`kernels/common/gated.cuh`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GatedGemmParams {
    product: GemmParams,
    gated: ActivationParams,
}
kernel_params!(GemmParams, GatedGemmParams);

/// What the Hopper kernel may vary without another result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Row tiles that are done for each column tile before the next column tile.
    pub(crate) row_tiles_together: usize,
    /// By how many panels the first warpgroup begins a tile before the second; at most [`MAX_LEAD`].
    pub(crate) lead_panels: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            row_tiles_together: 16,
            lead_panels: 2,
        }
    }
}

/// The kernel announces the lead before it first adds to full sums.
const MAX_LEAD: usize = 4;

/// How a kernel's blocks share the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Blocks that stay and take tile after tile, alone or in clusters of this many; a cluster's tiles lie below each other.
    Persistent { cluster: usize },
    /// A block for each tile.
    BlockPerTile,
}

/// One instance of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling {
    name: &'static str,
    work: Work,
    element: Element,
    output: Output,
    /// Of a block's tile.
    rows: usize,
    columns: usize,
    /// Panels in shared memory.
    stages: usize,
    threads: u32,
}

/// Rows of a tile of the Hopper kernel, and tiles whose scales it holds.
const HOPPER_ROWS: usize = 128;
const HOPPER_JOBS: usize = 2;

const fn hopper(
    name: &'static str,
    (element, output): Format,
    columns: usize,
    stages: usize,
    cluster: usize,
) -> Tiling {
    Tiling {
        name,
        work: Work::Persistent { cluster },
        element,
        output,
        rows: HOPPER_ROWS,
        columns,
        stages,
        threads: 384,
    }
}

const fn portable(
    name: &'static str,
    (element, output): Format,
    tile: [usize; 2],
    stages: usize,
    threads: u32,
) -> Tiling {
    Tiling {
        name,
        work: Work::BlockPerTile,
        element,
        output,
        rows: tile[0],
        columns: tile[1],
        stages,
        threads,
    }
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    Bf16,
    F32,
    /// Gate and up, whose product is quantised.
    Gated,
}

impl Output {
    fn of(tensor: &Tensor) -> Self {
        if tensor.is_wide { Self::F32 } else { Self::Bf16 }
    }
}

/// Elements of the operands, and the output.
type Format = (Element, Output);
const E4M3: Format = (Element::E4m3, Output::Bf16);
const BF16: Format = (Element::Bf16, Output::Bf16);
const E4M3_WIDE: Format = (Element::E4m3, Output::F32);
const BF16_WIDE: Format = (Element::Bf16, Output::F32);
const E4M3_GATED: Format = (Element::E4m3, Output::Gated);

/// The instances at the end of `kernels/gemm.sm90a.cu`.
const HOPPER: &[Tiling] = &[
    hopper("gemm_e4m3_n64", E4M3, 64, 8, 1),
    hopper("gemm_e4m3_n96", E4M3, 96, 7, 1),
    hopper("gemm_e4m3_n112", E4M3, 112, 7, 1),
    hopper("gemm_e4m3_n128", E4M3, 128, 6, 1),
    hopper("gemm_e4m3_n160", E4M3, 160, 6, 1),
    hopper("gemm_e4m3_n192", E4M3, 192, 5, 1),
    hopper("gemm_e4m3_n224", E4M3, 224, 5, 1),
    hopper("gemm_pair_e4m3_n112", E4M3, 112, 7, 2),
    hopper("gemm_pair_e4m3_n128", E4M3, 128, 6, 2),
    hopper("gemm_pair_e4m3_n160", E4M3, 160, 6, 2),
    hopper("gemm_pair_e4m3_n192", E4M3, 192, 5, 2),
    hopper("gemm_e4m3_f32_n128", E4M3_WIDE, 128, 6, 1),
    hopper("gemm_e4m3_f32_n192", E4M3_WIDE, 192, 5, 1),
    hopper("gemm_bf16_n64", BF16, 64, 8, 1),
    hopper("gemm_bf16_n128", BF16, 128, 6, 1),
    hopper("gemm_bf16_n192", BF16, 192, 5, 1),
    hopper("gemm_bf16_n256", BF16, 256, 4, 1),
    hopper("gemm_pair_bf16_n128", BF16, 128, 6, 2),
    hopper("gemm_pair_bf16_n192", BF16, 192, 5, 2),
    hopper("gemm_pair_bf16_n256", BF16, 256, 4, 2),
    hopper("gemm_bf16_f32_n128", BF16_WIDE, 128, 6, 1),
    hopper("gemm_bf16_f32_n256", BF16_WIDE, 256, 4, 1),
    hopper("gemm_gated_e4m3_n160", E4M3_GATED, 160, 6, 1),
    hopper("gemm_gated_e4m3_n192", E4M3_GATED, 192, 5, 1),
    hopper("gemm_gated_e4m3_n224", E4M3_GATED, 224, 5, 1),
    hopper("gemm_gated_pair_e4m3_n160", E4M3_GATED, 160, 6, 2),
    hopper("gemm_gated_pair_e4m3_n192", E4M3_GATED, 192, 5, 2),
];

/// The instances at the end of `kernels/gemm_portable.cu`; of each format those of fewer rows first.
const PORTABLE: &[Tiling] = &[
    portable("gemm_portable_e4m3_m16", E4M3, [16, 32], 8, 128),
    portable("gemm_portable_e4m3_m64", E4M3, [64, 64], 4, 128),
    portable("gemm_portable_e4m3_m128", E4M3, [128, 128], 3, 256),
    portable("gemm_portable_e4m3_f32_m16", E4M3_WIDE, [16, 64], 8, 128),
    portable("gemm_portable_e4m3_f32_m128", E4M3_WIDE, [128, 128], 3, 256),
    portable("gemm_portable_bf16_m16", BF16, [16, 32], 8, 128),
    portable("gemm_portable_bf16_m64", BF16, [64, 64], 4, 128),
    portable("gemm_portable_bf16_m128", BF16, [128, 128], 3, 256),
    portable("gemm_portable_bf16_f32_m16", BF16_WIDE, [16, 64], 8, 128),
    portable("gemm_portable_bf16_f32_m128", BF16_WIDE, [128, 128], 3, 256),
];

/// Bytes that an SM gets from L2 in a clock when all SMs ask: what makes the choice agree best with the sweep kept in
/// `benches/results`.
const L2_BYTES_PER_CLOCK: usize = 44;
/// Bytes that an SM's shared memory gives or takes in a clock.
const SHARED_BYTES_PER_CLOCK: usize = 128;
/// Tensor cores take this long for one panel of 128 rows and a column: e4m3 has twice the elements of bf16 in a panel, at twice the pace.
const CLOCKS_PER_COLUMN: usize = 4;
/// What a tile's output takes: so much, and so much for each column.
const STORE_CLOCKS: usize = 500;
const STORE_CLOCKS_PER_COLUMN: usize = 6;

impl Tiling {
    fn fits(&self, format: Format) -> bool {
        (self.element, self.output) == format
    }

    fn cluster(&self) -> usize {
        match self.work {
            Work::Persistent { cluster } => cluster,
            Work::BlockPerTile => 1,
        }
    }

    /// Dynamic shared memory of a block: its stages, and on Hopper the tiles' scales and the barriers.
    fn shared_bytes(&self) -> usize {
        let stages = self.stages * (self.rows + self.columns) * PANEL_BYTES;
        match self.work {
            Work::Persistent { .. } => {
                let job = (self.rows + self.columns + 4) * 4;
                stages + HOPPER_JOBS * job + (2 * (self.stages + HOPPER_JOBS) + 1) * 8
            }
            Work::BlockPerTile => stages,
        }
    }

    /// Row tiles, those of a cluster counted as one, and column tiles.
    fn tiles(&self, rows: usize, columns: usize) -> [usize; 2] {
        [
            rows.div_ceil(self.rows * self.cluster()),
            columns.div_ceil(self.columns),
        ]
    }

    fn grid(&self, rows: usize, columns: usize, multiprocessors: usize) -> Grid {
        let [row_tiles, column_tiles] = self.tiles(rows, columns);
        let blocks = match self.work {
            Work::Persistent { cluster } => {
                let clusters = (multiprocessors / cluster).clamp(1, (row_tiles * column_tiles).max(1));
                [(clusters * cluster) as u32, 1, 1]
            }
            Work::BlockPerTile => [row_tiles.max(1) as u32, column_tiles as u32, 1],
        };
        Grid {
            blocks,
            shared_bytes: self.shared_bytes() as u32,
        }
    }

    /// About how long a product takes if all blocks run at the pace of the slowest resource: tensor cores, shared memory
    /// (each warpgroup reads its rows and all columns, and the copies write both) or L2.
    fn clocks(&self, rows: usize, columns: usize, panels: usize, multiprocessors: usize) -> usize {
        let [row_tiles, column_tiles] = self.tiles(rows, columns);
        let rounds = (row_tiles * column_tiles).div_ceil((multiprocessors / self.cluster()).max(1));
        let copied = (self.rows + self.columns) * PANEL_BYTES;
        let read = (self.rows + 2 * self.columns) * PANEL_BYTES;
        let from_l2 = (self.rows + self.columns / self.cluster()) * PANEL_BYTES;
        let panel = (CLOCKS_PER_COLUMN * self.columns)
            .max((copied + read) / SHARED_BYTES_PER_CLOCK)
            .max(from_l2 / L2_BYTES_PER_CLOCK);
        rounds * (panels * panel + STORE_CLOCKS + STORE_CLOCKS_PER_COLUMN * self.columns)
    }
}

/// The loaded kernels of the family that fits the device.
#[derive(Debug)]
pub(crate) struct Gemm {
    kernels: Vec<(Tiling, Kernel)>,
    multiprocessors: usize,
}

impl Gemm {
    /// Loads the Hopper kernels on 9.0, the portable ones elsewhere.
    pub(crate) fn load(device: &mut dyn Device) -> Result<Self, BackendError> {
        let is_hopper = device.compute_capability() == 90;
        Self::load_family(device, if is_hopper { HOPPER } else { PORTABLE })
    }

    fn load_family(device: &mut dyn Device, family: &[Tiling]) -> Result<Self, BackendError> {
        let load = |tiling: &Tiling| Ok((*tiling, device.kernel(tiling.name, tiling.threads)?));
        Ok(Self {
            kernels: family.iter().map(load).collect::<Result<_, BackendError>>()?,
            multiprocessors: device.multiprocessors(),
        })
    }

    /// Launches the fastest kernel for the product's shape.
    ///
    /// # Errors
    /// No kernel for the format, or the launch failed.
    pub(crate) fn multiply(&self, device: &mut dyn Device, product: &Product<'_>) -> Result<(), BackendError> {
        let kernel = self.choose(product, Output::of(product.out))?;
        self.launch(device, product, kernel, Tuning::default())
    }

    /// Launches the fastest kernel for a product whose columns are gate and up, which writes `gated` and not the product's
    /// output. Both have the same bits as what the row kernel makes of the product.
    ///
    /// # Errors
    /// No such kernel for the format, or the launch failed.
    pub(crate) fn multiply_gated(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        gated: ActivationParams,
    ) -> Result<(), BackendError> {
        let kernel = self.choose(product, Output::Gated)?;
        self.launch_gated(device, product, gated, kernel, Tuning::default())
    }

    /// Whether there are kernels that gate products of such elements.
    pub(crate) fn can_gate(&self, element: Element) -> bool {
        !self.candidates(element, Output::Gated).is_empty()
    }

    /// The names of all kernels for a format.
    pub(crate) fn candidates(&self, element: Element, output: Output) -> Vec<&'static str> {
        let fitting = self.kernels.iter().filter(|(tiling, _)| tiling.fits((element, output)));
        fitting.map(|(tiling, _)| tiling.name).collect()
    }

    /// As [`Self::multiply`], with one of the candidates.
    ///
    /// # Errors
    /// There is none of that name, or the launch failed.
    pub(crate) fn multiply_as(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        name: &str,
        tuning: Tuning,
    ) -> Result<(), BackendError> {
        self.launch(device, product, self.named(name, false)?, tuning)
    }

    /// As [`Self::multiply_gated`], with one of the candidates.
    ///
    /// # Errors
    /// There is none of that name, or the launch failed.
    pub(crate) fn multiply_gated_as(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        gated: ActivationParams,
        name: &str,
        tuning: Tuning,
    ) -> Result<(), BackendError> {
        self.launch_gated(device, product, gated, self.named(name, true)?, tuning)
    }

    /// A kernel by its name, among those that are gated or those that are not: they take other parameters.
    fn named(&self, name: &str, is_gated: bool) -> Result<&(Tiling, Kernel), BackendError> {
        let mut alike = self.kernels.iter();
        let named = alike.find(|(tiling, _)| tiling.name == name && (tiling.output == Output::Gated) == is_gated);
        named.ok_or_else(|| BackendError::Unsupported(format!("there is no kernel `{name}`")))
    }

    fn launch(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        (tiling, kernel): &(Tiling, Kernel),
        tuning: Tuning,
    ) -> Result<(), BackendError> {
        let grid = tiling.grid(product.max_rows, product.w.rows, self.multiprocessors);
        launch(device, kernel, grid, &GemmParams::new(product, tiling, tuning))
    }

    fn launch_gated(
        &self,
        device: &mut dyn Device,
        product: &Product<'_>,
        gated: ActivationParams,
        (tiling, kernel): &(Tiling, Kernel),
        tuning: Tuning,
    ) -> Result<(), BackendError> {
        let grid = tiling.grid(product.max_rows, product.w.rows, self.multiprocessors);
        let params = GatedGemmParams {
            product: GemmParams::new(product, tiling, tuning),
            gated,
        };
        launch(device, kernel, grid, &params)
    }

    fn choose(&self, product: &Product<'_>, output: Output) -> Result<&(Tiling, Kernel), BackendError> {
        let (rows, weights) = (product.max_rows, product.w);
        let fitting = || {
            let format = (weights.element, output);
            self.kernels.iter().filter(move |(tiling, _)| tiling.fits(format))
        };
        let clocks = |tiling: &Tiling| tiling.clocks(rows, weights.rows, weights.panels, self.multiprocessors);
        let persistent = fitting()
            .filter(|(tiling, _)| tiling.work != Work::BlockPerTile)
            .min_by_key(|(tiling, _)| clocks(tiling));
        // The lowest tile that holds all rows reads weights once and multiplies little for nothing.
        persistent
            .or_else(|| fitting().find(|(tiling, _)| tiling.rows >= rows))
            .or_else(|| fitting().next_back())
            .ok_or_else(|| BackendError::Unsupported(format!("no product of {:?}", weights.element)))
    }
}

impl GemmParams {
    fn new(product: &Product<'_>, tiling: &Tiling, tuning: Tuning) -> Self {
        let Product { x, w, out, .. } = *product;
        Self {
            x: x.panels,
            x_scales: product.x_scales(),
            w: w.data,
            w_scales: product.w_scales,
            out: out.data,
            num_rows: product.num_rows,
            x_stride: x.row_stride,
            w_rows: w.padded_rows as i32,
            columns: w.rows as i32,
            panels: w.panels as i32,
            out_stride: out.cols as i32,
            soft_cap: product.softcap.unwrap_or(0.0),
            row_tiles_together: tuning.row_tiles_together.max(tiling.cluster()) as i32,
            // With fewer panels than stages the first warpgroup could announce the next tile before the second has seen this.
            lead_panels: match w.panels >= tiling.stages {
                true => tuning.lead_panels.min(MAX_LEAD) as i32,
                false => 0,
            },
        }
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
