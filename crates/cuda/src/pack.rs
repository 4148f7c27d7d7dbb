//! Weights as the kernels want them: K panels of 128 bytes with swizzled chunks (`kernels/common/layout.cuh`).

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use lapidary_model::{ActivationScheme, BackendError, DType, HostTensor};

use crate::device::{Device, DevicePtr};

/// Bytes of K that a panel holds of each row.
pub(crate) const PANEL_BYTES: usize = 128;
/// Rows of a weight matrix are padded with zeros to a multiple of this: the height of a wgmma.
pub(crate) const ROW_MULTIPLE: usize = 64;

/// Elements of a packed matrix, and of the activations it is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    E4m3,
    Bf16,
}

impl Element {
    /// What the input of a layer with this scheme consists of.
    pub(crate) fn of_input(scheme: ActivationScheme) -> Self {
        match scheme {
            ActivationScheme::None => Self::Bf16,
            ActivationScheme::Fp8Static { .. } | ActivationScheme::Fp8Token => Self::E4m3,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::E4m3 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Panels that `k` elements of a row take.
    pub(crate) fn panels(self, k: usize) -> usize {
        (k * self.bytes()).div_ceil(PANEL_BYTES)
    }
}

/// A matrix in device memory: `[panels][padded_rows][128 bytes]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panels {
    pub(crate) data: DevicePtr,
    pub(crate) element: Element,
    /// Rows that mean something.
    pub(crate) rows: usize,
    pub(crate) padded_rows: usize,
    /// Elements of a row.
    pub(crate) cols: usize,
    pub(crate) panels: usize,
}

/// How the rows of parts become rows of one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Part after part.
    Stacked,
    /// Of two parts [`TURN`] rows each in turn (`kernels/common/gated.cuh`).
    InTurns,
}

/// Rows of gate, then rows of up.
const TURN: usize = 8;

impl Order {
    /// The row of the stack that becomes row `row` of `rows`.
    pub(crate) fn stacked_row(self, row: usize, rows: usize) -> usize {
        match self {
            Self::Stacked => row,
            Self::InTurns => {
                let (each, turn, inside) = (rows / 2, row / (2 * TURN), row % (2 * TURN));
                let length = TURN.min(each - turn * TURN);
                turn * TURN + inside % length + each * (inside / length)
            }
        }
    }
}

/// Makes one matrix of `parts`, all `[rows, cols]` of one type, and copies it to the device.
pub(crate) fn upload(
    device: &mut dyn Device,
    what: &'static str,
    parts: &[HostTensor<'_>],
    element: Element,
    order: Order,
) -> Result<Panels, BackendError> {
    let source = Source::new(parts, element, order)?;
    let padded_rows = source.rows.next_multiple_of(ROW_MULTIPLE);
    let panels = element.panels(source.cols);
    let bytes = panels * padded_rows * PANEL_BYTES;
    let data = device.alloc(what, bytes)?;
    let has_nan = AtomicBool::new(false);
    device.upload_with(data, bytes, PANEL_BYTES, &|offset, memory| {
        let first = offset / PANEL_BYTES;
        for (index, line) in memory.as_chunks_mut::<PANEL_BYTES>().0.iter_mut().enumerate() {
            let (panel, row) = ((first + index) / padded_rows, (first + index) % padded_rows);
            if source.fill(panel, row, line) {
                has_nan.store(true, Ordering::Relaxed);
            }
        }
    })?;
    if has_nan.into_inner() {
        return Err(BackendError::Unsupported(
            "e4m3 weights that are not numbers".to_owned(),
        ));
    }
    Ok(Panels {
        data,
        element,
        rows: source.rows,
        padded_rows,
        cols: source.cols,
        panels,
    })
}

/// Rows of a checkpoint.
struct Source<'a> {
    parts: &'a [HostTensor<'a>],
    order: Order,
    dtype: DType,
    element: Element,
    rows: usize,
    cols: usize,
}

impl<'a> Source<'a> {
    fn new(parts: &'a [HostTensor<'a>], element: Element, order: Order) -> Result<Self, BackendError> {
        let first = parts
            .first()
            .ok_or_else(|| BackendError::Unsupported("a layer without weights".to_owned()))?;
        let [_, cols] = *first.shape else {
            return Err(BackendError::Unsupported(format!("weights of shape {:?}", first.shape)));
        };
        let mut rows = 0;
        for part in parts {
            let fits = |shape: &[usize]| shape.len() == 2 && shape[1] == cols && part.dtype == first.dtype;
            if !fits(part.shape) || part.data.len() != part.shape[0] * cols * part.dtype.size_bytes() {
                let what = format!(
                    "{:?} {:?} beside {:?} {:?}",
                    part.dtype, part.shape, first.dtype, first.shape
                );
                return Err(BackendError::Unsupported(what));
            }
            rows += part.shape[0];
        }
        if order == Order::InTurns && (parts.len() != 2 || 2 * first.shape[0] != rows) {
            let shapes: Vec<_> = parts.iter().map(|part| part.shape).collect();
            return Err(BackendError::Unsupported(format!("gate and up of shapes {shapes:?}")));
        }
        if element == Element::E4m3 && first.dtype != DType::F8E4M3 {
            return Err(BackendError::Unsupported(
                "quantised input for weights that are not e4m3".to_owned(),
            ));
        }
        Ok(Self {
            parts,
            order,
            dtype: first.dtype,
            element,
            rows,
            cols,
        })
    }

    /// Writes one row's 128 bytes of one panel, and tells whether an e4m3 code in it is no number.
    fn fill(&self, panel: usize, row: usize, line: &mut [u8; PANEL_BYTES]) -> bool {
        line.fill(0);
        let Some((part, row_in_part)) = self.locate(row) else {
            return false;
        };
        let (per_panel, size) = (PANEL_BYTES / self.element.bytes(), self.dtype.size_bytes());
        let start = panel * per_panel;
        let count = per_panel.min(self.cols - start);
        let from = &part.data[(row_in_part * self.cols + start) * size..][..count * size];
        let mut natural = [0; PANEL_BYTES];
        match (self.dtype, self.element) {
            (DType::F8E4M3, Element::E4m3) | (DType::Bf16, Element::Bf16) => {
                natural[..from.len()].copy_from_slice(from)
            }
            (DType::F8E4M3, Element::Bf16) => widen(from, &mut natural, |[code]: [u8; 1]| e4m3_to_f32(code)),
            (DType::F16, _) => widen(from, &mut natural, |bytes| f16::from_le_bytes(bytes).to_f32()),
            (DType::F32, _) => widen(from, &mut natural, f32::from_le_bytes),
            (DType::Bf16, Element::E4m3) => unreachable!("`new` refuses it"),
        }
        for (chunk, bytes) in natural.as_chunks::<16>().0.iter().enumerate() {
            line[(chunk ^ (row & 7)) * 16..][..16].copy_from_slice(bytes);
        }
        self.dtype == DType::F8E4M3 && from.iter().fold(false, |nan, code| nan | (code & 0x7f == 0x7f))
    }

    /// The part that a row of the matrix comes from, and which of its rows it is; `None` for padding.
    fn locate(&self, row: usize) -> Option<(&HostTensor<'a>, usize)> {
        if row >= self.rows {
            return None;
        }
        let mut row = self.order.stacked_row(row, self.rows);
        for part in self.parts {
            if row < part.shape[0] {
                return Some((part, row));
            }
            row -= part.shape[0];
        }
        None
    }
}

/// The values of a tensor that is never quantised.
pub(crate) fn to_f32(tensor: HostTensor<'_>) -> Result<Vec<f32>, BackendError> {
    fn parse<const BYTES: usize>(data: &[u8], parse: impl Fn([u8; BYTES]) -> f32) -> Vec<f32> {
        data.as_chunks::<BYTES>().0.iter().map(|bytes| parse(*bytes)).collect()
    }
    match tensor.dtype {
        DType::F32 => Ok(parse(tensor.data, f32::from_le_bytes)),
        DType::Bf16 => Ok(parse(tensor.data, |bytes| bf16::from_le_bytes(bytes).to_f32())),
        DType::F16 => Ok(parse(tensor.data, |bytes| f16::from_le_bytes(bytes).to_f32())),
        DType::F8E4M3 => Err(BackendError::Unsupported("an e4m3 norm".to_owned())),
    }
}

/// To bf16: exact from e4m3 and bf16, rounded to nearest from fp16 and f32.
fn widen<const BYTES: usize>(from: &[u8], to: &mut [u8], parse: impl Fn([u8; BYTES]) -> f32) {
    for (to, from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from.as_chunks::<BYTES>().0) {
        *to = bf16::from_f32(parse(*from)).to_le_bytes();
    }
}

/// What an e4m3 code stands for.
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 0xf), f32::from(code & 7));
    let magnitude = match (exponent, code & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa * 2_f32.powi(-9),
        _ => (8.0 + mantissa) * 2_f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host<'a>(data: &'a [u8], dtype: DType, shape: &'a [usize]) -> HostTensor<'a> {
        HostTensor { data, dtype, shape }
    }

    /// Byte `k` of row `row`, found as the kernels find it.
    fn at(packed: &[u8], padded_rows: usize, row: usize, k: usize) -> u8 {
        let line = k / PANEL_BYTES * padded_rows + row;
        packed[line * PANEL_BYTES + ((k % PANEL_BYTES / 16) ^ (row & 7)) * 16 + k % 16]
    }

    fn pack(source: &Source<'_>, padded_rows: usize) -> Vec<u8> {
        let panels = source.element.panels(source.cols);
        let mut packed = vec![0xee; panels * padded_rows * PANEL_BYTES];
        for (index, line) in packed.as_chunks_mut::<PANEL_BYTES>().0.iter_mut().enumerate() {
            source.fill(index / padded_rows, index % padded_rows, line);
        }
        packed
    }

    #[test]
    fn stacked_rows_lie_in_panels_and_padding_is_zero() {
        let bytes: Vec<u8> = (0..5 * 200).map(|i| (i * 7 % 120) as u8).collect();
        let parts = [
            host(&bytes[..2 * 200], DType::F8E4M3, &[2, 200]),
            host(&bytes[2 * 200..], DType::F8E4M3, &[3, 200]),
        ];
        let source = Source::new(&parts, Element::E4m3, Order::Stacked).expect("parts fit");
        let packed = pack(&source, 64);
        for row in 0..64 {
            for k in 0..256 {
                let want = if row < 5 && k < 200 { bytes[row * 200 + k] } else { 0 };
                assert_eq!(at(&packed, 64, row, k), want, "row {row} byte {k}");
            }
        }
    }

    #[test]
    fn gate_and_up_take_turns_and_padding_is_zero() {
        for (each, turns) in [(16, vec![8, 8]), (12, vec![8, 4]), (3, vec![3])] {
            let gate: Vec<u8> = (0..each * 2).map(|i| i as u8 + 1).collect();
            let up: Vec<u8> = gate.iter().map(|code| code + 64).collect();
            let shape = [each, 2];
            let parts = [&gate, &up].map(|part| host(part, DType::F8E4M3, &shape));
            let source = Source::new(&parts, Element::E4m3, Order::InTurns).expect("parts fit");
            let packed = pack(&source, 64);
            let mut want = Vec::new();
            let mut first = 0;
            for turn in turns {
                for part in [&gate, &up] {
                    want.extend_from_slice(&part[2 * first..2 * (first + turn)]);
                }
                first += turn;
            }
            want.resize(2 * 64, 0);
            let got: Vec<u8> = (0..2 * 64).map(|i| at(&packed, 64, i / 2, i % 2)).collect();
            assert_eq!(got, want, "{each} rows of each");
        }
    }

    #[test]
    fn every_type_becomes_bf16_for_an_unquantised_layer() {
        let values: Vec<f32> = (0..70).map(|i| (i as f32 - 35.0) / 8.0).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        for (bytes, dtype) in [(&f32s, DType::F32), (&f16s, DType::F16), (&bf16s, DType::Bf16)] {
            let parts = [host(bytes, dtype, &[1, 70])];
            let packed = pack(
                &Source::new(&parts, Element::Bf16, Order::Stacked).expect("one part"),
                64,
            );
            for (index, want) in values.iter().enumerate() {
                let bytes = [at(&packed, 64, 0, 2 * index), at(&packed, 64, 0, 2 * index + 1)];
                assert_eq!(bf16::from_le_bytes(bytes).to_f32(), *want, "{dtype:?} {index}");
            }
        }
    }

    #[test]
    fn all_e4m3_codes_are_exact_in_bf16() {
        for code in (0..=255_u8).filter(|code| code & 0x7f != 0x7f) {
            let value = e4m3_to_f32(code);
            assert_eq!(bf16::from_f32(value).to_f32(), value);
        }
        assert_eq!(
            (e4m3_to_f32(0x7e), e4m3_to_f32(0x01), e4m3_to_f32(0xb8)),
            (448.0, 2_f32.powi(-9), -1.0)
        );
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let bytes = [0; 64];
        let wide = host(&bytes[..32], DType::F8E4M3, &[1, 32]);
        let narrow = host(&bytes[..16], DType::F8E4M3, &[1, 16]);
        assert!(Source::new(&[wide, narrow], Element::E4m3, Order::Stacked).is_err());
        assert!(Source::new(&[host(&bytes, DType::Bf16, &[1, 32])], Element::E4m3, Order::Stacked).is_err());
        assert!(
            Source::new(
                &[host(&bytes[..31], DType::F8E4M3, &[1, 32])],
                Element::E4m3,
                Order::Stacked
            )
            .is_err()
        );
        let two = host(&bytes[..32], DType::F8E4M3, &[2, 16]);
        assert!(Source::new(&[two, narrow], Element::E4m3, Order::InTurns).is_err());
        assert!(Source::new(&[two], Element::E4m3, Order::InTurns).is_err());
        assert!(Source::new(&[], Element::Bf16, Order::Stacked).is_err());
    }
}
