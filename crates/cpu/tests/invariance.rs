//! A sequence's tokens and log-probabilities are the same to the last bit whatever it shares a step with, however its
//! prompt is cut, wherever its blocks lie, whether they were computed for it or for another, and on however many
//! threads.
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use std::sync::Arc;

use lapidary_cpu::{Cpu, CpuConfig, Isa};
use lapidary_engine::{
    Batch, BlockId, Executor, FedToken, RequestId, SampleRow, SampledToken, SamplingParams, TokenHistory,
};
use lapidary_model::testing::{TinyModel, TinyWeights};
use lapidary_model::{KvCacheDtype, KvCacheSize, KvScales, ModelRunner, RunnerConfig};
use proptest::prelude::*;

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 64;
const MAX_TOKENS: usize = 48;
const NUM_SEQUENCES: usize = 5;
const NUM_GENERATED: usize = 8;
/// Of `TinyModel`: all log-probabilities are compared.
const VOCAB: u32 = 160;

const WEIGHTS: [TinyWeights; 7] = [
    TinyWeights::Dense("BF16"),
    TinyWeights::Dense("F16"),
    TinyWeights::Dense("F32"),
    TinyWeights::AutoFp8Static,
    TinyWeights::AutoFp8Dynamic,
    TinyWeights::CompressedChannel,
    TinyWeights::CompressedWeightOnly,
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_gives_the_bits_of_each_sequence_alone(
        weights in prop::sample::select(WEIGHTS.to_vec()),
        kv_cache_dtype in prop::sample::select(vec![KvCacheDtype::Native, KvCacheDtype::Fp8E4m3]),
        seed in any::<u64>(),
    ) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let requests = requests(&mut Random(seed));
            let runner = |threads| runner(weights, kv_cache_dtype, isa, threads);
            let alone = alone(&mut runner(1), &requests);
            for threads in 1..=3 {
                let schedule = Random(seed ^ threads as u64);
                let together = Scheduler::new(&requests, schedule).run(&mut runner(threads));
                for (together, alone) in together.iter().zip(&alone) {
                    prop_assert_eq!(together, alone, "{:?} over {:?} on {} threads of {:?}", weights, kv_cache_dtype, threads, isa);
                }
            }
        }
    }
}

struct Request {
    prompt: Arc<[u32]>,
    params: Arc<SamplingParams>,
}

/// Some share their first blocks; some are greedy, some are drawn, some are penalised.
fn requests(random: &mut Random) -> Vec<Request> {
    let shared: Vec<u32> = (0..2 * BLOCK_SIZE + 8)
        .map(|_| random.below(VOCAB as usize) as u32)
        .collect();
    let request = |index: usize| {
        let own: Vec<_> = (0..1 + random.below(60))
            .map(|_| random.below(VOCAB as usize) as u32)
            .collect();
        let prefix = if index < 3 { &shared[..] } else { &[] };
        let params = SamplingParams {
            temperature: if index.is_multiple_of(2) { 0.0 } else { 1.0 },
            top_p: if index == 1 { 0.9 } else { 1.0 },
            presence_penalty: if index == 3 { 0.5 } else { 0.0 },
            seed: random.next(),
            logprobs: Some(VOCAB),
            ..SamplingParams::default()
        };
        Request {
            prompt: prefix.iter().copied().chain(own).collect(),
            params: Arc::new(params),
        }
    };
    (0..NUM_SEQUENCES).map(request).collect()
}

fn runner(weights: TinyWeights, kv_cache_dtype: KvCacheDtype, isa: Isa, threads: usize) -> ModelRunner<Cpu> {
    let backend = Cpu::new(CpuConfig {
        threads,
        isa,
        ..CpuConfig::default()
    })
    .unwrap();
    let config = RunnerConfig {
        max_num_batched_tokens: 256,
        max_num_seqs: NUM_SEQUENCES,
        max_model_len: Some(256),
        block_size: BLOCK_SIZE as u32,
        kv_cache: KvCacheSize::Blocks(NUM_BLOCKS as u32),
        kv_cache_dtype,
    };
    let mut model = TinyModel::new(weights);
    model.add_kv_scales(KvScales {
        key: 0.0021,
        value: 0.0034,
    });
    let checkpoint = model.checkpoint().unwrap();
    ModelRunner::load(backend, &checkpoint, config, &mut |_| ()).unwrap()
}

/// Each request by itself: its prompt in one step, its blocks in order.
fn alone(runner: &mut ModelRunner<Cpu>, requests: &[Request]) -> Vec<Vec<SampledToken>> {
    let generate = |request| {
        let mut sequence = Sequence::new(request, (0..NUM_BLOCKS as u32).collect());
        while !sequence.is_done() {
            let mut step = Step::default();
            step.add(0, &mut sequence, usize::MAX, None);
            sequence.sampled.extend(step.run(runner));
        }
        sequence.sampled
    };
    requests.iter().map(generate).collect()
}

struct Sequence<'a> {
    request: &'a Request,
    blocks: Vec<u32>,
    num_computed: usize,
    sampled: Vec<SampledToken>,
}

impl<'a> Sequence<'a> {
    fn new(request: &'a Request, blocks: Vec<u32>) -> Self {
        Self {
            request,
            blocks,
            num_computed: 0,
            sampled: Vec::new(),
        }
    }

    fn is_done(&self) -> bool {
        self.sampled.len() == NUM_GENERATED
    }

    fn tokens(&self) -> Vec<u32> {
        self.request
            .prompt
            .iter()
            .copied()
            .chain(self.sampled.iter().map(|sampled| sampled.token))
            .collect()
    }
}

/// Random steps: which sequences run, how many of their tokens, on which blocks, and which start anew.
struct Scheduler<'a> {
    sequences: Vec<Sequence<'a>>,
    random: Random,
    /// Samples of the step before: whose they are.
    last: Vec<usize>,
}

impl<'a> Scheduler<'a> {
    fn new(requests: &'a [Request], mut random: Random) -> Self {
        let mut blocks: Vec<u32> = (0..NUM_BLOCKS as u32).collect();
        for index in (1..blocks.len()).rev() {
            blocks.swap(index, random.below(index + 1));
        }
        let mut blocks = blocks.chunks(NUM_BLOCKS / NUM_SEQUENCES);
        let sequences = requests
            .iter()
            .map(|request| Sequence::new(request, blocks.next().unwrap().to_vec()))
            .collect();
        Self {
            sequences,
            random,
            last: Vec::new(),
        }
    }

    fn run(mut self, runner: &mut ModelRunner<Cpu>) -> Vec<Vec<SampledToken>> {
        while self.sequences.iter().any(|sequence| !sequence.is_done()) {
            self.step(runner);
        }
        self.sequences.into_iter().map(|sequence| sequence.sampled).collect()
    }

    fn step(&mut self, runner: &mut ModelRunner<Cpu>) {
        if self.random.below(12) == 0 {
            // Preempted: all of it is computed again, outputs included.
            let index = self.random.below(NUM_SEQUENCES);
            self.sequences[index].num_computed = 0;
        }
        self.share_prefix();
        let first = self.random.below(NUM_SEQUENCES);
        let mut step = Step::default();
        let mut budget = 1 + self.random.below(MAX_TOKENS);
        for index in (first..NUM_SEQUENCES).chain(0..first) {
            let sequence = &mut self.sequences[index];
            if sequence.is_done() || budget == 0 || self.random.below(4) == 0 {
                continue;
            }
            let fed = self
                .last
                .iter()
                .position(|last| *last == index)
                .filter(|_| self.random.below(2) == 0);
            budget -= step.add(index, sequence, 1 + self.random.below(budget), fed);
        }
        if step.batch.token_ids.is_empty() {
            return;
        }
        let owners = std::mem::take(&mut step.owners);
        for (owner, sampled) in owners.iter().zip(step.run(runner)) {
            self.sequences[*owner].sampled.push(sampled);
        }
        self.last = owners;
    }

    /// A prefix cache hit: a sequence that has computed nothing takes another's full blocks of the prefix they share.
    fn share_prefix(&mut self) {
        let shares = |sequence: &Sequence<'_>, len: usize| sequence.num_computed >= len;
        let from = (0..3).find(|index| shares(&self.sequences[*index], 2 * BLOCK_SIZE));
        let to = (0..3).find(|index| self.sequences[*index].num_computed == 0);
        if let (Some(from), Some(to)) = (from, to)
            && self.random.below(2) == 0
        {
            let shared = self.sequences[from].blocks[..2].to_vec();
            let sequence = &mut self.sequences[to];
            sequence.blocks[..2].copy_from_slice(&shared);
            sequence.num_computed = 2 * BLOCK_SIZE;
        }
    }
}

#[derive(Default)]
struct Step {
    batch: Batch,
    /// Whose sample each is.
    owners: Vec<usize>,
}

impl Step {
    /// Adds up to `limit` tokens of a sequence, and says how many. `fed` is the sample of the step before that its last
    /// token is taken from.
    fn add(&mut self, owner: usize, sequence: &mut Sequence<'_>, limit: usize, fed: Option<usize>) -> usize {
        let batch = &mut self.batch;
        if batch.query_start.is_empty() {
            (batch.query_start, batch.block_start) = (vec![0], vec![0]);
        }
        let tokens = sequence.tokens();
        let range = sequence.num_computed..tokens.len().min(sequence.num_computed.saturating_add(limit));
        batch.request_ids.push(RequestId(owner as u64));
        for position in range.clone() {
            let block = sequence.blocks[position / BLOCK_SIZE] as usize;
            batch.token_ids.push(tokens[position]);
            batch.positions.push(position as u32);
            batch
                .slot_mapping
                .push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
        }
        batch.query_start.push(batch.token_ids.len() as u32);
        batch.context_lens.push(range.end as u32);
        batch.block_ids.extend(
            sequence.blocks[..range.end.div_ceil(BLOCK_SIZE)]
                .iter()
                .map(|block| BlockId(*block)),
        );
        batch.block_start.push(batch.block_ids.len() as u32);
        sequence.num_computed = range.end;
        if range.end == tokens.len() {
            self.add_sample(owner, sequence, fed);
        }
        range.len()
    }

    fn add_sample(&mut self, owner: usize, sequence: &Sequence<'_>, fed: Option<usize>) {
        let batch = &mut self.batch;
        let row = batch.token_ids.len() - 1;
        let mut output: Vec<u32> = sequence.sampled.iter().map(|sampled| sampled.token).collect();
        if let Some(prev_sample) = fed {
            batch.token_ids[row] = 0;
            batch.fed.push(FedToken {
                row: row as u32,
                prev_sample: prev_sample as u32,
            });
            output.pop();
        }
        let params = Arc::clone(&sequence.request.params);
        let prompt = Arc::clone(&sequence.request.prompt);
        let history = params.needs_history().then_some(TokenHistory { prompt, output });
        let position = sequence.num_computed as u32;
        batch.samples.push(SampleRow {
            row: row as u32,
            position,
            given: None,
            params,
            banned: None,
            mask: None,
            history,
        });
        self.owners.push(owner);
    }

    fn run(self, runner: &mut ModelRunner<Cpu>) -> Vec<SampledToken> {
        runner.launch(&self.batch).unwrap();
        runner.collect().unwrap()
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
