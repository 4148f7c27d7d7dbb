//! A backend on the bench: numbers in, numbers out, and the comparison.

use half::{bf16, f16};
use lapidary_engine::{Batch, BlockId, RequestId, SampleRow};

use super::Bounds;
use crate::backend::{
    ActivationScheme, AttentionConfig, Backend, DType, FP8_MAX, FP8_MIN_TOKEN_SCALE, HostTensor, KvCacheDtype,
    LinearWeights, StepLimits, Width,
};

/// Tokens of a KV block in all checks.
pub(super) const BLOCK_SIZE: usize = 16;

/// The schemes an activation can have, with a scale that is no power of two and clips some values.
pub(super) const SCHEMES: [ActivationScheme; 3] = [
    ActivationScheme::None,
    ActivationScheme::Fp8Static { scale: 0.0037 },
    ActivationScheme::Fp8Token,
];

pub(super) struct Rig<B: Backend> {
    pub(super) backend: B,
}

impl<B: Backend> Rig<B> {
    /// A backend for steps of up to `max_tokens` rows, when attention does not matter.
    pub(super) fn new(make: &dyn Fn() -> B, max_tokens: usize) -> Self {
        Self::with_attention(make, max_tokens, max_tokens, small_attention())
    }

    pub(super) fn with_attention(
        make: &dyn Fn() -> B,
        max_tokens: usize,
        max_model_len: usize,
        attention: AttentionConfig,
    ) -> Self {
        let mut backend = make();
        let limits = StepLimits {
            max_tokens,
            max_seqs: max_tokens,
            max_model_len,
        };
        backend.prepare(limits, attention).expect("limits are small");
        Self { backend }
    }

    /// Starts a step of `rows` tokens with ids `0..rows`, one sequence.
    pub(super) fn begin(&mut self, rows: usize) -> B::Plan {
        let sequence = SequenceStep::new((0..rows as u32).collect(), 0, 0);
        self.backend
            .begin(&batch_of(&[sequence]))
            .expect("the batch keeps the limits")
    }

    /// A tensor of these values (exact in bf16), by embedding row `t` for token `t`.
    pub(super) fn tensor(&mut self, plan: &B::Plan, values: &[f32], rows: usize) -> B::Tensor {
        self.tensor_of(plan, values, rows, Width::Native)
    }

    /// As [`Rig::tensor`], for the residual stream and logits.
    pub(super) fn wide_tensor(&mut self, plan: &B::Plan, values: &[f32], rows: usize) -> B::Tensor {
        self.tensor_of(plan, values, rows, Width::Wide)
    }

    fn tensor_of(&mut self, plan: &B::Plan, values: &[f32], rows: usize, width: Width) -> B::Tensor {
        let mut tensor = self.alloc(rows, values.len() / rows, width);
        self.fill(plan, values, rows, &mut tensor);
        tensor
    }

    pub(super) fn alloc(&mut self, rows: usize, cols: usize, width: Width) -> B::Tensor {
        self.backend.alloc_tensor(rows, cols, width).expect("tensors are small")
    }

    pub(super) fn fill(&mut self, plan: &B::Plan, values: &[f32], rows: usize, tensor: &mut B::Tensor) {
        let table = Stored::new(values, &[rows, values.len() / rows], DType::Bf16);
        let table = self.backend.upload_embedding(table.host()).expect("tables are small");
        self.backend.embed(plan, &table, bf16::ONE, tensor).expect("embed runs");
    }

    pub(super) fn norm_weight(&mut self, values: &[f32]) -> B::Norm {
        let stored = Stored::new(values, &[values.len()], DType::Bf16);
        self.backend.upload_norm(stored.host()).expect("norms are small")
    }

    pub(super) fn activation(&mut self, rows: usize, cols: usize) -> B::Activation {
        self.backend
            .alloc_activation(rows, cols)
            .expect("activations are small")
    }

    pub(super) fn read(&mut self, tensor: &B::Tensor, rows: usize) -> Vec<f64> {
        self.backend
            .read(tensor, rows)
            .expect("tensors can be read")
            .into_iter()
            .map(f64::from)
            .collect()
    }

    /// The values of an activation: what the identity matrix makes of it.
    pub(super) fn read_activation(
        &mut self,
        plan: &B::Plan,
        activation: &B::Activation,
        [rows, cols]: [usize; 2],
        scheme: ActivationScheme,
    ) -> Vec<f64> {
        self.read_columns(plan, activation, [rows, cols, cols], scheme)
    }

    /// The values of an activation's last columns: what rows of the identity matrix make of it.
    pub(super) fn read_columns(
        &mut self,
        plan: &B::Plan,
        activation: &B::Activation,
        [rows, cols, last]: [usize; 3],
        scheme: ActivationScheme,
    ) -> Vec<f64> {
        let dtype = if scheme == ActivationScheme::None {
            DType::Bf16
        } else {
            DType::F8E4M3
        };
        let mut identity = vec![0.0; last * cols];
        let columns = cols - last..;
        for (row, column) in identity.chunks_exact_mut(cols).zip(columns) {
            row[column] = 1.0;
        }
        let stored = Stored::new(&identity, &[last, cols], dtype);
        let scales = if dtype == DType::F8E4M3 {
            vec![1.0; last]
        } else {
            Vec::new()
        };
        let weights = LinearWeights {
            parts: vec![stored.host()],
            scales,
            input: scheme,
        };
        let weights = self.backend.upload_linear(&weights).expect("identities are small");
        let mut out = self.alloc(rows, last, Width::Native);
        self.backend
            .linear(plan, activation, &weights, &mut out)
            .expect("linear runs");
        self.read(&out, rows)
    }
}

pub(super) fn small_attention() -> AttentionConfig {
    AttentionConfig {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 64,
        scale: 0.125,
        softcap: Some(50.0),
        rope_theta: 1e4,
        kv_cache_dtype: KvCacheDtype::Native,
    }
}

/// One sequence's share of a step.
pub(super) struct SequenceStep {
    pub(super) tokens: Vec<u32>,
    /// Position of the first token.
    pub(super) start: usize,
    /// Covers `start + tokens.len()` positions.
    pub(super) blocks: Vec<u32>,
}

impl SequenceStep {
    /// Blocks in order, from `first_block`.
    pub(super) fn new(tokens: Vec<u32>, start: usize, first_block: usize) -> Self {
        let num_blocks = (start + tokens.len()).div_ceil(BLOCK_SIZE);
        Self {
            tokens,
            start,
            blocks: (first_block as u32..(first_block + num_blocks) as u32).collect(),
        }
    }
}

pub(super) fn batch_of(sequences: &[SequenceStep]) -> Batch {
    let mut batch = Batch {
        query_start: vec![0],
        block_start: vec![0],
        ..Batch::default()
    };
    for (index, sequence) in sequences.iter().enumerate() {
        let end = sequence.start + sequence.tokens.len();
        batch.request_ids.push(RequestId(index as u64));
        batch.token_ids.extend(&sequence.tokens);
        for position in sequence.start..end {
            let block = sequence.blocks[position / BLOCK_SIZE] as usize;
            batch.positions.push(position as u32);
            batch
                .slot_mapping
                .push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
        }
        batch.query_start.push(batch.token_ids.len() as u32);
        batch.context_lens.push(end as u32);
        batch.block_ids.extend(
            sequence.blocks[..end.div_ceil(BLOCK_SIZE)]
                .iter()
                .map(|block| BlockId(*block)),
        );
        batch.block_start.push(batch.block_ids.len() as u32);
    }
    batch
}

/// `samples.len()` sequences of one token each, which sample in order.
pub(super) fn sampling_batch(samples: Vec<SampleRow>) -> Batch {
    let sequences: Vec<_> = (0..samples.len())
        .map(|row| SequenceStep::new(vec![row as u32], 0, row))
        .collect();
    Batch {
        samples,
        ..batch_of(&sequences)
    }
}

/// Values in the bytes of a checkpoint, deliberately one byte off every alignment.
pub(super) struct Stored {
    bytes: Vec<u8>,
    shape: Vec<usize>,
    dtype: DType,
}

impl Stored {
    pub(super) fn new(values: &[f32], shape: &[usize], dtype: DType) -> Self {
        let mut bytes = vec![0xff];
        for value in values {
            match dtype {
                DType::Bf16 => bytes.extend(bf16::from_f32(*value).to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(*value).to_le_bytes()),
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::F8E4M3 => bytes.push(encode_e4m3(*value)),
            }
        }
        Self {
            bytes,
            shape: shape.to_vec(),
            dtype,
        }
    }

    pub(super) fn host(&self) -> HostTensor<'_> {
        HostTensor {
            data: &self.bytes[1..],
            dtype: self.dtype,
            shape: &self.shape,
        }
    }
}

/// Repeatable numbers (splitmix64).
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// In `-1..1`.
    pub(super) fn symmetric(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// `count` values in `-size..size`, exact in bf16.
    pub(super) fn values(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| round_bf16(self.symmetric() * size)).collect()
    }

    /// `count` values that e4m3 holds exactly.
    pub(super) fn e4m3_values(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| round_e4m3(f64::from(self.symmetric()) * 4.0) as f32)
            .collect()
    }

    /// `0..count` in some order.
    pub(super) fn shuffled(&mut self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for index in (1..count).rev() {
            order.swap(index, self.below(index + 1));
        }
        order
    }
}

pub(super) fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

pub(super) fn exact(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Distance of neighbouring e4m3 values around `value`.
fn e4m3_quantum(value: f64) -> f64 {
    // Below 2^-6 the format is fixed-point.
    value.abs().max(2_f64.powi(-6)).log2().floor().exp2() / 8.0
}

/// To the nearest e4m3 value, ties to even, saturating.
pub(super) fn round_e4m3(value: f64) -> f64 {
    let clamped = value.clamp(-f64::from(FP8_MAX), f64::from(FP8_MAX));
    let quantum = e4m3_quantum(clamped);
    (clamped / quantum).round_ties_even() * quantum
}

/// The code of a value that e4m3 holds exactly.
fn encode_e4m3(value: f32) -> u8 {
    let code = (0..0x7f).find(|code| decode_e4m3(*code) == value.abs());
    code.expect("the value is an e4m3 value") | if value < 0.0 { 0x80 } else { 0 }
}

pub(super) fn decode_e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    match exponent {
        0 => mantissa / 8.0 * 2_f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7),
    }
}

/// The scale a row is quantised with; `None` if it is not.
pub(super) fn activation_scale(scheme: ActivationScheme, row: &[f64]) -> Option<f64> {
    match scheme {
        ActivationScheme::None => None,
        ActivationScheme::Fp8Static { scale } => Some(f64::from(scale)),
        ActivationScheme::Fp8Token => {
            let largest = row.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
            Some((largest / f64::from(FP8_MAX)).max(f64::from(FP8_MIN_TOKEN_SCALE)))
        }
    }
}

/// What a linear layer sees of `row`.
pub(super) fn quantized(scheme: ActivationScheme, row: &[f64]) -> Vec<f64> {
    match activation_scale(scheme, row) {
        None => row.to_vec(),
        Some(scale) => row.iter().map(|value| round_e4m3(value / scale) * scale).collect(),
    }
}

/// Each value within `bound` of its expectation, relative to its magnitude.
pub(super) fn assert_close(what: &str, got: &[f64], want: &[f64], magnitude: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (index, ((got, want), magnitude)) in got.iter().zip(want).zip(magnitude).enumerate() {
        let allowed = bound * magnitude + f64::from(f32::MIN_POSITIVE);
        assert!(
            (got - want).abs() <= allowed,
            "{what}: element {index} is {got}, expected {want} within {allowed}"
        );
    }
}

/// How far a value may be off before it is quantised.
#[derive(Debug, Clone, Copy)]
pub(super) struct Error {
    pub(super) relative: f64,
    pub(super) absolute: f64,
}

impl Error {
    pub(super) fn relative(relative: f64) -> Self {
        Self {
            relative,
            absolute: 0.0,
        }
    }

    fn of(self, value: f64) -> f64 {
        self.relative * value.abs() + self.absolute
    }
}

/// Quantised values judged without repeating the rounding: rounding to nearest errs by half a quantum at most, on top of
/// what the value itself may be off. A wrong mode, scale or saturation errs by more.
pub(super) fn assert_quantized(
    what: &str,
    got: &[f64],
    want: &[f64],
    cols: usize,
    scheme: ActivationScheme,
    error: Error,
) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (row, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
        let scale = activation_scale(scheme, want);
        for (col, (got, want)) in got.iter().zip(want).enumerate() {
            let (target, allowed) = match scale {
                None => (*want, error.of(*want)),
                Some(scale) => {
                    let limit = f64::from(FP8_MAX) * scale;
                    let target = want.clamp(-limit, limit);
                    // The scale of a row errs too, and a quotient is rounded once more.
                    let off = 3.0 * error.of(target);
                    // The value may lie in the next binade once it is off.
                    let quantum = e4m3_quantum((target.abs() + off) / scale) * scale;
                    (target, quantum / 2.0 + off)
                }
            };
            let allowed = allowed + f64::from(f32::MIN_POSITIVE);
            assert!(
                (got - target).abs() <= allowed,
                "{what} {scheme:?}: row {row} column {col} is {got}, expected {want} within {allowed}"
            );
        }
    }
}

/// `size` rounded up to what the backend has kernels for.
pub(super) fn shape(size: usize, bounds: &Bounds) -> usize {
    size.next_multiple_of(bounds.shape_multiple)
}
