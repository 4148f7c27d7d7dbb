//! What is reserved at start is there. In a process of its own, since it looks at all of the process's memory.

use std::fs;

use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_model::{AttentionConfig, Backend, KvCacheDtype, KvScales, StepLimits};

const NUM_BLOCKS: usize = 256;
const BLOCK_SIZE: usize = 16;

/// Resident memory of this process; `None` where the system does not say.
fn resident_bytes() -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let kib = maps.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    Some(kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[test]
fn all_pages_of_the_kv_cache_are_made_when_it_is_reserved() {
    let mut backend = Cpu::new(CpuConfig::default()).unwrap();
    let attention = AttentionConfig {
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 256,
        scale: 1.0,
        softcap: None,
        rope_theta: 10_000.0,
        kv_cache_dtype: KvCacheDtype::Native,
    };
    let limits = StepLimits {
        max_tokens: 16,
        max_seqs: 4,
        max_model_len: 64,
    };
    backend.prepare(limits, attention).unwrap();
    let Some(before) = resident_bytes() else { return };
    let layer = backend
        .alloc_kv_layer(NUM_BLOCKS, BLOCK_SIZE, KvScales::default())
        .unwrap();
    let grown = resident_bytes().unwrap().saturating_sub(before);
    let reserved = NUM_BLOCKS as u64 * backend.kv_block_bytes(BLOCK_SIZE);
    assert!(grown >= reserved / 100 * 99, "{grown} of {reserved} bytes are there");
    drop(layer);
}
