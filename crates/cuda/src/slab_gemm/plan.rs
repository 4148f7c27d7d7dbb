//! How a product of few tokens is cut into slabs, passes and stages. Nothing here changes a bit of the result.

use std::fmt;

use crate::pack::{Element, PANEL_BYTES, Panels};

/// Rows of weights that one wgmma takes.
const TILE_ROWS: usize = 64;
/// The swizzle repeats after so many rows.
const SWIZZLE_ROWS: usize = 8;
/// Shared memory before the rings: barriers and the tokens' scales.
const RINGS_OFFSET: usize = 1024;
/// Full and empty barriers of both rings fit before the scales.
const MAX_STAGES: usize = 768 / 16;
/// Slabs that divide every matrix of Gemma-2 evenly.
const EVEN_BLOCKS: usize = 128;
/// Weights on their way: latency times bandwidth is 32 KB a multiprocessor, and twice that hides jitter.
const IN_FLIGHT_BYTES: usize = 80 << 10;
/// Tokens on their way. They come from L2, sooner than weights.
const TOKENS_IN_FLIGHT_BYTES: usize = 32 << 10;
/// Beyond so many tokens, a slab of one tile reads about as many bytes of them as of weights.
const FEW_TOKENS: usize = 32;
/// Weights and tokens on their way then.
const BALANCED_IN_FLIGHT_BYTES: [usize; 2] = [64 << 10, 48 << 10];
/// The same for slabs of one tile, which get all of a multiprocessor: the kernels between such products take a few
/// microseconds, so that half of it would mostly lie idle (`benches/results`).
const ONE_TILE_IN_FLIGHT_BYTES: [usize; 2] = [80 << 10, 96 << 10];
/// Weights asked for ahead of the ring before the kernels ahead have finished. What a norm or an edge between kernels
/// takes, a few microseconds, is so many more bytes of DRAM's time.
const PREFETCH_BYTES: usize = 64 << 10;
/// With so much, a block of the next kernel fits beside this one on a multiprocessor.
pub(super) const SHARED_BYTES: usize = 113 << 10;
/// Slabs of so many rows take hundreds of microseconds, beside which the next kernel's beginning is nothing: they get all of a
/// multiprocessor.
const LONG_SLAB_ROWS: usize = 1024;
const ALL_SHARED_BYTES: usize = 224 << 10;
/// Weights and tokens on their way there.
const LONG_IN_FLIGHT_BYTES: [usize; 2] = [160 << 10, 32 << 10];

/// One instance of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(super) name: &'static str,
    pub(super) element: Element,
    pub(super) tokens: usize,
    /// 64-row tiles of a pass.
    pub(super) tiles: usize,
    /// K panels of a stage.
    pub(super) panels: usize,
    /// Warpgroups that share a pass's tiles.
    pub(super) groups: usize,
}

macro_rules! variants {
    ($($element:ident $format:literal: $tiles:literal tiles, $panels:literal panels, $groups:literal $suffix:literal,
       tokens [$($tokens:literal)*];)*) => {
        &[$($(Variant {
            name: concat!("slab_gemm_", $format, "_n", $tokens, "_t", $tiles, "_p", $panels, $suffix),
            groups: $groups,
            element: Element::$element,
            tokens: $tokens,
            tiles: $tiles,
            panels: $panels,
        },)*)*]
    };
}

/// All instances, as the last lines of the kernel's file list them.
pub(super) static VARIANTS: &[Variant] = variants! {
    E4m3 "e4m3": 1 tiles, 4 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    E4m3 "e4m3": 1 tiles, 2 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    E4m3 "e4m3": 2 tiles, 1 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    E4m3 "e4m3": 4 tiles, 1 panels, 1 "", tokens [32];
    E4m3 "e4m3": 4 tiles, 1 panels, 2 "_g2", tokens [48 64];
    Bf16 "bf16": 1 tiles, 4 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    Bf16 "bf16": 1 tiles, 2 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    Bf16 "bf16": 2 tiles, 1 panels, 1 "", tokens [8 16 24 32 40 48 56 64];
    Bf16 "bf16": 4 tiles, 1 panels, 1 "", tokens [32];
    Bf16 "bf16": 4 tiles, 1 panels, 2 "_g2", tokens [48 64];
};

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) element: Element,
    /// Rows of weights.
    pub(super) n: usize,
    pub(super) k_panels: usize,
    /// At most 64.
    pub(super) tokens: usize,
}

impl Shape {
    pub(super) fn new(w: &Panels, tokens: usize) -> Self {
        Self {
            element: w.element,
            n: w.rows,
            k_panels: w.panels,
            tokens,
        }
    }
}

/// What may be chosen freely, and is by measuring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuning {
    pub(super) blocks: usize,
    /// Most tiles of a pass.
    pub(super) tiles: usize,
    /// K panels of a stage.
    pub(super) panels: usize,
    /// Bytes of the weights' ring, rounded up to a stage.
    pub(super) in_flight_bytes: usize,
    /// Most bytes of weights that L2 gets ahead of the ring.
    pub(super) prefetch_bytes: usize,
    /// Bytes of the tokens' ring, rounded up to a stage.
    pub(super) tokens_in_flight_bytes: usize,
    /// Most shared memory of a block.
    pub(super) shared_bytes: usize,
}

impl Tuning {
    /// The standard one: what was fastest of all that a sweep tried (`benches/results`), within half a multiprocessor
    /// unless slabs are long.
    pub(super) fn of(shape: Shape, multiprocessors: usize) -> Self {
        let blocks = Self::blocks(shape, multiprocessors);
        let slab = Slabs::new(shape.n, blocks);
        let rows = slab.rows_in_stage(slab.longest());
        let is_long = slab.longest() >= LONG_SLAB_ROWS;
        let is_one_tile = Self::is_one_tile(shape, slab);
        let [in_flight_bytes, tokens_in_flight_bytes] = if is_long {
            LONG_IN_FLIGHT_BYTES
        } else if is_one_tile {
            ONE_TILE_IN_FLIGHT_BYTES
        } else if shape.tokens > FEW_TOKENS {
            BALANCED_IN_FLIGHT_BYTES
        } else {
            [IN_FLIGHT_BYTES, TOKENS_IN_FLIGHT_BYTES]
        };
        let with = |(tiles, panels)| Self {
            blocks,
            tiles,
            panels,
            in_flight_bytes,
            prefetch_bytes: PREFETCH_BYTES,
            tokens_in_flight_bytes,
            shared_bytes: if is_long || is_one_tile {
                ALL_SHARED_BYTES
            } else {
                SHARED_BYTES
            },
        };
        let tuning = with(match (rows.div_ceil(TILE_ROWS), shape.element) {
            // Few stages of many panels: each costs a round of waiting and telling.
            _ if is_long && shape.tokens <= FEW_TOKENS => (1, 4),
            (1, Element::E4m3) => (1, 4),
            (1, Element::Bf16) if slab.longest() <= 40 && shape.tokens <= 16 => (1, 4),
            (1, Element::Bf16) => (1, 2),
            (2, _) => (2, 1),
            // The more tokens, the wider a pass, since all tokens are read anew for each; as far as there are registers.
            (_, Element::E4m3) if shape.tokens > 8 => (4, 1),
            (_, Element::Bf16) if shape.tokens > 24 => (4, 1),
            _ => (2, 1),
        });
        match Plan::new(shape, tuning) {
            Some(_) => tuning,
            None => with((1, 2)),
        }
    }

    /// Whether slabs of many tokens have one tile.
    fn is_one_tile(shape: Shape, slabs: Slabs) -> bool {
        shape.element == Element::E4m3 && shape.tokens > FEW_TOKENS && slabs.rows_in_stage(slabs.longest()) <= TILE_ROWS
    }

    /// All multiprocessors, or a few less where even slabs then fit one tile less. Half of them where a tile is enough for
    /// twice the rows, too: all of the tokens are read by each block.
    fn blocks(shape: Shape, multiprocessors: usize) -> usize {
        let tiles = |blocks| {
            let slab = Slabs::new(shape.n, blocks);
            slab.rows_in_stage(slab.longest()).div_ceil(TILE_ROWS)
        };
        if Self::is_one_tile(shape, Slabs::new(shape.n, multiprocessors / 2)) {
            return multiprocessors / 2;
        }
        let is_even = multiprocessors >= EVEN_BLOCKS && shape.n.is_multiple_of(EVEN_BLOCKS);
        // Passes of even slabs are full, so that tokens are read for fewer.
        let saves_passes =
            shape.tokens > FEW_TOKENS && Slabs::new(shape.n, multiprocessors).longest() >= LONG_SLAB_ROWS;
        if is_even && (saves_passes || tiles(EVEN_BLOCKS) < tiles(multiprocessors)) {
            EVEN_BLOCKS
        } else {
            multiprocessors
        }
    }
}

impl Tuning {
    /// What to try beside this one.
    pub(super) fn others(self) -> impl Iterator<Item = Self> {
        const KB: usize = 1 << 10;
        let tilings = [(1, 4), (1, 2), (2, 1), (4, 1)];
        let rings = [(64, 113), (96, 113), (128, 224), (176, 224)];
        let mut all = Vec::new();
        for blocks in [64, 128, 132] {
            for (tiles, panels) in tilings {
                for (in_flight, shared) in rings {
                    for tokens_in_flight in [16, 32, 48] {
                        all.push(Self {
                            blocks,
                            tiles,
                            panels,
                            in_flight_bytes: in_flight * KB,
                            tokens_in_flight_bytes: tokens_in_flight * KB,
                            shared_bytes: shared * KB,
                            ..self
                        });
                    }
                }
            }
        }
        for prefetch in [0, 32, 128] {
            all.push(Self {
                prefetch_bytes: prefetch * KB,
                ..self
            });
        }
        all.into_iter().filter(move |tuning| *tuning != self)
    }
}

/// Consecutive rows for each block; the first `long` blocks have one more.
#[derive(Debug, Clone, Copy)]
struct Slabs {
    blocks: usize,
    rows: usize,
    long: usize,
}

impl Slabs {
    fn new(n: usize, blocks: usize) -> Self {
        // Fewer rows than a swizzle group are not worth a block.
        let blocks = blocks.min(n.div_ceil(SWIZZLE_ROWS)).max(1);
        Self {
            blocks,
            rows: n / blocks,
            long: n % blocks,
        }
    }

    fn longest(self) -> usize {
        self.rows + usize::from(self.long > 0)
    }

    /// The most rows after a multiple of 8 that a slab begins at.
    fn max_shift(self) -> usize {
        if self.blocks == 1 {
            return 0;
        }
        let step = if self.long == 0 { self.rows } else { 1 };
        // Multiples of `step` modulo 8 are the multiples of this power of two.
        SWIZZLE_ROWS - (1 << step.trailing_zeros().min(SWIZZLE_ROWS.trailing_zeros()))
    }

    /// Rows that `rows` of a slab take in a stage, each at its place among 8.
    fn rows_in_stage(self, rows: usize) -> usize {
        (rows + self.max_shift()).next_multiple_of(SWIZZLE_ROWS)
    }
}

/// A launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) variant: &'static Variant,
    pub(super) blocks: usize,
    pub(super) slab_rows: usize,
    pub(super) long_slabs: usize,
    pub(super) pass_rows: usize,
    pub(super) panel_rows: usize,
    pub(super) w_stages: usize,
    pub(super) x_stages: usize,
    /// After the first `w_stages` stages, of the first pass.
    pub(super) prefetched_panels: usize,
    pub(super) shared_bytes: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            variant: Variant { name, .. },
            blocks,
            pass_rows,
            w_stages,
            x_stages,
            prefetched_panels,
            ..
        } = self;
        write!(
            f,
            "{name}, {blocks} blocks, {pass_rows} rows a pass, {w_stages}+{x_stages} stages, {prefetched_panels} panels ahead, {} KB",
            self.shared_bytes >> 10
        )
    }
}

impl Plan {
    /// `None` if there is no such variant of the kernel, or its stages do not fit.
    pub(super) fn new(shape: Shape, tuning: Tuning) -> Option<Self> {
        let variant = VARIANTS
            .iter()
            .filter(|variant| variant.element == shape.element && variant.tokens >= shape.tokens)
            .filter(|variant| (variant.tiles, variant.panels) == (tuning.tiles, tuning.panels))
            .min_by_key(|variant| variant.tokens)?;
        let slabs = Slabs::new(shape.n, tuning.blocks);
        let room = TILE_ROWS * variant.tiles;
        let most_rows = (room - slabs.max_shift()) / SWIZZLE_ROWS * SWIZZLE_ROWS;
        let longest = slabs.longest();
        // A pass begins as a slab does: at the same place among 8 rows.
        let passes = if longest + slabs.max_shift() <= room {
            1
        } else {
            longest.div_ceil(most_rows)
        };
        let pass_rows = longest.div_ceil(passes).next_multiple_of(SWIZZLE_ROWS);
        let panel_rows = slabs.rows_in_stage(pass_rows.min(longest));

        let stages = passes * shape.k_panels.div_ceil(variant.panels);
        let w_stage = variant.panels * panel_rows * PANEL_BYTES;
        let x_stage = variant.panels * variant.tokens * PANEL_BYTES;
        let most = |bytes: usize, stage: usize| bytes.div_ceil(stage).clamp(2, MAX_STAGES / 2).min(stages);
        let (mut w_stages, mut x_stages) = (
            most(tuning.in_flight_bytes, w_stage),
            most(tuning.tokens_in_flight_bytes, x_stage),
        );
        x_stages = x_stages.min(w_stages);
        let shared_bytes = |w_stages: usize, x_stages: usize| {
            let w_end = RINGS_OFFSET + w_stages * w_stage;
            // Tiles of the last panel reach past its rows.
            (w_end + x_stages * x_stage).max(w_end - panel_rows * PANEL_BYTES + room * PANEL_BYTES)
        };
        while shared_bytes(w_stages, x_stages) > tuning.shared_bytes && w_stages > 2 {
            w_stages -= 1;
            x_stages = x_stages.min(w_stages);
        }
        let plan = Self {
            variant,
            blocks: slabs.blocks,
            slab_rows: slabs.rows,
            long_slabs: slabs.long,
            pass_rows,
            panel_rows,
            w_stages,
            x_stages,
            prefetched_panels: tuning.prefetch_bytes / (pass_rows * PANEL_BYTES),
            shared_bytes: shared_bytes(w_stages, x_stages),
        };
        (plan.shared_bytes <= tuning.shared_bytes).then_some(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::MODELS;

    fn shapes() -> impl Iterator<Item = Shape> {
        let elements = [Element::E4m3, Element::Bf16];
        let matrices = MODELS
            .iter()
            .flat_map(|model| model.linears.into_iter().chain([model.output]));
        matrices.flat_map(move |(n, k)| {
            elements.into_iter().flat_map(move |element| {
                let k_panels = element.panels(k);
                (1..=64).map(move |tokens| Shape {
                    element,
                    n,
                    k_panels,
                    tokens,
                })
            })
        })
    }

    #[test]
    fn gemma_2_occupies_the_device_and_keeps_dram_busy_beside_the_next_kernel() {
        for shape in shapes() {
            let plan = Plan::new(shape, Tuning::of(shape, 132)).expect("the standard tuning is possible");
            let is_halved = plan.blocks == 66 && shape.tokens > FEW_TOKENS && plan.panel_rows <= TILE_ROWS;
            assert!(
                plan.blocks == 132 || (plan.blocks == 128 && plan.long_slabs == 0) || is_halved,
                "{shape:?} {plan:?}"
            );
            assert_eq!(plan.slab_rows * plan.blocks + plan.long_slabs, shape.n);
            let rows = plan.pass_rows.min(plan.slab_rows);
            let in_flight = plan.w_stages * plan.variant.panels * rows * PANEL_BYTES;
            let slab_bytes = plan.slab_rows * shape.k_panels * PANEL_BYTES;
            assert!(in_flight >= slab_bytes.min(24 << 10), "{shape:?} {plan:?} {in_flight}");
            let takes_all = plan.slab_rows >= LONG_SLAB_ROWS
                || (shape.tokens > FEW_TOKENS && plan.variant.tiles == 1 && shape.element == Element::E4m3);
            assert!(plan.shared_bytes <= if takes_all { ALL_SHARED_BYTES } else { SHARED_BYTES });
            assert!(plan.variant.tokens >= shape.tokens);
        }
    }

    #[test]
    fn a_stage_has_room_for_the_rows_of_every_slab() {
        for n in (1..700).chain([4096, 28672, 256_000]) {
            for blocks in [1, 5, 6, 114, 128, 132] {
                let shape = Shape {
                    element: Element::E4m3,
                    n,
                    k_panels: 7,
                    tokens: 9,
                };
                let tuning = Tuning {
                    blocks,
                    ..Tuning::of(shape, blocks)
                };
                let plan = Plan::new(shape, tuning).expect("the standard tuning is possible");
                let mut begin = 0;
                for block in 0..plan.blocks {
                    let end = begin + plan.slab_rows + usize::from(block < plan.long_slabs);
                    for pass in (begin..end).step_by(plan.pass_rows) {
                        let rows = pass % 8 + plan.pass_rows.min(end - pass);
                        assert!(
                            rows <= plan.panel_rows && rows <= 64 * plan.variant.tiles,
                            "n {n}: {plan:?}"
                        );
                    }
                    begin = end;
                }
                assert_eq!(begin, n);
            }
        }
    }

    #[test]
    fn a_sweep_tries_dozens_of_plans_that_fit() {
        for shape in shapes().filter(|shape| [1, 64].contains(&shape.tokens)) {
            let tunings = Tuning::of(shape, 132).others();
            let plans: Vec<_> = tunings.filter_map(|tuning| Plan::new(shape, tuning)).collect();
            assert!(plans.iter().all(|plan| plan.shared_bytes <= 227 << 10));
            assert!(plans.len() >= 48, "{shape:?}: {}", plans.len());
        }
    }
}
