//! Rotary position embedding, neox style: element `i` of a head turns with element `i + head_dim / 2`.

use lapidary_model::{AttentionConfig, KvCacheDtype};

use super::attention::Geometry;
use super::elementwise::{On, RowOp};
use crate::backend::{Storage, Sums};
use crate::e4m3;
use crate::plan::Plan;
use crate::simd::{Kernel, Simd};
use crate::tensor::{KvElements, KvLayer, Tensor};

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
    pub(crate) fn rotate(&self, position: usize, heads: &mut [f32], sums: Sums) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        for head in heads.chunks_exact_mut(2 * self.half) {
            let (low, high) = head.split_at_mut(self.half);
            for i in 0..self.half {
                let (a, b) = (low[i], high[i]);
                (low[i], high[i]) = match sums {
                    Sums::F32 => (a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]),
                    Sums::TensorCore => (a.mul_add(cos[i], -(b * sin[i])), b.mul_add(cos[i], a * sin[i])),
                };
            }
        }
    }
}

/// Rotates the heads in the first `len` elements of a row, and leaves the first `stored` as they are stored.
#[derive(Debug, Clone, Copy)]
struct Rotate<'a> {
    table: &'a RopeTable,
    positions: &'a [u32],
    len: usize,
    stored: usize,
    storage: Storage,
    sums: Sums,
}

impl RowOp for Rotate<'_> {
    #[inline(always)]
    fn apply(self, row: usize, heads: &mut [f32]) {
        let position = self.positions[row] as usize;
        self.table.rotate(position, &mut heads[..self.len], self.sums);
        self.storage.round(&mut heads[..self.stored]);
    }
}

/// Rotates queries and keys of `qkv` in place, and copies keys and values to their slots, as e4m3 where the cache is.
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
        kv_cache_dtype,
        ..
    } = geometry.config;
    let first_key = num_heads * head_dim;
    let first_value = first_key + num_kv_heads * head_dim;
    let positions = &plan.positions;
    let rotate = Rotate {
        table,
        positions,
        len: first_value,
        stored: match kv_cache_dtype {
            KvCacheDtype::Native => first_value,
            // Keys are rounded once, on their way to the cache.
            KvCacheDtype::Fp8E4m3 => first_key,
        },
        storage: on.storage,
        sums: on.sums,
    };
    on.update_rows(qkv, plan.num_tokens(), rotate);
    let block_size = kv.block_size;
    let mut copies = [
        (first_key, &mut kv.keys, kv.scales.key),
        (first_value, &mut kv.values, kv.scales.value),
    ];
    let per_task = if plan.num_tokens() < MIN_PARALLEL_TOKENS { 2 } else { 1 };
    on.pool.for_chunks(&mut copies, per_task, |_, _, copies| {
        for (first, cache, scale) in copies {
            for (row, slot) in plan.slots.iter().enumerate() {
                let heads = &qkv.row(row)[*first..][..num_kv_heads * head_dim];
                for (head, elements) in heads.chunks_exact(head_dim).enumerate() {
                    let offset = geometry.cache_offset(block_size, *slot as usize, head);
                    match cache {
                        KvElements::F32(cache) => cache[offset..][..head_dim].copy_from_slice(elements),
                        KvElements::E4m3(cache) => on.dispatch.run(Encode {
                            elements,
                            scale: *scale,
                            codes: &mut cache[offset..][..head_dim],
                        }),
                    }
                }
            }
        }
    });
}

/// `codes = e4m3(elements / scale)`.
struct Encode<'a> {
    elements: &'a [f32],
    scale: f32,
    codes: &'a mut [u8],
}

impl Kernel for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (code, element) in self.codes.iter_mut().zip(self.elements) {
            *code = e4m3::encode(element / self.scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use lapidary_engine::{Batch, BlockId, RequestId};
    use lapidary_model::{Backend, KvScales, StepLimits};

    use super::*;
    use crate::{Cpu, CpuConfig};

    const HEAD_DIM: usize = 32;
    const NUM_TOKENS: usize = 16;
    const SCALES: KvScales = KvScales {
        key: 0.003,
        value: 0.007,
    };

    const ATTENTION: AttentionConfig = AttentionConfig {
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: HEAD_DIM,
        scale: 1.0,
        softcap: None,
        rope_theta: 1e4,
        kv_cache_dtype: KvCacheDtype::Fp8E4m3,
    };

    /// Codes of one block's keys, and of its values.
    fn append(storage: Storage, element: impl Fn(usize) -> f32) -> [Vec<u8>; 2] {
        let config = CpuConfig {
            storage,
            ..CpuConfig::default()
        };
        let mut cpu = Cpu::new(config).expect("the default configuration fits the machine");
        let limits = StepLimits {
            max_tokens: NUM_TOKENS,
            max_seqs: 1,
            max_model_len: NUM_TOKENS,
        };
        cpu.prepare(limits, ATTENTION).expect("limits are small");
        let mut kv = cpu.alloc_kv_layer(1, NUM_TOKENS, SCALES).expect("the cache is small");
        let batch = Batch {
            request_ids: vec![RequestId(0)],
            token_ids: vec![0; NUM_TOKENS],
            positions: (0..NUM_TOKENS as u32).collect(),
            slot_mapping: (0..NUM_TOKENS as u32).collect(),
            query_start: vec![0, NUM_TOKENS as u32],
            context_lens: vec![NUM_TOKENS as u32],
            block_start: vec![0, 1],
            block_ids: vec![BlockId(0)],
            ..Batch::default()
        };
        let plan = cpu.begin(&batch).expect("the batch keeps the limits");
        let mut qkv = Tensor::zeroed(NUM_TOKENS, 3 * HEAD_DIM);
        for (index, to) in qkv.data.iter_mut().enumerate() {
            *to = element(index);
        }
        cpu.rope_append(&plan, &mut qkv, &mut kv).expect("rope runs");
        [kv.keys, kv.values].map(|elements| match elements {
            KvElements::E4m3(codes) => codes.to_vec(),
            KvElements::F32(_) => panic!("the cache is of e4m3"),
        })
    }

    #[test]
    fn keys_and_values_become_e4m3_from_floats_whatever_is_stored_between_operations() {
        // No bfloat16 holds these.
        let element = |index: usize| (index as f32 * 0.37).sin() * 1.1;
        let codes = append(Storage::F32, element);
        assert_eq!(codes, append(Storage::Bf16, element));

        let table = RopeTable::new(&ATTENTION, NUM_TOKENS);
        let mut clipped = 0;
        for token in 0..NUM_TOKENS {
            let row: Vec<f32> = (0..3 * HEAD_DIM)
                .map(|column| element(token * 3 * HEAD_DIM + column))
                .collect();
            let mut key = row[HEAD_DIM..2 * HEAD_DIM].to_vec();
            table.rotate(token, &mut key, Sums::F32);
            for (codes, floats, scale) in [
                (&codes[0], &key[..], SCALES.key),
                (&codes[1], &row[2 * HEAD_DIM..], SCALES.value),
            ] {
                for (code, float) in codes[token * HEAD_DIM..].iter().zip(floats) {
                    let quotient = (float / scale).clamp(-448.0, 448.0);
                    let error = (e4m3::decode(*code) - quotient).abs();
                    // Half a step: 3 bits of mantissa, and 2^-9 below 2^-6.
                    let step = quotient.abs().max(1.0 / 64.0).log2().floor().exp2() / 8.0;
                    assert!(error <= step / 2.0, "code {code:#x} for {quotient}");
                    clipped += usize::from(quotient.abs() >= 448.0);
                }
            }
        }
        assert!(clipped > 0, "no value is too large");
    }
}
