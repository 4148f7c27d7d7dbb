//! The header of a safetensors file: `u64` length, then JSON that maps names to types, shapes and byte ranges.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::WeightsError;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// A tensor the header describes; `range` is of the whole file.
#[derive(Debug)]
pub(super) struct HeaderTensor {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

/// Checks that the file is exactly what its header describes: every byte belongs to one tensor.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Vec<HeaderTensor>, WeightsError> {
    let truncated = |header_bytes| WeightsError::HeaderLength {
        file: file.to_owned(),
        header_bytes,
        file_bytes: bytes.len() as u64,
    };
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or_else(|| truncated(0))?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > rest.len() as u64 {
        return Err(truncated(header_bytes));
    }
    let (json, data) = rest.split_at(header_bytes as usize);
    let RawHeader(mut raw) = serde_json::from_slice(json).map_err(|source| WeightsError::Header {
        file: file.to_owned(),
        source,
    })?;
    // The file's own order is any; bytes without an owner or with two are only seen in the order of the bytes.
    raw.sort_by_key(|(_, info)| info.data_offsets);
    check_file_size(file, &raw, data.len() as u64)?;
    let data_start = LENGTH_BYTES + header_bytes as usize;
    let mut previous_end = 0;
    let mut tensors = Vec::with_capacity(raw.len());
    for (name, info) in raw {
        let [begin, end] = info.data_offsets;
        check_span(file, &name, &info)?;
        if begin != previous_end {
            return Err(WeightsError::Layout {
                file: file.to_owned(),
                tensor: name,
                begin,
                previous_end,
            });
        }
        previous_end = end;
        let range = data_start + begin as usize..data_start + end as usize;
        tensors.push(HeaderTensor {
            name,
            dtype: info.dtype,
            shape: info.shape,
            range,
        });
    }
    Ok(tensors)
}

fn check_file_size(file: &str, raw: &[(String, RawTensor)], found_bytes: u64) -> Result<(), WeightsError> {
    let expected_bytes = raw.iter().map(|(_, info)| info.data_offsets[1]).max().unwrap_or(0);
    if expected_bytes == found_bytes {
        return Ok(());
    }
    Err(WeightsError::FileSize {
        file: file.to_owned(),
        expected_bytes,
        found_bytes,
    })
}

fn check_span(file: &str, name: &str, info: &RawTensor) -> Result<(), WeightsError> {
    let [begin, end] = info.data_offsets;
    let elements = info
        .shape
        .iter()
        .try_fold(1_u64, |product, dim| product.checked_mul(*dim as u64));
    let fits = match (end.checked_sub(begin), elements, dtype_bits(&info.dtype)) {
        (Some(bytes), Some(elements), Some(bits)) => elements.checked_mul(bits) == bytes.checked_mul(8),
        // A type this program does not know: the loader refuses it if the model needs the tensor.
        (Some(_), Some(_), None) => true,
        _ => false,
    };
    if fits {
        return Ok(());
    }
    Err(WeightsError::TensorSpan {
        file: file.to_owned(),
        tensor: name.to_owned(),
        begin,
        end,
        shape: info.shape.clone(),
        dtype: info.dtype.clone(),
    })
}

fn dtype_bits(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => Some(8),
        "BF16" | "F16" | "I16" | "U16" => Some(16),
        "F32" | "I32" | "U32" => Some(32),
        "F64" | "I64" | "U64" | "C64" => Some(64),
        _ => None,
    }
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// All entries in the file's order, duplicates included: a map would silently keep one of two.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;

        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to their types, shapes and offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader(tensors))
            }
        }

        deserializer.deserialize_map(HeaderVisitor)
    }
}
