//! Reading and scanning stored elements: the bit patterns of the checkpoint's number formats.

use half::{bf16, f16};

use crate::backend::{DType, HostTensor};

/// Bytes a scanning thread takes at a time: large enough to hide the thread, small enough to balance.
const SCAN_CHUNK_BYTES: usize = 8 << 20;
/// Threads that scan at once; more do not read a disk or a page cache faster.
const MAX_SCAN_THREADS: usize = 8;

/// All elements as f32, of the types a scale can have.
pub(crate) fn read_scalars(tensor: HostTensor<'_>) -> Option<Vec<f32>> {
    let pairs = || tensor.data.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
    match tensor.dtype {
        DType::F32 => Some(
            tensor
                .data
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
        ),
        DType::Bf16 => Some(pairs().map(|bytes| bf16::from_le_bytes(bytes).to_f32()).collect()),
        DType::F16 => Some(pairs().map(|bytes| f16::from_le_bytes(bytes).to_f32()).collect()),
        DType::F8E4M3 => None,
    }
}

/// How many elements are NaN or infinite. Reads every byte, so it also brings a mapped tensor into memory.
pub(crate) fn count_not_finite(tensor: HostTensor<'_>) -> usize {
    let chunks: Vec<&[u8]> = tensor.data.chunks(SCAN_CHUNK_BYTES).collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(MAX_SCAN_THREADS).min(chunks.len());
    if threads <= 1 {
        return count_in(tensor.data, tensor.dtype);
    }
    std::thread::scope(|scope| {
        let scanners: Vec<_> = (0..threads)
            .map(|first| {
                let chunks = &chunks;
                scope.spawn(move || {
                    chunks
                        .iter()
                        .skip(first)
                        .step_by(threads)
                        .map(|chunk| count_in(chunk, tensor.dtype))
                        .sum::<usize>()
                })
            })
            .collect();
        scanners
            .into_iter()
            .map(|scanner| scanner.join().expect("counting cannot panic"))
            .sum()
    })
}

/// Bytes looked at before the first fault is counted: the test of a whole block runs on wide vectors, the count does not.
const BLOCK_BYTES: usize = 4096;

/// A float is not finite exactly when all its exponent bits are set; e4m3 has no infinity and one NaN of each sign.
fn count_in(data: &[u8], dtype: DType) -> usize {
    let blocks = data.chunks(BLOCK_BYTES);
    match dtype {
        DType::F8E4M3 => blocks
            .map(|block| count_matching(block, |[byte]| byte & 0x7f == 0x7f))
            .sum(),
        DType::Bf16 => blocks
            .map(|block| count_matching(block, |bytes| all_set(bytes, 0x7f80)))
            .sum(),
        DType::F16 => blocks
            .map(|block| count_matching(block, |bytes| all_set(bytes, 0x7c00)))
            .sum(),
        DType::F32 => {
            let exponent = 0x7f80_0000;
            blocks
                .map(|block| count_matching(block, |bytes| u32::from_le_bytes(bytes) & exponent == exponent))
                .sum()
        }
    }
}

fn all_set(bytes: [u8; 2], bits: u16) -> bool {
    u16::from_le_bytes(bytes) & bits == bits
}

fn count_matching<const SIZE: usize>(block: &[u8], matches: impl Fn([u8; SIZE]) -> bool) -> usize {
    let (elements, _) = block.as_chunks::<SIZE>();
    if elements.iter().fold(false, |any, element| any | matches(*element)) {
        elements.iter().filter(|element| matches(**element)).count()
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_finite_are_counted_wherever_they_are() {
        let cases: [(DType, &[u8], &[u8]); 4] = [
            (DType::F8E4M3, &[0x7e], &[0xff]),
            (DType::Bf16, &[0x7f, 0x7f], &[0x80, 0xff]),
            (DType::F16, &[0xff, 0x7b], &[0x00, 0x7c]),
            (DType::F32, &[0xff, 0xff, 0x7f, 0x7f], &[0, 0, 0xc0, 0x7f]),
        ];
        for (dtype, finite, not_finite) in cases {
            let elements = (SCAN_CHUNK_BYTES * 2 + 12) / finite.len();
            let mut data = finite.repeat(elements);
            let count = |data: &[u8]| {
                count_not_finite(HostTensor {
                    data,
                    dtype,
                    shape: &[elements],
                })
            };
            assert_eq!(count(&data), 0, "{dtype:?}");
            for place in [0, 1, elements / 2, elements - 1] {
                data[place * finite.len()..][..finite.len()].copy_from_slice(not_finite);
            }
            assert_eq!(count(&data), 4, "{dtype:?}");
        }
    }
}
