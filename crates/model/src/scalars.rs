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

/// A float is not finite exactly when all its exponent bits are set; e4m3 has no infinity and one NaN of each sign.
fn count_in(data: &[u8], dtype: DType) -> usize {
    let half_words = |exponent: u16| {
        let words = data
            .chunks_exact(2)
            .map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        words.filter(|word| word & exponent == exponent).count()
    };
    match dtype {
        DType::F8E4M3 => data.iter().filter(|byte| **byte & 0x7f == 0x7f).count(),
        DType::Bf16 => half_words(0x7f80),
        DType::F16 => half_words(0x7c00),
        DType::F32 => {
            let words = data
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            words.filter(|word| word & 0x7f80_0000 == 0x7f80_0000).count()
        }
    }
}
