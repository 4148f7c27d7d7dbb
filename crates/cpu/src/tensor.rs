//! What the backend's associated types are in memory. Rows of inputs and weights are padded with zeros to whole blocks,
//! so that no kernel has a remainder in K.

use std::ops::Range;

use half::{bf16, f16};
use lapidary_model::{
    ActivationScheme, BackendError, DType, FP8_MAX, FP8_MIN_TOKEN_SCALE, HostTensor, KvScales, LinearWeights,
};

use crate::backend::Storage;
use crate::e4m3;
use crate::simd::{Buffer, Isa, LANES, Simd};

/// K is padded to multiples of this.
pub(crate) const K_BLOCK: usize = 64;

/// Output rows of weights are padded to multiples of this: a kernel's tile never reads past the end.
pub(crate) const ROW_BLOCK: usize = 8;

impl Storage {
    /// Leaves values as they are stored.
    #[inline(always)]
    pub(crate) fn round(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::Bf16 => values
                .iter_mut()
                .for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        }
    }
}

/// `[rows, cols]` floats, row-major.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) data: Buffer<f32>,
    pub(crate) cols: usize,
}

impl Tensor {
    pub(crate) fn zeroed(rows: usize, cols: usize) -> Self {
        Self {
            data: Buffer::resident(rows * cols),
            cols,
        }
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.cols..][..self.cols]
    }

    pub(crate) fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.data[..rows * self.cols]
    }
}

/// Input of a linear layer, a row for each token.
#[derive(Debug)]
pub struct Activation {
    pub(crate) rows: Vec<ActivationRow>,
    pub(crate) cols: usize,
    pub(crate) scheme: ActivationScheme,
    /// Whether quantised rows are stored as bfloat16 instead of f32.
    pub(crate) has_pairs: bool,
}

/// One token's values; quantised ones are e4m3 numbers, to be multiplied by `scale`.
#[derive(Debug)]
pub(crate) struct ActivationRow {
    /// `[padded cols]`. With pairs, this is scratch once the row is quantised.
    pub(crate) values: Buffer<f32>,
    /// `[padded cols]` the quantised values as bfloat16, which holds them exactly.
    pub(crate) pairs: Buffer<u16>,
    pub(crate) scale: f32,
}

impl Activation {
    pub(crate) fn zeroed(rows: usize, cols: usize, has_pairs: bool) -> Self {
        let padded = cols.next_multiple_of(K_BLOCK);
        let row = || ActivationRow {
            values: Buffer::resident(padded),
            pairs: Buffer::resident(if has_pairs { padded } else { 0 }),
            scale: 1.0,
        };
        Self {
            rows: (0..rows).map(|_| row()).collect(),
            cols,
            scheme: ActivationScheme::None,
            has_pairs,
        }
    }
}

impl ActivationRow {
    /// Quantises `values[..cols]` as the scheme says.
    #[inline(always)]
    pub(crate) fn quantize(&mut self, cols: usize, scheme: ActivationScheme, to_pairs: bool) {
        self.scale = match scheme {
            ActivationScheme::None => return,
            ActivationScheme::Fp8Static { scale } => scale,
            ActivationScheme::Fp8Token => (amax(&self.values[..cols]) / FP8_MAX).max(FP8_MIN_TOKEN_SCALE),
        };
        let scale = self.scale;
        if to_pairs {
            for (pair, value) in self.pairs[..cols].iter_mut().zip(&self.values[..cols]) {
                *pair = (e4m3::round(value / scale).to_bits() >> 16) as u16;
            }
        } else {
            for value in &mut self.values[..cols] {
                *value = e4m3::round(*value / scale);
            }
        }
    }
}

#[inline(always)]
fn amax(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (blocks, rest) = values.as_chunks::<16>();
    for block in blocks {
        for (lane, value) in lanes.iter_mut().zip(block) {
            *lane = if value.abs() > *lane { value.abs() } else { *lane };
        }
    }
    rest.iter()
        .chain(&lanes)
        .fold(0.0, |max, value| f32::max(max, value.abs()))
}

/// Elements of weights as stored.
#[derive(Debug)]
pub(crate) enum Elements {
    F32(Buffer<f32>),
    Bf16(Buffer<u16>),
    F16(Buffer<u16>),
    /// Each 64 codes in [`Isa::e4m3_order`].
    E4m3(Buffer<u8>),
    /// Each 64 codes in [`Isa::e4m3_pair_order`].
    E4m3Pairs(Buffer<u8>),
}

/// `[rows, cols]` weights, both padded.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) elements: Elements,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrix {
    /// Elements between the starts of two rows.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(K_BLOCK)
    }

    /// Bytes a row takes.
    pub(crate) fn row_bytes(&self) -> usize {
        self.stride()
            * match self.elements {
                Elements::F32(_) => 4,
                Elements::Bf16(_) | Elements::F16(_) => 2,
                Elements::E4m3(_) | Elements::E4m3Pairs(_) => 1,
            }
    }

    /// Stacks `parts` along their rows. `in_pairs` stores e4m3 for [`crate::simd::PairDot`].
    pub(crate) fn upload(parts: &[HostTensor<'_>], isa: Isa, in_pairs: bool) -> Result<Self, BackendError> {
        let (mut rows, mut cols) = (0, None);
        let mut dtype = None;
        for part in parts {
            let [part_rows, part_cols] = *part.shape else {
                return Err(BackendError::Unsupported(format!("weights of shape {:?}", part.shape)));
            };
            if part.data.len() != part_rows * part_cols * part.dtype.size_bytes() {
                return Err(BackendError::Unsupported(format!(
                    "{} bytes for shape {:?}",
                    part.data.len(),
                    part.shape
                )));
            }
            if cols.is_some_and(|cols| cols != part_cols) || dtype.is_some_and(|dtype| dtype != part.dtype) {
                return Err(BackendError::Unsupported(
                    "stacked weights of unequal width or type".to_owned(),
                ));
            }
            rows += part_rows;
            (cols, dtype) = (Some(part_cols), Some(part.dtype));
        }
        let (Some(cols), Some(dtype)) = (cols, dtype) else {
            return Err(BackendError::Unsupported("a layer without weights".to_owned()));
        };
        let stride = cols.next_multiple_of(K_BLOCK);
        let len = rows.next_multiple_of(ROW_BLOCK) * stride;
        let bytes = || {
            parts
                .iter()
                .flat_map(|part| part.data.chunks_exact(cols * part.dtype.size_bytes()))
        };
        let elements = match dtype {
            DType::F32 => Elements::F32(fill(len, stride, bytes(), f32::from_le_bytes)),
            DType::Bf16 => Elements::Bf16(fill(len, stride, bytes(), u16::from_le_bytes)),
            DType::F16 => Elements::F16(fill(len, stride, bytes(), u16::from_le_bytes)),
            DType::F8E4M3 => {
                if bytes().any(|row| row.iter().fold(false, |nan, code| nan | (code & 0x7f == 0x7f))) {
                    return Err(BackendError::Unsupported(
                        "e4m3 weights that are not numbers".to_owned(),
                    ));
                }
                let mut codes = fill(len, stride, bytes(), u8::from_le_bytes);
                if in_pairs {
                    reorder(&mut codes, Isa::e4m3_pair_order);
                    Elements::E4m3Pairs(codes)
                } else {
                    reorder(&mut codes, |index| isa.e4m3_order(index));
                    Elements::E4m3(codes)
                }
            }
        };
        Ok(Self { elements, rows, cols })
    }

    /// As `upload`, for what is never quantised: embeddings and norms.
    pub(crate) fn upload_unquantized(tensor: HostTensor<'_>) -> Result<Self, BackendError> {
        if tensor.dtype == DType::F8E4M3 {
            return Err(BackendError::Unsupported("an e4m3 embedding or norm".to_owned()));
        }
        Self::upload(&[tensor], Isa::Portable, false)
    }

    /// The same weights with no more precision than `storage` keeps.
    pub(crate) fn stored_as(self, storage: Storage) -> Self {
        let narrow = |values: &[f32]| {
            let mut narrow = Buffer::zeroed(values.len());
            for (to, from) in narrow.iter_mut().zip(values) {
                *to = bf16::from_f32(*from).to_bits();
            }
            Elements::Bf16(narrow)
        };
        let elements = match (storage, self.elements) {
            (Storage::Bf16, Elements::F32(values)) => narrow(&values),
            (Storage::Bf16, Elements::F16(values)) => {
                let wide: Vec<f32> = values.iter().map(|bits| f16::from_bits(*bits).to_f32()).collect();
                narrow(&wide)
            }
            (_, elements) => elements,
        };
        Self { elements, ..self }
    }

    /// Widens a row into `out`, which may be longer.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let range = row * self.stride()..row * self.stride() + self.cols;
        match &self.elements {
            Elements::F32(data) => out[..self.cols].copy_from_slice(&data[range]),
            Elements::Bf16(data) => widen(&data[range], out, |bits| bf16::from_bits(bits).to_f32()),
            Elements::F16(data) => widen(&data[range], out, |bits| f16::from_bits(bits).to_f32()),
            Elements::E4m3(_) | Elements::E4m3Pairs(_) => unreachable!("`upload_unquantized` refuses e4m3"),
        }
    }
}

fn fill<'a, T: crate::simd::Plain, const BYTES: usize>(
    len: usize,
    stride: usize,
    rows: impl Iterator<Item = &'a [u8]>,
    parse: impl Fn([u8; BYTES]) -> T,
) -> Buffer<T> {
    let mut buffer = Buffer::zeroed(len);
    for (to, from) in buffer.chunks_exact_mut(stride).zip(rows) {
        for (to, from) in to.iter_mut().zip(from.as_chunks::<BYTES>().0) {
            *to = parse(*from);
        }
    }
    buffer
}

fn reorder(codes: &mut [u8], order: impl Fn(usize) -> usize) {
    for block in codes.as_chunks_mut::<64>().0 {
        let natural = *block;
        for (index, code) in natural.into_iter().enumerate() {
            block[order(index)] = code;
        }
    }
}

fn widen<T: Copy>(from: &[T], out: &mut [f32], convert: impl Fn(T) -> f32) {
    for (to, from) in out.iter_mut().zip(from) {
        *to = convert(*from);
    }
}

/// Weights of one (stacked) projection, in the checkpoint's own type.
#[derive(Debug)]
pub struct Linear {
    pub(crate) matrix: Matrix,
    /// One for each output row; empty unless the weights are e4m3.
    pub(crate) scales: Vec<f32>,
    pub(crate) input: ActivationScheme,
}

impl Linear {
    pub(crate) fn upload(weights: &LinearWeights<'_>, isa: Isa, storage: Storage) -> Result<Self, BackendError> {
        let quantized = weights.input != ActivationScheme::None;
        let matrix = Matrix::upload(&weights.parts, isa, quantized && isa == Isa::Avx512Bf16)?.stored_as(storage);
        let is_fp8 = matches!(matrix.elements, Elements::E4m3(_) | Elements::E4m3Pairs(_));
        if quantized && !is_fp8 {
            return Err(BackendError::Unsupported(
                "quantised input for weights that are not e4m3".to_owned(),
            ));
        }
        if weights.scales.len() != if is_fp8 { matrix.rows } else { 0 } {
            let (scales, rows) = (weights.scales.len(), matrix.rows);
            return Err(BackendError::Unsupported(format!(
                "{scales} weight scales for {rows} output rows"
            )));
        }
        Ok(Self {
            matrix,
            scales: weights.scales.clone(),
            input: weights.input,
        })
    }
}

/// `1 + weight` of an RMS norm.
#[derive(Debug)]
pub struct Norm {
    pub(crate) factors: Vec<f32>,
}

impl Norm {
    pub(crate) fn upload(weight: HostTensor<'_>) -> Result<Self, BackendError> {
        let len = weight.shape.iter().product();
        let row = Matrix::upload_unquantized(HostTensor {
            shape: &[1, len],
            ..weight
        })?;
        let mut factors = vec![0.0; len];
        row.widen_row(0, &mut factors);
        factors.iter_mut().for_each(|factor| *factor += 1.0);
        Ok(Self { factors })
    }
}

/// The embedding table, which is the output projection too.
#[derive(Debug)]
pub struct Embedding {
    pub(crate) table: Matrix,
}

/// Keys and values of one layer, `[num_blocks, num_kv_heads, block_size, padded head_dim]` each: a head's keys of a
/// block are adjacent.
#[derive(Debug)]
pub struct KvLayer {
    pub(crate) keys: KvElements,
    pub(crate) values: KvElements,
    /// What stored elements are to be multiplied by: 1 unless they are e4m3.
    pub(crate) scales: KvScales,
    pub(crate) block_size: usize,
}

/// Keys or values as stored.
#[derive(Debug)]
pub(crate) enum KvElements {
    F32(Buffer<f32>),
    E4m3(Buffer<u8>),
}

impl KvElements {
    /// As floats, without their scale: where they are, or widened into `scratch`, which holds as many at least.
    #[inline(always)]
    pub(crate) fn widen<'a, S: Simd>(
        &'a self,
        simd: S,
        range: Range<usize>,
        scratch: &'a mut [f32],
    ) -> &'a [[f32; LANES]] {
        match self {
            Self::F32(elements) => elements[range].as_chunks().0,
            Self::E4m3(codes) => {
                let floats = &mut scratch[..range.len()];
                for (to, from) in floats.as_chunks_mut().0.iter_mut().zip(codes[range].as_chunks().0) {
                    simd.store(simd.load_e4m3_lanes(from), to);
                }
                floats.as_chunks().0
            }
        }
    }
}
