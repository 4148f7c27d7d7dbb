//! Attention over the paged cache.
//!
//! A task is one key/value head and up to [`TILE_TOKENS`] tokens of one sequence, which share every load of keys and
//! values. Whatever shares them, a query's scores are dot products of its own, its weights are summed in the order of
//! its own positions, and its values are added one position after another: chunks and neighbours change no bit.
//!
//! An e4m3 cache is widened a page at a time, exactly, and a tile's queries share that too. Its scales cost nothing: that
//! of keys goes into the scale of scores, that of values into the division by the sum of weights.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use lapidary_engine::BlockId;
use lapidary_model::{ActivationScheme, AttentionConfig, KvCacheDtype};

use super::elementwise::On;
use super::linear::dot_rows;
use crate::backend::{Storage, Sums};
use crate::hopper::{self, CappedSoftmax};
use crate::math;
use crate::plan::{Plan, Tile};
use crate::simd::{Arith, Bf16Sums, Buffer, F32, Fma, Kernel, LANES, Simd, TENSOR_CORE_BLOCK};
use crate::tensor::{Activation, KvLayer, Tensor};

/// Exponents up to this, and sums of their powers, are far from the end of f32.
const MAX_EXPONENT: f32 = 64.0;

/// Tokens of a sequence that one task attends for.
pub(crate) const TILE_TOKENS: usize = 8;

/// Geometry of attention, and where heads are in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) config: AttentionConfig,
    /// Query heads that share a key/value head.
    pub(crate) group: usize,
    /// Elements of a head in the cache, a multiple of 16.
    pub(crate) padded_dim: usize,
}

impl Geometry {
    pub(crate) fn new(config: AttentionConfig) -> Self {
        let group = config.num_heads / config.num_kv_heads;
        Self {
            config,
            group,
            padded_dim: config.head_dim.next_multiple_of(LANES),
        }
    }

    /// Where `slot`'s keys of `head` start in a [`KvLayer`].
    pub(crate) fn cache_offset(&self, block_size: usize, slot: usize, head: usize) -> usize {
        let (block, offset) = (slot / block_size, slot % block_size);
        ((block * self.config.num_kv_heads + head) * block_size + offset) * self.padded_dim
    }
}

/// Of one thread.
#[derive(Debug, Default)]
pub(crate) struct AttentionScratch {
    /// `[queries, padded_dim]`
    queries: Buffer<f32>,
    /// `[queries, span]`
    scores: Buffer<f32>,
    /// `[queries, padded_dim]`
    sums: Buffer<f32>,
    /// `[queries]`
    totals: Buffer<f32>,
    /// `[block_size, padded_dim]` where the cache is not of floats.
    widened: Buffer<f32>,
}

impl AttentionScratch {
    /// Room for keys or values of a page that have to be widened.
    pub(crate) fn reserve_page(&mut self, geometry: &Geometry, block_size: usize) {
        let len = block_size * geometry.padded_dim;
        if geometry.config.kv_cache_dtype != KvCacheDtype::Native && self.widened.len() < len {
            self.widened = Buffer::resident(len);
        }
    }

    pub(crate) fn new(geometry: &Geometry, max_model_len: usize) -> Self {
        let queries = TILE_TOKENS * geometry.group;
        Self {
            queries: Buffer::resident(queries * geometry.padded_dim),
            scores: Buffer::resident(queries * max_model_len),
            sums: Buffer::resident(queries * geometry.padded_dim),
            totals: Buffer::resident(queries),
            widened: Buffer::default(),
        }
    }
}

/// What one attention operation reads.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) geometry: Geometry,
    pub(crate) qkv: &'a Tensor,
    pub(crate) kv: &'a KvLayer,
    pub(crate) window: Option<usize>,
}

/// `out = quantise(attention(q, kv))`. `heads` is `[num_kv_heads, num_tokens, group * head_dim]`, by which each task
/// writes one piece.
pub(crate) fn attention(
    on: On<'_>,
    scratch: &[Mutex<AttentionScratch>],
    inputs: Inputs<'_>,
    heads: &mut [f32],
    scheme: ActivationScheme,
    out: &mut Activation,
) {
    let Inputs { plan, geometry, .. } = inputs;
    let num_tokens = plan.num_tokens();
    let width = geometry.group * geometry.config.head_dim;
    let heads = &mut heads[..num_tokens * width * geometry.config.num_kv_heads];
    on.pool.for_parts(heads, &plan.tile_starts, |worker, index, out| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let kv_head = index / plan.tiles.len();
        let tile = plan.tiles[index % plan.tiles.len()];
        on.dispatch.run(AttendTile {
            task: Task { inputs, kv_head, tile },
            storage: on.storage,
            kernels: (on.sums == Sums::TensorCore).then(|| kernel_softmax(&inputs)).flatten(),
            scratch: &mut scratch,
            out,
        });
    });
    let heads = &*heads;
    on.fill_rows(out, num_tokens, scheme, |token: usize, row: &mut [f32]| {
        for (kv_head, row) in row.chunks_exact_mut(width).enumerate() {
            row.copy_from_slice(&heads[(kv_head * num_tokens + token) * width..][..width]);
        }
        if scheme == ActivationScheme::Fp8Token {
            on.storage.round(row);
        }
    });
}

/// What the kernels make of scores, where [`hopper`] knows it.
fn kernel_softmax(inputs: &Inputs<'_>) -> Option<CappedSoftmax> {
    let Geometry { config, padded_dim, .. } = inputs.geometry;
    let scale = f64::from(config.scale) * f64::from(inputs.kv.scales.key);
    let softcap = config
        .softcap
        .filter(|_| padded_dim.is_multiple_of(TENSOR_CORE_BLOCK))?;
    Some(CappedSoftmax::new(scale, softcap))
}

/// Positions of one block that some query of a tile sees.
struct Page {
    /// Where the first position is in the cache, in elements.
    offset: usize,
    first: usize,
    end: usize,
}

impl Page {
    /// Where its positions are in the cache.
    #[inline(always)]
    fn elements(&self, padded_dim: usize) -> Range<usize> {
        self.offset..self.offset + (self.end - self.first) * padded_dim
    }
}

/// What a task attends for.
#[derive(Clone, Copy)]
struct Task<'a> {
    inputs: Inputs<'a>,
    kv_head: usize,
    tile: Tile,
}

impl Task<'_> {
    #[inline(always)]
    fn num_queries(&self) -> usize {
        self.tile.num_rows * self.inputs.geometry.group
    }

    /// Positions a query sees: the first, and one past the last.
    #[inline(always)]
    fn visible(&self, query: usize) -> (usize, usize) {
        let row = self.tile.first_row + query / self.inputs.geometry.group;
        let end = self.inputs.plan.positions[row] as usize + 1;
        (self.inputs.window.map_or(0, |window| end.saturating_sub(window)), end)
    }

    /// Positions any query sees: a tile's positions ascend.
    #[inline(always)]
    fn seen(&self) -> (usize, usize) {
        (self.visible(0).0, self.visible(self.num_queries() - 1).1)
    }

    #[inline(always)]
    fn num_pages(&self) -> usize {
        let (begin, end) = self.seen();
        end.div_ceil(self.inputs.kv.block_size) - begin / self.inputs.kv.block_size
    }

    #[inline(always)]
    fn page(&self, index: usize) -> Page {
        let (begin, end) = self.seen();
        let block_size = self.inputs.kv.block_size;
        let number = begin / block_size + index;
        let (first, end) = (begin.max(number * block_size), end.min((number + 1) * block_size));
        let BlockId(block) = self.inputs.plan.block_ids[self.tile.first_block + number];
        let slot = block as usize * block_size + first % block_size;
        Page {
            offset: self.inputs.geometry.cache_offset(block_size, slot, self.kv_head),
            first,
            end,
        }
    }
}

struct AttendTile<'a> {
    task: Task<'a>,
    storage: Storage,
    /// To compute as kernels do.
    kernels: Option<CappedSoftmax>,
    scratch: &'a mut AttentionScratch,
    /// `[tile tokens, group * head_dim]`
    out: &'a mut [f32],
}

impl Kernel for AttendTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        self.load_queries();
        self.score(simd);
        self.add_values(simd);
    }
}

impl AttendTile<'_> {
    #[inline(always)]
    fn load_queries(&mut self) {
        let Geometry {
            config,
            group,
            padded_dim,
        } = self.task.inputs.geometry;
        let num_queries = self.task.num_queries();
        for (index, query) in self
            .scratch
            .queries
            .chunks_exact_mut(padded_dim)
            .take(num_queries)
            .enumerate()
        {
            let head = self.task.kv_head * group + index % group;
            let row = self.task.inputs.qkv.row(self.task.tile.first_row + index / group);
            query[..config.head_dim].copy_from_slice(&row[head * config.head_dim..][..config.head_dim]);
        }
    }

    /// Fills `scores` with unnormalised softmax weights and `totals` with their sums.
    #[inline(always)]
    fn score<S: Simd>(&mut self, simd: S) {
        if self.kernels.is_some() {
            self.multiply_keys(simd, Bf16Sums);
        } else {
            self.multiply_keys(simd, Fma::<S, F32>::new(simd));
        }
        let task = self.task;
        let (kv, config) = (task.inputs.kv, task.inputs.geometry.config);
        let (begin, end) = task.seen();
        let span = end - begin;
        for query in 0..task.num_queries() {
            let (from, to) = task.visible(query);
            let scores = &mut self.scratch.scores[query * span..][from - begin..to - begin];
            self.scratch.totals[query] = if let Some(softmax) = self.kernels {
                scores.iter_mut().for_each(|score| *score = softmax.probability(*score));
                self.storage.round(scores);
                hopper::sum_of_probabilities(from, scores)
            } else {
                let scale = config.scale * kv.scales.key;
                softmax_weights(scores, scale, config.softcap, self.storage)
            };
        }
    }

    /// Fills `scores` with products of queries and keys.
    #[inline(always)]
    fn multiply_keys<S: Simd, A, const BLOCK: usize>(&mut self, simd: S, arith: A)
    where
        A: Arith<X = [f32; BLOCK], W = [f32; BLOCK]>,
    {
        let task = self.task;
        let (kv, padded_dim) = (task.inputs.kv, task.inputs.geometry.padded_dim);
        let (num_queries, per_row) = (task.num_queries(), padded_dim / BLOCK);
        let (begin, end) = task.seen();
        let span = end - begin;
        for index in 0..task.num_pages() {
            let page = task.page(index);
            let AttentionScratch {
                queries,
                scores,
                widened,
                ..
            } = &mut *self.scratch;
            let keys = kv.keys.widen(simd, page.elements(padded_dim), widened);
            let keys = keys.as_flattened().as_chunks().0;
            let queries = queries.as_chunks().0;
            let mut first = 0;
            while first < num_queries {
                let query = |index: usize| &queries[(first + index) * per_row..][..per_row];
                let sink = &mut |index: usize, key: usize, products: &[f32]| {
                    let start = (first + index) * span + page.first - begin + key;
                    scores[start..][..products.len()].copy_from_slice(products);
                };
                first += dot_rows(arith, num_queries - first, query, (keys, per_row), sink);
            }
        }
    }

    /// Adds up the values by their weights.
    #[inline(always)]
    fn add_values<S: Simd>(&mut self, simd: S) {
        let task = self.task;
        let (kv, Geometry { config, padded_dim, .. }) = (task.inputs.kv, task.inputs.geometry);
        let (num_queries, per_row) = (task.num_queries(), padded_dim / LANES);
        let (begin, end) = task.seen();
        let span = end - begin;
        self.scratch.sums[..num_queries * padded_dim].fill(0.0);
        for index in 0..task.num_pages() {
            let page = task.page(index);
            let AttentionScratch {
                scores, sums, widened, ..
            } = &mut *self.scratch;
            let values = kv.values.widen(simd, page.elements(padded_dim), widened);
            for query in 0..num_queries {
                let (from, to) = task.visible(query);
                let (from, to) = (from.max(page.first), to.min(page.end));
                if from < to {
                    let weights = &scores[query * span..][from - begin..to - begin];
                    let values = &values[(from - page.first) * per_row..(to - page.first) * per_row];
                    let sums = &mut sums.as_chunks_mut().0[query * per_row..][..per_row];
                    if self.kernels.is_some() {
                        add_as_kernels_do(from, weights, values.as_flattened(), sums.as_flattened_mut());
                    } else {
                        add_weighted(simd, weights, values, sums);
                    }
                }
            }
        }
        for (query, out) in self.out.chunks_exact_mut(config.head_dim).enumerate() {
            let total = self.scratch.totals[query];
            let factor = match self.kernels {
                Some(_) => kv.scales.value * (1.0 / total),
                None => kv.scales.value / total,
            };
            for (out, sum) in out.iter_mut().zip(&self.scratch.sums[query * padded_dim..]) {
                *out = sum * factor;
            }
        }
    }
}

/// Turns products into unnormalised softmax weights, and returns their sum.
#[inline(always)]
fn softmax_weights(scores: &mut [f32], scale: f32, softcap: Option<f32>, storage: Storage) -> f32 {
    match softcap {
        Some(cap) => scores
            .iter_mut()
            .for_each(|score| *score = math::softcap(*score * scale, cap)),
        None => scores.iter_mut().for_each(|score| *score *= scale),
    }
    let max = match (storage, softcap) {
        // Where weights are rounded it matters what to; kernels leave capped scores as they are.
        (Storage::Bf16, Some(cap)) if cap <= MAX_EXPONENT => 0.0,
        _ => math::max_of(scores),
    };
    scores.iter_mut().for_each(|score| *score = math::exp(*score - max));
    storage.round(scores);
    math::sum_of(scores, |weight| weight)
}

/// `sums += weights[i] * values[i]` of the positions from `first` on, those of one product of tensor cores at once.
fn add_as_kernels_do(first: usize, weights: &[f32], values: &[f32], sums: &mut [f32]) {
    let padded_dim = sums.len();
    let mut done = 0;
    while done < weights.len() {
        let position = first + done;
        let count = (hopper::KEYS - position % hopper::KEYS).min(weights.len() - done);
        let value = |key: usize, column: usize| values[(done + key) * padded_dim + column];
        hopper::add_values(sums, position, &weights[done..done + count], value);
        done += count;
    }
}

/// `sums += weights[i] * values[i]`, one position after another.
#[inline(always)]
fn add_weighted<S: Simd>(simd: S, weights: &[f32], values: &[[f32; LANES]], sums: &mut [[f32; LANES]]) {
    let per_row = sums.len();
    let mut first = 0;
    while first < per_row {
        let (values, sums) = (&values[first..], &mut sums[first..]);
        first += match sums.len() {
            8.. => add_weighted_vectors::<S, 8>(simd, weights, values, per_row, sums),
            4.. => add_weighted_vectors::<S, 4>(simd, weights, values, per_row, sums),
            _ => add_weighted_vectors::<S, 1>(simd, weights, values, per_row, sums),
        };
    }
}

/// The first `N` vectors of [`add_weighted`], held in registers over all positions.
#[inline(always)]
fn add_weighted_vectors<S: Simd, const N: usize>(
    simd: S,
    weights: &[f32],
    values: &[[f32; LANES]],
    per_row: usize,
    sums: &mut [[f32; LANES]],
) -> usize {
    let mut held: [S::V; N] = std::array::from_fn(|i| simd.load(&sums[i]));
    for (weight, value) in weights.iter().zip(values.chunks(per_row)) {
        let weight = simd.splat(*weight);
        let value = &value[..N];
        for i in 0..N {
            held[i] = simd.mul_add(weight, simd.load(&value[i]), held[i]);
        }
    }
    for i in 0..N {
        simd.store(held[i], &mut sums[i]);
    }
    N
}
