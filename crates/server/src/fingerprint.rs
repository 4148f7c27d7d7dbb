//! One short name for everything that decides what an answer is, besides the request.

use lapidary_model::{Checkpoint, CheckpointError, KvCacheDtype};
use ring::digest::{Context, SHA256};

/// Bytes hashed at the beginning and in the middle of each tensor. Whole files would take seconds to minutes; a
/// fine-tuned copy differs from its base nearly everywhere.
const SAMPLE_BYTES: usize = 4096;

/// Names build, checkpoint, KV cache and backend: equal fingerprints and seeds give equal answers.
///
/// # Errors
/// A file of the checkpoint cannot be read.
pub(crate) fn fingerprint(
    checkpoint: &Checkpoint,
    query_pre_attn_scalar: Option<f32>,
    kv_cache_dtype: KvCacheDtype,
    backend: &str,
) -> Result<String, CheckpointError> {
    let mut hash = Context::new(&SHA256);
    let mut add = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(backend.as_bytes());
    add(kv_cache_dtype.to_string().as_bytes());
    add(&query_pre_attn_scalar.map_or([0; 4], f32::to_le_bytes));
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        add(&checkpoint.file(name)?.unwrap_or_default());
    }
    let mut tensors: Vec<_> = checkpoint.weights().iter().collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    for (name, tensor) in tensors {
        add(name.as_bytes());
        add(tensor.dtype.as_bytes());
        add(format!("{:?}", tensor.shape).as_bytes());
        let middle = tensor.data.len() / 2;
        for start in [0, middle] {
            add(&tensor.data[start..tensor.data.len().min(start + SAMPLE_BYTES)]);
        }
    }
    let hex: String = hash.finish().as_ref()[..6]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!("fp_{hex}"))
}
