//! What a step costs on the host. Bounds: 50 us to schedule and update 256 decoding sequences, 100 us to match a prefix
//! of 8k tokens. `cargo bench -p lapidary-engine`

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use lapidary_engine::{
    KvCacheConfig, KvCacheManager, Request, RequestId, SampledToken, SamplingParams, Scheduler, SchedulerConfig,
    SequenceOutput, StopCriteria, TokenId,
};

const NUM_SEQS: u32 = 256;
const BLOCK_SIZE: u32 = 16;

/// Keeps `NUM_SEQS` sequences decoding: whoever ends is followed by another of the same kind.
struct Load {
    scheduler: Scheduler,
    outputs: Vec<SequenceOutput>,
    num_prompt_tokens: u32,
    next_id: u64,
}

impl Load {
    fn new(num_prompt_tokens: u32, max_steps_in_flight: usize) -> Self {
        let config = SchedulerConfig {
            max_num_batched_tokens: 8192,
            max_num_seqs: NUM_SEQS,
            enable_prefix_caching: true,
            max_steps_in_flight,
        };
        let num_blocks = NUM_SEQS * (num_prompt_tokens + 2048).div_ceil(BLOCK_SIZE);
        let scheduler = Scheduler::new(
            config,
            KvCacheConfig {
                num_blocks,
                block_size: BLOCK_SIZE,
            },
        );
        let mut load = Self {
            scheduler,
            outputs: Vec::new(),
            num_prompt_tokens,
            next_id: 0,
        };
        (0..NUM_SEQS).for_each(|_| load.add());
        // Past all prefills.
        for _ in 0..NUM_SEQS * num_prompt_tokens / 8192 + 100 {
            load.step();
        }
        load
    }

    fn add(&mut self) {
        let id = self.next_id;
        self.next_id += 1;
        let prompt: Arc<[TokenId]> = (0..self.num_prompt_tokens)
            .map(|n| n.wrapping_mul(id as u32 + 1))
            .collect();
        let request = Request {
            prompt,
            sampling: Arc::new(SamplingParams::default()),
            // Spread, so that ends and prefills come one at a time.
            stop: StopCriteria {
                max_tokens: 1500 + id as u32 * 37 % 500,
                min_tokens: 0,
                stop_token_ids: Arc::from([1, 106, 107]),
            },
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            deadline: None,
            constraint: None,
            queue_deadline: None,
        };
        self.scheduler.add(RequestId(id), request);
    }

    fn step(&mut self) {
        black_box(self.scheduler.schedule());
        let sampled = vec![
            SampledToken {
                token: 7,
                logprobs: None
            };
            self.scheduler.num_samples()
        ];
        self.scheduler.update(sampled, &mut self.outputs);
        let num_ended = self.outputs.iter().filter(|output| output.finish.is_some()).count();
        self.outputs.clear();
        (0..num_ended).for_each(|_| self.add());
    }
}

fn step(criterion: &mut Criterion) {
    for num_prompt_tokens in [128, 1024, 4096] {
        let mut load = Load::new(num_prompt_tokens, 1);
        criterion.bench_function(&format!("schedule_and_update/256x{num_prompt_tokens}"), |bencher| {
            bencher.iter(|| load.step());
        });
    }
}

fn prefix(criterion: &mut Criterion) {
    let tokens: Vec<TokenId> = (0..8192).collect();
    let mut kv = KvCacheManager::new(
        KvCacheConfig {
            num_blocks: 8192,
            block_size: BLOCK_SIZE,
        },
        true,
    );
    let mut hashes = kv.hashes(0);
    kv.extend_hashes(&mut hashes, &tokens);
    let mut table = kv.match_prefix(&tokens, 0, &hashes);
    kv.grow(&mut table, tokens.len()).expect("room for one prompt");
    kv.publish(&mut table, &tokens, &hashes, tokens.len());
    kv.release(table);
    criterion.bench_function("hash_and_match_prefix/8192", |bencher| {
        bencher.iter(|| {
            let mut hashes = kv.hashes(0);
            kv.extend_hashes(&mut hashes, &tokens);
            let table = kv.match_prefix(&tokens, 0, &hashes);
            assert_eq!(table.blocks().len(), 511, "all but the block of the last token");
            kv.release(table);
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30);
    targets = step, prefix
}
criterion_main!(benches);
