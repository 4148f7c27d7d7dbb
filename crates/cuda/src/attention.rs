//! Paged attention: sequences with one query token go to `kernels/attention_decode.cu` and, with several chunks of keys, to
//! `kernels/attention_merge.cu`; the others to `kernels/attention_prefill.cu`. On Hopper decoding and prefill have kernels of
//! their own (`sm90a`), of which prefill's needs a soft-cap.
//!
//! Over an e4m3 cache decoding has kernels that read it, and prefill reads what `widen` makes of it.
//!
//! Neither kernel's result for a sequence depends on the batch: chunks and tiles of keys are aligned to absolute
//! positions and added in their order.

use std::ops::Range;

use lapidary_engine::Batch;
use lapidary_model::{AttentionConfig, BackendError, KvCacheDtype, KvScales, StepLimits};

use self::widen::{Round, Widening};
use crate::device::{Device, DevicePtr, Grid, Kernel, bytes_of, kernel_params, launch};
use crate::step::StepPointers;
use crate::tensor::ActivationParams;

#[cfg(all(test, feature = "emulator"))]
mod tests;
mod widen;

/// Keys that the kernels load at a time; blocks are a multiple of it.
const KEY_TILE: usize = 16;
/// Warps of a block of the decode kernel that compute.
const DECODE_WARPS: usize = 4;
/// With those that finish units.
const DECODE_THREADS: u32 = (DECODE_WARPS as u32 + 2) * 32;
/// Of a block of the kernel that adds what chunks left.
const MERGE_THREADS: u32 = 128;
/// Units of work that a block lists at a time.
const LISTED_UNITS: usize = 64;
/// Query heads of a kv head that the decode kernel has room for.
const MAX_GROUP: usize = 8;
/// Above it exp(cap), and sums of it, come near what f32 can hold.
const MAX_SOFTCAP: f32 = 60.0;
/// Largest second dimension of a grid.
const MAX_GRID_Y: usize = 65535;

/// The kernels' `Attention`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct AttentionParams {
    step: StepPointers,
    qkv: DevicePtr,
    kv: DevicePtr,
    out: ActivationParams,
    rows: DevicePtr,
    num_heads: i32,
    num_kv_heads: i32,
    block_size: i32,
    window: i32,
    score_scale: f32,
    cap: f32,
    near: [f32; 4],
    near_limit: f32,
    value_scale: f32,
}

/// The kernels' `AttentionDecode`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct DecodeParams {
    attention: AttentionParams,
    partial_outputs: DevicePtr,
    partial_sums: DevicePtr,
    max_seqs: i32,
    max_chunks: i32,
    chunk_shift: i32,
    stages: i32,
}

/// The kernels' `AttentionPrefill`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct PrefillParams {
    attention: AttentionParams,
    tiles: DevicePtr,
}

kernel_params!(DecodeParams, PrefillParams);

/// How the decode kernel divides its work. Only `chunk` has a say in results, in their last bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeTuning {
    /// Positions that one unit of work covers: 64, 128, 256 or 512.
    pub chunk: usize,
    /// 16-position tiles of K and of V that each of a block's 4 computing warps has under way: 1 to 8.
    pub stages: usize,
    /// Blocks of threads that share a multiprocessor.
    pub blocks: usize,
}

/// What the decode kernel's shared memory depends on beside its tuning.
#[derive(Debug, Clone, Copy)]
struct DecodeShape {
    head_dim: usize,
    group: usize,
    max_seqs: usize,
    /// Of an element in the cache.
    value_bytes: usize,
}

impl DecodeShape {
    fn new(config: &AttentionConfig, limits: &StepLimits) -> Self {
        Self {
            head_dim: config.head_dim,
            group: group(config),
            max_seqs: limits.max_seqs,
            value_bytes: value_bytes(config),
        }
    }

    /// What is usual for steps of so many sequences. `shares` says whether two blocks have room on a multiprocessor.
    fn tuning(self, seqs: usize, shares: bool, block_limit: usize) -> DecodeTuning {
        // e4m3 is more work for as many bytes than one block's warps can hide.
        let is_many = seqs >= MANY_SEQS || (self.value_bytes == 1 && seqs > FEW_SEQS);
        let ring_limit = if seqs <= FEW_SEQS || (is_many && shares) {
            HALF_SHARED_BYTES
        } else {
            self.shared_bytes(0) + RING_BYTES
        };
        DecodeTuning {
            chunk: CHUNK,
            stages: self.stages_in(block_limit.min(ring_limit)),
            blocks: if is_many && shares { 2 } else { 1 },
        }
    }

    /// As many stages as a block has room for in so much shared memory, but at least one.
    fn stages_in(self, bytes: usize) -> usize {
        let fixed = self.shared_bytes(0);
        let stage = self.shared_bytes(1) - fixed;
        (bytes.saturating_sub(fixed) / stage).clamp(1, 8)
    }

    /// The kernel's `DecodeShared`.
    fn shared_bytes(self, stages: usize) -> usize {
        let rings = DECODE_WARPS * stages * (2 * KEY_TILE * self.value_bytes + self.group * 2) * self.head_dim;
        let buffers = 2 * DECODE_WARPS * (self.group * self.head_dim + 2 * MAX_GROUP) * 4;
        let barriers = 2 * DECODE_WARPS * stages * 8;
        let units = 32 * LISTED_UNITS;
        let seqs = (16 + 4) * self.max_seqs;
        rings + buffers + barriers + 2 * 8 * 4 + units + seqs
    }
}

/// Query tokens `first_row..first_row + num_rows` of a step, all of one sequence: a tile of the prefill kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct QueryTile {
    seq: usize,
    first_row: usize,
    num_rows: usize,
}

impl QueryTile {
    /// What a block with nothing to do reads.
    const NONE: Self = Self {
        seq: 0,
        first_row: 0,
        num_rows: 0,
    };
}

/// A variant of the prefill kernel.
#[derive(Debug, Clone, Copy)]
struct PrefillKernel {
    kernel: Kernel,
    /// (token, head of the group) pairs of a tile.
    rows: usize,
    /// Keys taken at a time.
    keys: usize,
}

/// What a step's attention consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AttentionPlan {
    /// Whether a sequence has one query token.
    has_decode: bool,
    /// The others, whose tiles are already on the device.
    prompts: Vec<Prompts>,
    /// Which variant of the prefill kernel tiles are made for.
    variant: usize,
}

/// Sequences with several query tokens that one launch of the prefill kernel serves.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Prompts {
    /// Of the step's.
    tiles: Range<usize>,
    /// What of the cache has to be widened for them.
    widened: Option<Round>,
}

/// One layer's attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionInputs {
    pub(crate) step: StepPointers,
    /// Sequences of the step, or those of the recorded step it runs as.
    pub(crate) max_seqs: usize,
    /// bf16 `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`; the q heads are rotated and not scaled.
    pub(crate) qkv: DevicePtr,
    /// `[num_blocks][K, V][num_kv_heads][block_size][head_dim]`, rows permuted as `kernels/rope.cu` writes them, the step's
    /// tokens in place.
    pub(crate) kv: DevicePtr,
    /// What stored keys and values are to be multiplied by, if they are e4m3.
    pub(crate) scales: KvScales,
    /// A multiple of 16.
    pub(crate) block_size: usize,
    /// Token `i` sees `j` with `i - j < window`.
    pub(crate) window: Option<usize>,
    /// What the o projection reads, `[num_tokens, num_heads * head_dim]`.
    pub(crate) out: ActivationParams,
    /// With a scale for each token, the result goes here instead: bf16 `[num_tokens, num_heads * head_dim]`, to be
    /// quantised by rows.
    pub(crate) rows: DevicePtr,
}

/// The attention kernels and their scratch memory.
#[derive(Debug)]
pub(crate) struct Attention {
    config: AttentionConfig,
    limits: StepLimits,
    multiprocessors: usize,
    decode: Kernel,
    merge: Kernel,
    /// Each for steps of up to so many sequences, in ascending order. All have chunks of one length.
    tunings: Vec<(usize, DecodeTuning)>,
    partial_outputs: DevicePtr,
    partial_sums: DevicePtr,
    /// In ascending order of `rows`.
    prefill: Vec<PrefillKernel>,
    tiles: DevicePtr,
    /// For an e4m3 cache.
    widening: Option<Widening>,
}

impl Attention {
    /// Loads the kernels and reserves scratch memory for the largest step.
    ///
    /// # Errors
    /// A shape without a kernel, or not enough memory.
    pub(crate) fn new(
        device: &mut dyn Device,
        config: AttentionConfig,
        limits: StepLimits,
    ) -> Result<Self, BackendError> {
        let is_hopper = device.compute_capability() == 90;
        Self::tuned(device, config, limits, None, is_hopper)
    }

    /// As [`Attention::new`], with other than the device's usual tuning, and told whether to use what only Hopper has.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn tuned(
        device: &mut dyn Device,
        config: AttentionConfig,
        limits: StepLimits,
        tuning: Option<DecodeTuning>,
        is_hopper: bool,
    ) -> Result<Self, BackendError> {
        let names = kernel_names(&config)?;
        let block_limit = shared_limit(device.compute_capability());
        let shape = DecodeShape::new(&config, &limits);
        // A running maximum of bf16 takes more registers than two blocks have.
        let shares = is_hopper && config.softcap.is_some();
        let tunings = match tuning {
            Some(tuning) => vec![(usize::MAX, tuning)],
            None => [FEW_SEQS, MANY_SEQS - 1, usize::MAX]
                .map(|seqs| (seqs, shape.tuning(seqs, shares, block_limit)))
                .to_vec(),
        };
        let prefill = names
            .prefill(is_hopper, block_limit)
            .iter()
            .filter(|(rows, keys, _)| prefill_shared_bytes(*rows, *keys, &config, &limits) <= block_limit)
            .map(|&(rows, keys, name)| {
                let kernel = device.kernel(name, 2 * rows as u32)?;
                Ok(PrefillKernel { kernel, rows, keys })
            })
            .collect::<Result<Vec<_>, BackendError>>()?;
        let stages = tunings.iter().map(|(_, tuning)| tuning.stages);
        let shared_bytes = shape.shared_bytes(stages.max().unwrap_or(1));
        let Some(smallest) = prefill.first().filter(|_| shared_bytes <= block_limit) else {
            return Err(BackendError::Unsupported(format!(
                "attention over {} positions and {} sequences: it does not fit this device's shared memory",
                limits.max_model_len, limits.max_seqs
            )));
        };
        let tile = tokens_per_tile(smallest.rows, &config);
        let max_tiles = limits.max_tokens.div_ceil(tile) + limits.max_seqs.max(SPARE_TILES);
        if max_tiles > MAX_GRID_Y {
            let what = format!("attention of {} tokens in one step", limits.max_tokens);
            return Err(BackendError::Unsupported(what));
        }
        let mut attention = Self {
            decode: device.kernel(names.decode(is_hopper, config.kv_cache_dtype), DECODE_THREADS)?,
            merge: device.kernel(names.merge(config.kv_cache_dtype), MERGE_THREADS)?,
            widening: match config.kv_cache_dtype {
                KvCacheDtype::Native => None,
                KvCacheDtype::Fp8E4m3 => Some(Widening::new(device, config, limits)?),
            },
            tiles: device.alloc("attention tiles", max_tiles * size_of::<[i32; 3]>())?,
            multiprocessors: device.multiprocessors(),
            config,
            limits,
            tunings,
            partial_outputs: DevicePtr::NULL,
            partial_sums: DevicePtr::NULL,
            prefill,
        };
        attention.alloc_scratch(device)?;
        Ok(attention)
    }

    /// Bytes that [`Attention::new`] reserves for chunks of sequences, at most.
    pub(crate) fn scratch_bytes(config: &AttentionConfig, limits: &StepLimits, chunk: usize) -> [usize; 2] {
        let chunks = limits.max_seqs * config.num_kv_heads * limits.max_model_len.div_ceil(chunk);
        [chunks * group(config) * config.head_dim * 4, chunks * 2 * MAX_GROUP * 4]
    }

    fn tuning(&self, seqs: usize) -> DecodeTuning {
        let index = self.tunings.partition_point(|(most, _)| *most < seqs);
        self.tunings[index].1
    }

    fn alloc_scratch(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        let [outputs, sums] = Self::scratch_bytes(&self.config, &self.limits, self.tuning(1).chunk);
        self.partial_outputs = device.alloc("attention of chunks", outputs)?;
        self.partial_sums = device.alloc("attention of chunks", sums)?;
        Ok(())
    }

    /// Whether a recorded step of `max_tokens` tokens has room for a step's prompts.
    pub(crate) fn has_room(&self, batch: &Batch, block_size: usize, max_tokens: usize) -> bool {
        let has_widened = |widening: &Widening| widening.has_room(batch, block_size);
        self.recorded_query_tiles(batch).len() <= self.recorded_tiles(max_tokens)
            && self.widening.as_ref().is_none_or(has_widened)
    }

    /// Tiles of a recorded step of so many tokens.
    fn recorded_tiles(&self, max_tokens: usize) -> usize {
        max_tokens.div_ceil(tokens_per_tile(self.prefill[0].rows, &self.config)) + SPARE_TILES
    }

    /// Few tokens need the smallest tiles to occupy the device.
    fn recorded_query_tiles(&self, batch: &Batch) -> Vec<QueryTile> {
        query_tiles(batch, tokens_per_tile(self.prefill[0].rows, &self.config))
    }

    /// As [`Attention::plan`], for a step that runs as a recorded one of `max_tokens` tokens, which
    /// [`Attention::has_room`] for it. All such steps have the same plan.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn plan_recorded(
        &self,
        device: &mut dyn Device,
        batch: &Batch,
        block_size: usize,
        max_tokens: usize,
    ) -> Result<AttentionPlan, BackendError> {
        let room = self.recorded_tiles(max_tokens);
        let mut tiles = self.recorded_query_tiles(batch);
        tiles.resize(room, QueryTile::NONE);
        self.upload_tiles(device, &tiles)?;
        let widened = match &self.widening {
            None => None,
            Some(widening) => Some(widening.plan_recorded(device, batch, block_size)?),
        };
        Ok(AttentionPlan {
            has_decode: true,
            prompts: vec![Prompts {
                tiles: 0..room,
                widened,
            }],
            variant: 0,
        })
    }

    fn upload_tiles(&self, device: &mut dyn Device, tiles: &[QueryTile]) -> Result<(), BackendError> {
        let words: Vec<i32> = tiles
            .iter()
            .flat_map(|tile| [tile.seq as i32, tile.first_row as i32, tile.num_rows as i32])
            .collect();
        if words.is_empty() {
            return Ok(());
        }
        device.upload(self.tiles, bytes_of(&words))
    }

    /// Splits a step's attention and brings what the prefill kernel must know of it to the device.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn plan(
        &self,
        device: &mut dyn Device,
        batch: &Batch,
        block_size: usize,
    ) -> Result<AttentionPlan, BackendError> {
        let queries = || batch.query_start.windows(2).map(|pair| pair[1] - pair[0]);
        let (variant, mut tiles) = self.choose_tiles(batch);
        let mut prompts = Vec::new();
        if let Some(widening) = &self.widening {
            let rounds = widening.plan(device, batch, block_size)?;
            let round_of = |tile: &QueryTile| rounds.partition_point(|round| round.seqs.end <= tile.seq);
            tiles.sort_by_key(round_of);
            let mut first = 0;
            for (index, round) in rounds.iter().enumerate() {
                let count = tiles[first..].iter().filter(|tile| round_of(tile) == index).count();
                prompts.push(Prompts {
                    tiles: first..first + count,
                    widened: Some(round.clone()),
                });
                first += count;
            }
        } else if !tiles.is_empty() {
            prompts.push(Prompts {
                tiles: 0..tiles.len(),
                widened: None,
            });
        }
        self.upload_tiles(device, &tiles)?;
        Ok(AttentionPlan {
            has_decode: queries().any(|count| count == 1),
            prompts,
            variant,
        })
    }

    /// The largest tiles that still occupy every multiprocessor.
    fn choose_tiles(&self, batch: &Batch) -> (usize, Vec<QueryTile>) {
        let mut choice = (0, Vec::new());
        for (variant, kernel) in self.prefill.iter().enumerate() {
            let tiles = query_tiles(batch, tokens_per_tile(kernel.rows, &self.config));
            if variant == 0 || tiles.len() * self.config.num_kv_heads >= self.multiprocessors {
                choice = (variant, tiles);
            }
        }
        choice
    }

    /// `out = attention(q, kv)` for every token of the step.
    ///
    /// # Errors
    /// The device failed, or keys and values lie in blocks the kernels cannot read.
    pub(crate) fn run(
        &self,
        device: &mut dyn Device,
        plan: &AttentionPlan,
        inputs: &AttentionInputs,
    ) -> Result<(), BackendError> {
        if !inputs.block_size.is_multiple_of(KEY_TILE) {
            let what = format!(
                "KV blocks of {} tokens (a multiple of {KEY_TILE} it must be)",
                inputs.block_size
            );
            return Err(BackendError::Unsupported(what));
        }
        let attention = self.params(inputs);
        if plan.has_decode {
            self.run_decode(device, attention, inputs.max_seqs)?;
        }
        for prompts in &plan.prompts {
            self.run_prefill(device, plan.variant, prompts, (attention, inputs.block_size))?;
        }
        Ok(())
    }

    fn params(&self, inputs: &AttentionInputs) -> AttentionParams {
        let log2_e = std::f64::consts::LOG2_E;
        let (key_scale, value_scale) = match self.config.kv_cache_dtype {
            KvCacheDtype::Native => (1.0, 1.0),
            KvCacheDtype::Fp8E4m3 => (inputs.scales.key, inputs.scales.value),
        };
        let scale = f64::from(self.config.scale) * f64::from(key_scale);
        let cap = self.config.softcap.map(f64::from);
        AttentionParams {
            step: inputs.step,
            qkv: inputs.qkv,
            kv: inputs.kv,
            out: inputs.out,
            rows: inputs.rows,
            num_heads: self.config.num_heads as i32,
            num_kv_heads: self.config.num_kv_heads as i32,
            block_size: inputs.block_size as i32,
            window: inputs
                .window
                .map_or(i32::MAX, |window| i32::try_from(window).unwrap_or(i32::MAX)),
            score_scale: cap.map_or(scale * log2_e, |cap| 2.0 * scale * log2_e / cap) as f32,
            cap: cap.map_or(0.0, |cap| cap * log2_e) as f32,
            near: cap.map_or([0.0; 4], |cap| near_coefficients(scale, cap)),
            near_limit: cap.map_or(0.0, |cap| cap / (2.0 * scale * log2_e)) as f32,
            value_scale,
        }
    }

    /// The grids depend on nothing of the step but how many sequences it has at most: a captured launch serves any.
    fn run_decode(
        &self,
        device: &mut dyn Device,
        attention: AttentionParams,
        max_seqs: usize,
    ) -> Result<(), BackendError> {
        let DecodeTuning { chunk, stages, blocks } = self.tuning(max_seqs);
        let shared_bytes = DecodeShape::new(&self.config, &self.limits).shared_bytes(stages);
        let grid = Grid::line(blocks * self.multiprocessors).shared(shared_bytes);
        let params = DecodeParams {
            attention,
            partial_outputs: self.partial_outputs,
            partial_sums: self.partial_sums,
            max_seqs: self.limits.max_seqs as i32,
            max_chunks: self.limits.max_model_len.div_ceil(chunk) as i32,
            chunk_shift: chunk.ilog2() as i32,
            stages: stages as i32,
        };
        launch(device, &self.decode, grid, &params)?;
        if self.limits.max_model_len <= chunk {
            return Ok(());
        }
        let merge = Grid {
            blocks: [self.config.num_kv_heads as u32, max_seqs as u32, 1],
            shared_bytes: 0,
        };
        launch(device, &self.merge, merge, &params)
    }

    fn run_prefill(
        &self,
        device: &mut dyn Device,
        variant: usize,
        prompts: &Prompts,
        (mut attention, block_size): (AttentionParams, usize),
    ) -> Result<(), BackendError> {
        if let (Some(widening), Some(round)) = (&self.widening, &prompts.widened) {
            (attention.kv, attention.step.block_ids) = widening.run(device, round, attention.kv, block_size)?;
        }
        let PrefillKernel { kernel, rows, keys } = &self.prefill[variant];
        let grid = Grid {
            blocks: [self.config.num_kv_heads as u32, prompts.tiles.len() as u32, 1],
            shared_bytes: prefill_shared_bytes(*rows, *keys, &self.config, &self.limits) as u32,
        };
        let params = PrefillParams {
            attention,
            tiles: self.tiles.offset(prompts.tiles.start * size_of::<[i32; 3]>()),
        };
        launch(device, kernel, grid, &params)
    }
}

/// Cuts the query tokens of sequences with more than one into tiles, those that see most keys first: the last blocks to
/// run are then short ones.
fn query_tiles(batch: &Batch, tokens_per_tile: usize) -> Vec<QueryTile> {
    let mut tiles = Vec::new();
    for (seq, (rows, &context)) in batch.query_start.windows(2).zip(&batch.context_lens).enumerate() {
        let (start, end) = (rows[0] as usize, rows[1] as usize);
        if end - start < 2 {
            continue;
        }
        for first_row in (start..end).step_by(tokens_per_tile) {
            let num_rows = tokens_per_tile.min(end - first_row);
            let keys = context as usize - (end - first_row - num_rows);
            let tile = QueryTile {
                seq,
                first_row,
                num_rows,
            };
            tiles.push((keys, tile));
        }
    }
    tiles.sort_by_key(|(keys, _)| std::cmp::Reverse(*keys));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

/// Rows and keys of a tile, and the kernel's name.
type PrefillName = (usize, usize, &'static str);

/// The kernels of one head dimension, with or without soft-cap. Bits of a result depend on the keys of a tile: those used
/// on one device agree in them. In ascending order of rows.
struct KernelNames {
    decode: &'static str,
    decode_e4m3: &'static str,
    /// For Hopper.
    decode_bulk: &'static str,
    decode_bulk_e4m3: &'static str,
    merge: &'static str,
    /// Of sums that are relative to a maximum.
    merge_relative: &'static str,
    /// For Hopper.
    wgmma: &'static [PrefillName],
    /// For devices with as much shared memory.
    large: &'static [PrefillName],
    small: &'static [PrefillName],
}

impl KernelNames {
    const fn decode(&self, is_hopper: bool, dtype: KvCacheDtype) -> &'static str {
        match (dtype, is_hopper) {
            (KvCacheDtype::Native, false) => self.decode,
            (KvCacheDtype::Native, true) => self.decode_bulk,
            (KvCacheDtype::Fp8E4m3, false) => self.decode_e4m3,
            (KvCacheDtype::Fp8E4m3, true) => self.decode_bulk_e4m3,
        }
    }

    const fn merge(&self, dtype: KvCacheDtype) -> &'static str {
        match dtype {
            KvCacheDtype::Native => self.merge,
            KvCacheDtype::Fp8E4m3 => self.merge_relative,
        }
    }

    fn prefill(&self, is_hopper: bool, block_limit: usize) -> &'static [PrefillName] {
        if is_hopper && !self.wgmma.is_empty() {
            self.wgmma
        } else if block_limit >= LARGE_SHARED_BYTES {
            self.large
        } else {
            self.small
        }
    }
}

/// Of a head dimension, whose kernels' names begin with `$capped`.
macro_rules! kernel_names {
    ($capped:literal, $dim:literal) => {
        KernelNames {
            decode: concat!("attention_decode_", $capped, $dim),
            decode_e4m3: concat!("attention_decode_e4m3_", $capped, $dim),
            decode_bulk: concat!("attention_decode_bulk_", $capped, $dim),
            decode_bulk_e4m3: concat!("attention_decode_bulk_e4m3_", $capped, $dim),
            merge: concat!("attention_merge_", $capped, $dim),
            merge_relative: concat!("attention_merge_", $dim),
            wgmma: &[],
            large: &[
                (64, 64, concat!("attention_prefill_", $capped, $dim, "_64x64")),
                (128, 64, concat!("attention_prefill_", $capped, $dim, "_128x64")),
            ],
            small: &[(64, 32, concat!("attention_prefill_", $capped, $dim, "_64x32"))],
        }
    };
    ($capped:literal, $dim:literal, wgmma) => {
        KernelNames {
            wgmma: &[
                (64, 64, concat!("attention_prefill_wgmma_", $capped, $dim, "_64x64")),
                (128, 64, concat!("attention_prefill_wgmma_", $capped, $dim, "_128x64")),
            ],
            ..kernel_names!($capped, $dim)
        }
    };
}

fn kernel_names(config: &AttentionConfig) -> Result<KernelNames, BackendError> {
    let group = group(config);
    if group == 0 || group > MAX_GROUP || !config.num_heads.is_multiple_of(config.num_kv_heads) {
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let what = format!("attention of {heads} heads over {kv_heads} (at most {MAX_GROUP} to each, all alike)");
        return Err(BackendError::Unsupported(what));
    }
    if let Some(cap) = config.softcap.filter(|cap| !(*cap > 0.0 && *cap <= MAX_SOFTCAP)) {
        let what = format!("an attention soft-cap of {cap} (more than 0, at most {MAX_SOFTCAP})");
        return Err(BackendError::Unsupported(what));
    }
    match (config.head_dim, config.softcap.is_some()) {
        (64, false) => Ok(kernel_names!("", "64")),
        (64, true) => Ok(kernel_names!("capped_", "64", wgmma)),
        (128, false) => Ok(kernel_names!("", "128")),
        (128, true) => Ok(kernel_names!("capped_", "128", wgmma)),
        (256, false) => Ok(kernel_names!("", "256")),
        (256, true) => Ok(kernel_names!("capped_", "256", wgmma)),
        (head_dim, _) => Err(BackendError::Unsupported(format!(
            "attention heads of {head_dim} elements (64, 128 and 256 there are)"
        ))),
    }
}

/// Of the polynomial, odd in a product, that is its capped score in units of log2: tanh(x) / x in x^2.
fn near_coefficients(scale: f64, cap: f64) -> [f32; 4] {
    // In (2 log2(e) x)^2, what a product times `score_scale` has.
    let tanh_ratio = [1.0, -4.003_699_1e-2, 1.918_970_4e-3, -8.532_181_7e-5];
    let score_scale = 2.0 * scale * std::f64::consts::LOG2_E / cap;
    let mut power = cap / 2.0 * score_scale;
    tanh_ratio.map(|coefficient| {
        let scaled = coefficient * power;
        power *= score_scale * score_scale;
        scaled as f32
    })
}

/// Query heads of each kv head.
fn group(config: &AttentionConfig) -> usize {
    config.num_heads / config.num_kv_heads.max(1)
}

/// Bytes of an element in the cache.
pub(crate) fn value_bytes(config: &AttentionConfig) -> usize {
    match config.kv_cache_dtype {
        KvCacheDtype::Native => 2,
        KvCacheDtype::Fp8E4m3 => 1,
    }
}

fn tokens_per_tile(rows: usize, config: &AttentionConfig) -> usize {
    rows / group(config)
}

/// Tiles of a recorded step beyond those of one prompt of all its tokens: each further prompt begins one of its own. A block
/// without a tile ends at once.
const SPARE_TILES: usize = 8;
const LARGE_SHARED_BYTES: usize = 227 << 10;
/// Positions of a chunk. Shorter ones cost more ends of units, longer ones leave multiprocessors idle when sequences are few.
const CHUNK: usize = 256;
/// Keys and values a block of the decode kernel has under way. With half as much it takes up to a third longer
/// (`benches/results`).
const RING_BYTES: usize = 144 << 10;
/// Of so few sequences a step reads far more weights than keys: there a block leaves half of the multiprocessor to the kernel
/// after it, whose weights come meanwhile.
const FEW_SEQS: usize = 4;
/// From so many on, two blocks with half of the ring each are faster: one loads while the other is at the end of a unit.
const MANY_SEQS: usize = 48;
/// Two blocks of so much fit on a multiprocessor.
const HALF_SHARED_BYTES: usize = 113 << 10;

/// Shared memory a block may have, and for which there are kernels: newer data centre parts run the portable ones.
fn shared_limit(compute_capability: u32) -> usize {
    match compute_capability {
        90..=99 => LARGE_SHARED_BYTES,
        _ => 99 << 10,
    }
}

/// The kernel's `PrefillShared`.
fn prefill_shared_bytes(rows: usize, keys: usize, config: &AttentionConfig, limits: &StepLimits) -> usize {
    let key_tiles = (limits.max_model_len + keys).div_ceil(KEY_TILE);
    (rows + 4 * keys) * config.head_dim * 2 + 4 * key_tiles
}
