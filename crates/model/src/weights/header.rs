//! The header of a safetensors file: read by the `safetensors` crate, its refusals given the tensor they are about.

use std::collections::HashSet;
use std::fmt;

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::WeightsError;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Checks that the file is exactly what its header describes: every byte belongs to one tensor.
///
/// Returns the header, and the place in the file that its offsets are counted from.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<(usize, Metadata), WeightsError> {
    let (json, data) = split(file, bytes)?;
    let Entries(entries) = serde_json::from_slice(json).map_err(|source| WeightsError::Header {
        file: file.to_owned(),
        source,
    })?;
    check_names(file, &entries)?;
    // Also keeps the crate from adding up sizes that overflow.
    check_file_size(file, &entries, data.len())?;
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| named(file, entries, error))?;
    Ok((bytes.len() - data.len(), metadata))
}

/// The header's JSON and the bytes of the tensors.
fn split<'a>(file: &str, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), WeightsError> {
    let truncated = |header_bytes| WeightsError::HeaderLength {
        file: file.to_owned(),
        header_bytes,
        file_bytes: bytes.len() as u64,
    };
    let (length, rest) = bytes.split_first_chunk().ok_or_else(|| truncated(0))?;
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > rest.len() as u64 {
        return Err(truncated(header_bytes));
    }
    Ok(rest.split_at(header_bytes as usize))
}

/// The crate silently keeps one of two tensors of the same name.
fn check_names(file: &str, entries: &[(String, TensorInfo)]) -> Result<(), WeightsError> {
    let mut names = HashSet::with_capacity(entries.len());
    match entries.iter().find(|(name, _)| !names.insert(name)) {
        None => Ok(()),
        Some((tensor, _)) => Err(WeightsError::Duplicate {
            tensor: tensor.clone(),
            first: file.to_owned(),
            second: file.to_owned(),
        }),
    }
}

fn check_file_size(file: &str, entries: &[(String, TensorInfo)], found: usize) -> Result<(), WeightsError> {
    let expected = entries.iter().map(|(_, info)| info.data_offsets.1).max().unwrap_or(0);
    if expected == found {
        return Ok(());
    }
    Err(WeightsError::FileSize {
        file: file.to_owned(),
        expected_bytes: expected as u64,
        found_bytes: found as u64,
    })
}

/// The crate's refusal, with the first tensor in the order of the bytes that it is true of.
fn named(file: &str, mut entries: Vec<(String, TensorInfo)>, error: SafeTensorError) -> WeightsError {
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let file = file.to_owned();
    let mut previous_end = 0;
    for (tensor, info) in entries {
        let (begin, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        if !holds_its_shape(&info) {
            return WeightsError::TensorSpan {
                file,
                tensor,
                begin,
                end,
                dtype: info.dtype.to_string(),
                shape: info.shape,
            };
        }
        if begin != previous_end {
            return WeightsError::Layout {
                file,
                tensor,
                begin,
                previous_end,
            };
        }
        previous_end = end;
    }
    let source = match error {
        SafeTensorError::InvalidHeaderDeserialization(source) => source,
        other => serde_json::Error::custom(other),
    };
    WeightsError::Header { file, source }
}

/// Whether the crate would take the tensor if it were the only one.
fn holds_its_shape(info: &TensorInfo) -> bool {
    let (begin, end) = info.data_offsets;
    end.checked_sub(begin).is_some_and(|bytes| {
        let alone = TensorInfo {
            data_offsets: (0, bytes),
            ..info.clone()
        };
        Metadata::new(None, vec![(String::new(), alone)]).is_ok()
    })
}

/// All entries in the file's order, duplicates included.
struct Entries(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to their types, shapes and offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                let info = map
                    .next_value()
                    .map_err(|error| A::Error::custom(format_args!("{name}: {error}")))?;
                entries.push((name, info));
            }
        }
        Ok(Entries(entries))
    }
}
