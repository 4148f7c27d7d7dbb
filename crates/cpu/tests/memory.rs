//! What is reserved at start is there. In a process of its own, since it looks at all of the process's memory.
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::fs;

use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_model::{AttentionConfig, Backend, KvCacheDtype, KvScales, StepLimits};

const NUM_BLOCKS: usize = 1024;
const BLOCK_SIZE: usize = 16;

/// Resident memory of this process; `None` where the system does not say.
fn resident_bytes() -> Option<u64> {
    let maps = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let kib = maps.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    Some(kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

#[test]
fn all_pages_of_the_kv_cache_are_made_when_it_is_reserved() {
    // One after the other: both look at the whole process.
    for kv_cache_dtype in [KvCacheDtype::Native, KvCacheDtype::Fp8E4m3] {
        reserve_and_look(kv_cache_dtype);
    }
}

fn reserve_and_look(kv_cache_dtype: KvCacheDtype) {
    let mut backend = Cpu::new(CpuConfig::default()).unwrap();
    let attention = AttentionConfig {
        num_heads: 4,
        num_kv_heads: 4,
        head_dim: 256,
        scale: 1.0,
        softcap: None,
        rope_theta: 10_000.0,
        kv_cache_dtype,
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
    let element_bytes = if kv_cache_dtype == KvCacheDtype::Native { 4 } else { 1 };
    assert_eq!(reserved, (NUM_BLOCKS * BLOCK_SIZE * 2 * 4 * 256 * element_bytes) as u64);
    assert!(grown >= reserved / 100 * 99, "{grown} of {reserved} bytes are there");
    assert!(grown <= reserved / 100 * 110, "{grown} instead of {reserved} bytes");
    drop(layer);
}
