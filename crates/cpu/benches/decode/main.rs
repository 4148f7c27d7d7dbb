//! Decode and prefill speed, next to what the memory of this machine allows.
//!
//! ```text
//! cargo bench -p lapidary-cpu --bench decode            # everything; needs 8 GiB
//! cargo bench -p lapidary-cpu --bench decode -- demo    # only the parts whose names contain "demo"
//! ```
//!
//! With `quiet` among the names, one thread computes and its CPU time is taken instead of the clock's: what a busy machine
//! still tells about compute-bound operations.
//!
//! Parts: `bandwidth`, `demo` (the size of the bundled model), `2b` (random weights in the shape of Gemma-2 2b, AutoFP8
//! static), `ops` (single operations), `attention` (over either kind of KV cache). Every figure is the best of several
//! runs: whatever else runs on the machine only ever adds time.

#![expect(clippy::print_stdout, reason = "the figures are the output")]

mod ops;
mod random;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_engine::{Batch, BlockId, Executor, RequestId, SampleRow, SamplingParams};
use lapidary_model::{KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};

use random::Shape;

/// Larger than any cache: the last level of some servers holds 480 MiB.
const BANDWIDTH_BYTES: usize = 3 << 30;

const BLOCK_SIZE: u32 = 16;

/// Tokens in the cache when decoding starts.
const CONTEXT: u32 = 128;

const DEMO: Shape = Shape {
    layers: 6,
    hidden: 256,
    inner: 768,
    heads: 4,
    kv_heads: 2,
    head_dim: 128,
    vocab: 4096,
};
const GEMMA_2B: Shape = Shape {
    layers: 26,
    hidden: 2304,
    inner: 9216,
    heads: 8,
    kv_heads: 4,
    head_dim: 256,
    vocab: 256_000,
};

fn main() {
    // cargo passes `--bench`.
    let wanted: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted: Vec<_> = match wanted.iter().position(|name| name == "quiet") {
        Some(index) => {
            CPU_TIME.store(true, Ordering::Relaxed);
            [&wanted[..index], &wanted[index + 1..]].concat()
        }
        None => wanted,
    };
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|name| part.contains(name.as_str()));
    let mut config = CpuConfig::default();
    if CPU_TIME.load(Ordering::Relaxed) {
        config.threads = 1;
    }
    println!("{} threads, {:?}", config.threads, config.isa);
    if wants("ops") {
        ops::run(config);
    }
    if wants("attention") {
        ops::run_attention(config);
    }
    if wants("demo") {
        run_model("demo", DEMO, config, &[1, 8, 64], None);
    }
    let bandwidth = (wants("bandwidth") || wants("2b")).then(|| {
        let gb_per_s = read_bandwidth(config.threads);
        println!(
            "read bandwidth {gb_per_s:.1} GB/s ({} threads, {} GiB)",
            config.threads,
            BANDWIDTH_BYTES >> 30
        );
        gb_per_s
    });
    if wants("2b") {
        run_model("2b fp8", GEMMA_2B, config, &[1, 8], bandwidth);
    }
}

/// Whether CPU time of this thread is measured.
static CPU_TIME: AtomicBool = AtomicBool::new(false);

/// Seconds the fastest of `runs` took; of CPU time, which the system counts in milliseconds, the mean of as many
/// as make it exact.
fn best_of(runs: usize, mut run: impl FnMut()) -> f64 {
    if CPU_TIME.load(Ordering::Relaxed) {
        let (start, mut count) = (now(), 0);
        while count == 0 || now() - start < 0.2 {
            run();
            count += 1;
        }
        return (now() - start) / f64::from(count as u32);
    }
    let time = |_| {
        let start = now();
        run();
        now() - start
    };
    (0..runs).map(time).fold(f64::INFINITY, f64::min)
}

fn now() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    if CPU_TIME.load(Ordering::Relaxed) {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("this is Linux");
        let nanoseconds = stat.split(' ').next().and_then(|field| field.parse::<f64>().ok());
        return nanoseconds.expect("the first field is CPU time") / 1e9;
    }
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

fn read_bandwidth(threads: usize) -> f64 {
    let data: Vec<u64> = (0..BANDWIDTH_BYTES as u64 / 8).collect();
    let part = data.len() / threads;
    let seconds = best_of(7, || {
        let mut parts = data.chunks_exact(part);
        let own = parts.next().unwrap_or_default();
        std::thread::scope(|scope| {
            for part in parts {
                scope.spawn(|| black_box(xor_all(part)));
            }
            black_box(xor_all(own));
        });
    });
    BANDWIDTH_BYTES as f64 / seconds / 1e9
}

fn xor_all(part: &[u64]) -> u64 {
    let mut lanes = [0; 32];
    for block in part.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane ^= word;
        }
    }
    lanes.into_iter().fold(0, |all, lane| all ^ lane)
}

fn run_model(name: &str, shape: Shape, config: CpuConfig, batch_sizes: &[u32], bandwidth: Option<f64>) {
    let max_seqs = batch_sizes.iter().copied().max().unwrap_or(1);
    let mut runner = load(shape, config, max_seqs);
    let prefill = best_of(3, || step(&mut runner, &prompt(shape, 512)));
    println!("{name}: prefill of 512 tokens {:.0} tok/s", 512.0 / prefill);
    for num_seqs in batch_sizes.iter().copied() {
        for seq in 0..num_seqs {
            step(&mut runner, &fill_cache(shape, seq));
        }
        let mut position = CONTEXT;
        let seconds = best_of(24, || {
            step(&mut runner, &decode(num_seqs, position));
            position += 1;
        });
        let bytes = (shape.weight_bytes() + num_seqs as usize * shape.kv_bytes(CONTEXT as usize)) as f64;
        let rate = bytes / seconds / 1e9;
        print!(
            "{name}: {num_seqs:3} sequences {:8.1} tok/s, {:.3} ms a step",
            f64::from(num_seqs) / seconds,
            seconds * 1e3
        );
        print!(", {:.0} MB read, {rate:.1} GB/s", bytes / 1e6);
        println!(
            "{}",
            bandwidth.map_or(String::new(), |peak| format!(
                ", {:.0} % of the bandwidth",
                100.0 * rate / peak
            ))
        );
    }
}

fn load(shape: Shape, config: CpuConfig, max_seqs: u32) -> ModelRunner<Cpu> {
    let start = Instant::now();
    let checkpoint = random::checkpoint(shape);
    let made = start.elapsed().as_secs_f64();
    let limits = RunnerConfig {
        max_num_batched_tokens: 512,
        max_num_seqs: max_seqs as usize,
        max_model_len: Some(1024),
        block_size: BLOCK_SIZE,
        kv_cache: KvCacheSize::Blocks((max_seqs * blocks_per_seq()).max(64)),
        kv_cache_dtype: KvCacheDtype::Native,
    };
    let backend = Cpu::new(config).expect("the default configuration fits the machine");
    let runner = ModelRunner::load(backend, &checkpoint, limits, &mut |_| ()).expect("the checkpoint is whole");
    println!(
        "made {:.1} GB in {made:.1} s, loaded in {:.1} s",
        shape.weight_bytes() as f64 / 1e9,
        start.elapsed().as_secs_f64() - made
    );
    runner
}

fn step(runner: &mut ModelRunner<Cpu>, batch: &Batch) {
    runner.launch(batch).expect("the batch keeps the limits");
    black_box(runner.collect().expect("the CPU does not fail"));
}

/// Room for the context and what is decoded.
fn blocks_per_seq() -> u32 {
    (CONTEXT + 128).div_ceil(BLOCK_SIZE)
}

fn prompt(shape: Shape, len: u32) -> Batch {
    sequence_batch((0..len).map(|i| i * 37 % shape.vocab as u32).collect(), 0)
}

fn fill_cache(shape: Shape, seq: u32) -> Batch {
    sequence_batch(
        (0..CONTEXT).map(|i| (i * 41 + seq) % shape.vocab as u32).collect(),
        seq * blocks_per_seq(),
    )
}

/// One sequence from its start, the last token sampled.
fn sequence_batch(token_ids: Vec<u32>, first_block: u32) -> Batch {
    let len = token_ids.len() as u32;
    let blocks = first_block..first_block + len.div_ceil(BLOCK_SIZE);
    Batch {
        request_ids: vec![RequestId(0)],
        token_ids,
        positions: (0..len).collect(),
        slot_mapping: (first_block * BLOCK_SIZE..).take(len as usize).collect(),
        query_start: vec![0, len],
        context_lens: vec![len],
        block_start: vec![0, blocks.len() as u32],
        block_ids: blocks.map(BlockId).collect(),
        samples: vec![greedy(len - 1, len)],
        ..Batch::default()
    }
}

/// One more token of each sequence.
fn decode(num_seqs: u32, position: u32) -> Batch {
    let blocks = position / BLOCK_SIZE + 1;
    let first_block = |seq: u32| seq * blocks_per_seq();
    Batch {
        request_ids: (0..num_seqs).map(|seq| RequestId(seq.into())).collect(),
        token_ids: (0..num_seqs).map(|seq| 100 + seq + position).collect(),
        positions: vec![position; num_seqs as usize],
        slot_mapping: (0..num_seqs)
            .map(|seq| first_block(seq) * BLOCK_SIZE + position)
            .collect(),
        query_start: (0..=num_seqs).collect(),
        context_lens: vec![position + 1; num_seqs as usize],
        block_start: (0..=num_seqs).map(|seq| seq * blocks).collect(),
        block_ids: (0..num_seqs)
            .flat_map(|seq| (first_block(seq)..).take(blocks as usize).map(BlockId))
            .collect(),
        samples: (0..num_seqs).map(|seq| greedy(seq, position + 1)).collect(),
        ..Batch::default()
    }
}

fn greedy(row: u32, position: u32) -> SampleRow {
    let params = Arc::new(SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    });
    SampleRow {
        row,
        position,
        given: None,
        params,
        banned: None,
        mask: None,
        history: None,
    }
}
