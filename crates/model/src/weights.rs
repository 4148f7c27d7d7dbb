//! Named tensors in safetensors files: mapped, checked against the file's size, never copied.
//!
//! The `safetensors` crate reads and validates the headers; `header` adds to its refusals the file and the tensor.

mod header;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;

use crate::backend::{DType, HostTensor};

/// Largest `model.safetensors.index.json` read: 27b's is 40 kB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const INDEX_FILE: &str = "model.safetensors.index.json";
const SINGLE_FILE: &str = "model.safetensors";

/// All tensors of a checkpoint.
#[derive(Debug)]
pub struct Weights {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorEntry>,
}

/// A tensor as a file has it.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// safetensors' name of the element type: `BF16`, `F8_E4M3`.
    pub dtype: &'a str,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Little-endian elements.
    pub data: &'a [u8],
}

/// What is wrong with a weight file.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The system refused.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No weights in the directory.
    #[error("no model.safetensors and no model.safetensors.index.json in {}{hint}", dir.display())]
    NoWeights {
        /// Where they should be.
        dir: PathBuf,
        /// What is there instead.
        hint: &'static str,
    },
    /// The header does not fit into the file.
    #[error("{file}: truncated: a header of {header_bytes} bytes is announced, the file has {file_bytes}")]
    HeaderLength {
        /// Which file.
        file: String,
        /// As its first eight bytes say.
        header_bytes: u64,
        /// Of the whole file.
        file_bytes: u64,
    },
    /// The header is not the JSON it must be.
    #[error("{file}: the header is corrupt")]
    Header {
        /// Which file.
        file: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Fewer or more bytes than the header describes.
    #[error("{file}: {found_bytes} bytes of tensors where the header describes {expected_bytes}: incomplete download?")]
    FileSize {
        /// Which file.
        file: String,
        /// By the header.
        expected_bytes: u64,
        /// In the file.
        found_bytes: u64,
    },
    /// A tensor's bytes are not what its shape and type need.
    #[error("{file}: {tensor}: bytes {begin}..{end} do not hold its shape {shape:?} of {dtype}")]
    TensorSpan {
        /// Which file.
        file: String,
        /// Which tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// Byte past the last.
        end: u64,
        /// Dimensions.
        shape: Vec<usize>,
        /// Element type.
        dtype: String,
    },
    /// Two tensors share bytes, or bytes belong to none.
    #[error("{file}: {tensor} begins at byte {begin}, the tensor before it ends at {previous_end}")]
    Layout {
        /// Which file.
        file: String,
        /// Which tensor.
        tensor: String,
        /// First byte.
        begin: u64,
        /// Where it should begin.
        previous_end: u64,
    },
    /// One name, two tensors.
    #[error("{tensor} is both in {first} and in {second}")]
    Duplicate {
        /// Which tensor.
        tensor: String,
        /// A file.
        first: String,
        /// Another one, or the same.
        second: String,
    },
    /// The index is not the JSON it must be.
    #[error("{INDEX_FILE} is corrupt")]
    Index(#[source] serde_json::Error),
    /// The index is too large to be one.
    #[error("{INDEX_FILE} has {bytes} bytes, more than any index needs")]
    IndexTooLarge {
        /// Its size.
        bytes: u64,
    },
    /// The index names a file outside the checkpoint's directory.
    #[error("{INDEX_FILE}: {file:?} is not the name of a safetensors file in the same directory")]
    IndexPath {
        /// What it names.
        file: String,
    },
    /// The index names a shard that is not there.
    #[error("{file}, which {INDEX_FILE} names for {tensor}, is missing: incomplete download?")]
    ShardMissing {
        /// Which file.
        file: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// A shard lacks a tensor that the index promises.
    #[error("{tensor} is not in {file}, where {INDEX_FILE} has it")]
    NotInShard {
        /// Which tensor.
        tensor: String,
        /// Which file.
        file: String,
    },
}

struct Shard {
    file: String,
    bytes: ShardBytes,
}

enum ShardBytes {
    Mapped(Mmap),
    Borrowed(&'static [u8]),
    Owned(Vec<u8>),
}

#[derive(Debug)]
struct TensorEntry {
    shard: usize,
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Maps the safetensors files of a directory: those of its index, or `model.safetensors`.
    ///
    /// # Errors
    /// Files that are missing, truncated or corrupt.
    pub fn open_dir(dir: &Path) -> Result<Self, WeightsError> {
        let index_path = dir.join(INDEX_FILE);
        if index_path.is_file() {
            return Self::open_sharded(dir, &index_path);
        }
        let path = dir.join(SINGLE_FILE);
        if !path.is_file() {
            return Err(WeightsError::NoWeights {
                dir: dir.to_owned(),
                hint: hint(dir),
            });
        }
        let mut weights = Self::empty();
        weights.add_shard(SINGLE_FILE.to_owned(), ShardBytes::Mapped(map_file(&path)?))?;
        Ok(weights)
    }

    /// Reads one safetensors file that is part of the program.
    ///
    /// # Errors
    /// A truncated or corrupt file.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self, WeightsError> {
        let mut weights = Self::empty();
        weights.add_shard(SINGLE_FILE.to_owned(), ShardBytes::Borrowed(bytes))?;
        Ok(weights)
    }

    /// Reads one safetensors file that is already in memory.
    ///
    /// # Errors
    /// A truncated or corrupt file.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, WeightsError> {
        let mut weights = Self::empty();
        weights.add_shard(SINGLE_FILE.to_owned(), ShardBytes::Owned(bytes))?;
        Ok(weights)
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        self.tensors.get(name).map(|entry| self.view(entry))
    }

    /// All tensors in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, StoredTensor<'_>)> {
        self.tensors
            .iter()
            .map(|(name, entry)| (name.as_str(), self.view(entry)))
    }

    /// Tensors in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of all tensors.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.range.len() as u64).sum()
    }

    fn empty() -> Self {
        Self {
            shards: Vec::new(),
            tensors: BTreeMap::new(),
        }
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> StoredTensor<'a> {
        let data = &self.shards[entry.shard].bytes.as_slice()[entry.range.clone()];
        StoredTensor {
            dtype: &entry.dtype,
            shape: &entry.shape,
            data,
        }
    }

    fn open_sharded(dir: &Path, index_path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io {
            path: index_path.to_owned(),
            source,
        };
        let bytes = std::fs::metadata(index_path).map_err(io)?.len();
        if bytes > MAX_INDEX_BYTES {
            return Err(WeightsError::IndexTooLarge { bytes });
        }
        let index = std::fs::read(index_path).map_err(io)?;
        let index: Index = serde_json::from_slice(&index).map_err(WeightsError::Index)?;
        let mut weights = Self::empty();
        for (tensor, file) in &index.weight_map {
            let shard = match weights.shards.iter().position(|shard| shard.file == *file) {
                Some(shard) => shard,
                None => weights.open_shard(dir, file, tensor)?,
            };
            if weights.tensors.get(tensor).is_none_or(|entry| entry.shard != shard) {
                return Err(WeightsError::NotInShard {
                    tensor: tensor.clone(),
                    file: file.clone(),
                });
            }
        }
        Ok(weights)
    }

    fn open_shard(&mut self, dir: &Path, file: &str, tensor: &str) -> Result<usize, WeightsError> {
        if !is_plain_file_name(file) {
            return Err(WeightsError::IndexPath { file: file.to_owned() });
        }
        let path = dir.join(file);
        if !path.is_file() {
            return Err(WeightsError::ShardMissing {
                file: file.to_owned(),
                tensor: tensor.to_owned(),
            });
        }
        self.add_shard(file.to_owned(), ShardBytes::Mapped(map_file(&path)?))?;
        Ok(self.shards.len() - 1)
    }

    fn add_shard(&mut self, file: String, bytes: ShardBytes) -> Result<(), WeightsError> {
        let shard = self.shards.len();
        let (data_start, metadata) = header::parse(&file, bytes.as_slice())?;
        // By name, so that it is always the same tensor that is reported.
        for (tensor, info) in BTreeMap::from_iter(metadata.tensors()) {
            if let Some(other) = self.tensors.get(&tensor) {
                return Err(WeightsError::Duplicate {
                    tensor,
                    first: self.shards[other.shard].file.clone(),
                    second: file,
                });
            }
            let (begin, end) = info.data_offsets;
            let entry = TensorEntry {
                shard,
                dtype: info.dtype.to_string(),
                shape: info.shape.clone(),
                range: data_start + begin..data_start + end,
            };
            self.tensors.insert(tensor, entry);
        }
        self.shards.push(Shard { file, bytes });
        Ok(())
    }
}

impl<'a> StoredTensor<'a> {
    /// The element type, if a model's weights can have it.
    #[must_use]
    pub fn known_dtype(&self) -> Option<DType> {
        match self.dtype {
            "BF16" => Some(DType::Bf16),
            "F16" => Some(DType::F16),
            "F32" => Some(DType::F32),
            "F8_E4M3" => Some(DType::F8E4M3),
            _ => None,
        }
    }

    /// The tensor as a backend takes it.
    #[must_use]
    pub fn as_host(&self) -> Option<HostTensor<'a>> {
        self.known_dtype().map(|dtype| HostTensor {
            data: self.data,
            dtype,
            shape: self.shape,
        })
    }
}

impl ShardBytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Borrowed(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard")
            .field("file", &self.file)
            .field("bytes", &self.bytes.as_slice().len())
            .finish()
    }
}

/// One component, no directory: an index is data from the network and must not reach outside its directory.
fn is_plain_file_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let plain = matches!(components.next(), Some(Component::Normal(name)) if name == file);
    plain && components.next().is_none() && !file.contains(['\\', '\0']) && file.ends_with(".safetensors")
}

fn hint(dir: &Path) -> &'static str {
    let has = |name: &str| dir.join(name).exists();
    if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
        "; pickled weights are not read, convert them to safetensors"
    } else if std::fs::read_dir(dir).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.path().extension().is_some_and(|extension| extension == "gguf")))
    }) {
        "; GGUF is not read, use the safetensors checkpoint"
    } else {
        ""
    }
}

fn map_file(path: &Path) -> Result<Mmap, WeightsError> {
    let io = |source| WeightsError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    #[expect(
        unsafe_code,
        reason = "mapping a file is the only way to read tens of gigabytes without copying them"
    )]
    // SAFETY: the mapping is read-only, private to this process and outlives every slice of it (they borrow from the
    // `Weights` that owns it). That nobody truncates the file meanwhile cannot be enforced: checkpoints are installed
    // by rename and immutable by convention, as every server that maps them relies on; a violation is a SIGBUS.
    let map = unsafe { Mmap::map(&file) };
    map.map_err(io)
}

#[cfg(test)]
mod tests;
