//! Rotary position embedding, neox style: element `i` of a head turns with element `i + head_dim / 2`.

use lapidary_model::AttentionConfig;

use super::attention::Geometry;
use super::elementwise::{On, RowOp};
use crate::backend::Storage;
use crate::plan::Plan;
use crate::tensor::{KvLayer, Tensor};

/// Tokens from which keys and values are copied by two threads.
const MIN_PARALLEL_TOKENS: usize = 16;

/// Cosines and sines of every position and frequency.
#[derive(Debug, Default)]
pub(crate) struct RopeTable {
    /// `[positions, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// Angles are rounded to f32 as transformers does it, which is part of what models were trained with.
    pub(crate) fn new(attention: &AttentionConfig, num_positions: usize) -> Self {
        let half = attention.head_dim / 2;
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / attention.head_dim as f32;
            1.0 / attention.rope_theta.powf(exponent)
        };
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles =
            || (0..num_positions).flat_map(|position| frequencies.iter().map(move |f| f64::from(position as f32 * f)));
        Self {
            cos: angles().map(|angle| angle.cos() as f32).collect(),
            sin: angles().map(|angle| angle.sin() as f32).collect(),
            half,
        }
    }

    /// Rotates each head of `heads` in place.
    #[inline(always)]
    pub(crate) fn rotate(&self, position: usize, heads: &mut [f32]) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        for head in heads.chunks_exact_mut(2 * self.half) {
            let (low, high) = head.split_at_mut(self.half);
            for i in 0..self.half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] - b * sin[i];
                high[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

/// Rotates the heads in the first `len` elements of a row.
#[derive(Debug, Clone, Copy)]
struct Rotate<'a> {
    table: &'a RopeTable,
    positions: &'a [u32],
    len: usize,
    storage: Storage,
}

impl RowOp for Rotate<'_> {
    #[inline(always)]
    fn apply(self, row: usize, heads: &mut [f32]) {
        self.table.rotate(self.positions[row] as usize, &mut heads[..self.len]);
        self.storage.round(&mut heads[..self.len]);
    }
}

/// Rotates queries and keys of `qkv` in place, and copies keys and values to their slots.
pub(crate) fn rope_append(
    on: On<'_>,
    plan: &Plan,
    geometry: &Geometry,
    table: &RopeTable,
    qkv: &mut Tensor,
    kv: &mut KvLayer,
) {
    let AttentionConfig {
        num_heads,
        num_kv_heads,
        head_dim,
        ..
    } = geometry.config;
    let first_key = num_heads * head_dim;
    let first_value = first_key + num_kv_heads * head_dim;
    let positions = &plan.positions;
    on.update_rows(
        qkv,
        plan.num_tokens(),
        Rotate {
            table,
            positions,
            len: first_value,
            storage: on.storage,
        },
    );
    let block_size = kv.block_size;
    let mut copies = [(first_key, &mut *kv.keys), (first_value, &mut *kv.values)];
    let per_task = if plan.num_tokens() < MIN_PARALLEL_TOKENS { 2 } else { 1 };
    on.pool.for_chunks(&mut copies, per_task, |_, _, copies| {
        for (first, cache) in copies {
            for (row, slot) in plan.slots.iter().enumerate() {
                let heads = &qkv.row(row)[*first..][..num_kv_heads * head_dim];
                for (head, values) in heads.chunks_exact(head_dim).enumerate() {
                    let offset = geometry.cache_offset(block_size, *slot as usize, head);
                    cache[offset..][..head_dim].copy_from_slice(values);
                }
            }
        }
    });
}
