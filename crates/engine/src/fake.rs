//! An executor without a model, for tests: its "KV cache" remembers what was written where, so that every mistake about
//! blocks, positions or order changes the tokens that come out.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::constraint::allows_only;
use crate::{
    Allowed, Batch, BlockId, ConstraintError, Executor, ExecutorError, KvCacheConfig, Request, RequestId, SampleRow,
    SampledToken, SamplingParams, StopCriteria, TokenConstraint, TokenId, TokenLogprobs, TokenMask,
};

/// What a [`ScriptedExecutor`] is and does. Attempts to launch are counted from 0.
#[derive(Debug)]
pub struct ScriptedConfig {
    /// Its KV cache.
    pub kv_cache: KvCacheConfig,
    /// Tokens are below this.
    pub vocab_size: u32,
    /// 1 or 2.
    pub max_steps_in_flight: usize,
    /// Attempts whose `launch` fails.
    pub failing_launches: BTreeSet<u64>,
    /// Attempts whose `collect` fails.
    pub failing_collects: BTreeSet<u64>,
    /// The attempt at which the device is lost.
    pub device_lost_at: Option<u64>,
    /// The attempt at which `launch` panics.
    pub panic_at: Option<u64>,
    /// Chooses tokens in place of the KV cache's content.
    pub script: Option<Script>,
    /// Where present, each launch waits for a message; all pass once the sender is gone.
    pub gate: Option<mpsc::Receiver<()>>,
    /// From a step's launch (or the end of the one before) to its collection.
    pub step_time: Duration,
    /// Tokens depend on the last token and its position alone, and batches are not checked: for load tests.
    pub is_cheap: bool,
}

impl Default for ScriptedConfig {
    fn default() -> Self {
        Self {
            kv_cache: KvCacheConfig {
                num_blocks: 64,
                block_size: 4,
            },
            vocab_size: 1000,
            max_steps_in_flight: 1,
            failing_launches: BTreeSet::new(),
            failing_collects: BTreeSet::new(),
            device_lost_at: None,
            panic_at: None,
            script: None,
            gate: None,
            step_time: Duration::ZERO,
            is_cheap: false,
        }
    }
}

/// A rule for tokens; `None` leaves the choice to the executor.
#[derive(Clone)]
pub struct Script(Arc<ScriptFn>);

type ScriptFn = dyn Fn(ScriptRow) -> Option<TokenId> + Send + Sync;

/// What a [`Script`] chooses by.
#[derive(Debug, Clone, Copy)]
pub struct ScriptRow {
    /// Whose token.
    pub request_id: RequestId,
    /// The token before.
    pub input: TokenId,
    /// Position the chosen token will take.
    pub position: u32,
}

impl Script {
    /// Chooses tokens by this function.
    pub fn new(choose: impl Fn(ScriptRow) -> Option<TokenId> + Send + Sync + 'static) -> Self {
        Self(Arc::new(choose))
    }
}

impl std::fmt::Debug for Script {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Script")
    }
}

/// Why a [`ScriptedExecutor`] failed: it was told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("failure was asked for at attempt {attempt}")]
pub struct ScriptedFailure {
    /// Launches tried before.
    pub attempt: u64,
}

/// A deterministic [`Executor`] without a model.
///
/// Each slot of its KV cache keeps a hash of the token and position written there and of the slot before, as the KV of a
/// transformer depends on all tokens so far; a sampled token is a hash of all slots the block table reaches.
#[derive(Debug)]
pub struct ScriptedExecutor {
    config: ScriptedConfig,
    slots: Vec<u64>,
    num_attempts: u64,
    in_flight: VecDeque<StepInFlight>,
    /// What the last launched step sampled.
    last_sampled: Vec<FakeSample>,
    last_end: Option<Instant>,
}

#[derive(Debug, Clone)]
struct FakeSample {
    id: RequestId,
    token: TokenId,
    /// It was chosen by.
    mask: Option<TokenMask>,
    /// Of a given token.
    score: Option<f32>,
}

#[derive(Debug)]
struct StepInFlight {
    result: Result<Vec<SampledToken>, ExecutorError>,
    /// Blocks it writes, and for whom.
    writes: Vec<(BlockId, RequestId)>,
    ends_at: Option<Instant>,
}

impl ScriptedExecutor {
    /// An executor with an empty cache.
    #[must_use]
    pub fn new(config: ScriptedConfig) -> Self {
        let num_slots = config.kv_cache.num_blocks as usize * config.kv_cache.block_size as usize;
        Self {
            config,
            slots: vec![0; num_slots],
            num_attempts: 0,
            in_flight: VecDeque::new(),
            last_sampled: Vec::new(),
            last_end: None,
        }
    }

    /// The tokens that a checked executor of this vocabulary gives `request` when nothing fails, worked out without
    /// blocks, batches or steps.
    #[must_use]
    pub fn expected_tokens(vocab_size: u32, request: &Request) -> Vec<TokenId> {
        let mut tokens = request.prompt.to_vec();
        let (mut content, mut reached) = (ROOT, ROOT);
        let mut num_hashed = 0;
        let mut constraint = request.constraint.clone();
        if request.stop.max_tokens == 0 {
            return Vec::new();
        }
        loop {
            for (position, &token) in tokens.iter().enumerate().skip(num_hashed) {
                content = slot_content(content, token, position as u32);
                reached = mix(reached, content);
            }
            num_hashed = tokens.len();
            let num_generated = tokens.len() - request.prompt.len();
            let allowed = constraint.as_mut().map_or(Allowed::Anything, |constraint| {
                constraint
                    .allowed_tokens()
                    .expect("constraints that are compared do not fail")
            });
            let mask = allowed.mask();
            let stop_token_ids = &*request.stop.stop_token_ids;
            let must_stop = mask.is_some_and(|mask| allows_only(mask, stop_token_ids));
            let is_banned = num_generated < request.stop.min_tokens as usize && !must_stop;
            let limits = Choice {
                banned: if is_banned { stop_token_ids } else { &[] },
                mask: mask.map(|mask| &**mask),
            };
            if request.sampling.needs_history() {
                reached = tokens.iter().fold(reached, |hash, &token| mix(hash, u64::from(token)));
            }
            let token = choose(reached, request.sampling.seed, tokens.len() as u32, vocab_size, limits);
            if matches!(allowed, Allowed::Anything) {
                constraint = None;
            }
            if let Some(constraint) = &mut constraint {
                constraint
                    .advance(token)
                    .expect("constraints that are compared do not fail");
            }
            if request.sampling.needs_history() {
                // History is no part of the cache.
                (content, reached, num_hashed) = (ROOT, ROOT, 0);
            }
            tokens.push(token);
            let is_last = num_generated + 1 == request.stop.max_tokens as usize;
            if is_last || request.stop.stop_token_ids.contains(&token) {
                return tokens.split_off(request.prompt.len());
            }
        }
    }

    /// The log-probabilities that a checked executor gives the tokens of `prompt` from the second on.
    #[must_use]
    pub fn expected_scores(prompt: &[TokenId]) -> Vec<f32> {
        let (mut content, mut reached) = (ROOT, ROOT);
        let pairs = prompt.windows(2).enumerate();
        let scores = pairs.map(|(position, pair)| {
            content = slot_content(content, pair[0], position as u32);
            reached = mix(reached, content);
            score(reached, pair[1])
        });
        scores.collect()
    }

    fn run(&mut self, batch: &Batch) -> Vec<FakeSample> {
        let mut tokens = batch.token_ids.clone();
        for fed in &batch.fed {
            tokens[fed.row as usize] = self.last_sampled[fed.prev_sample as usize].token;
        }
        let mut samples = batch.samples.iter().peekable();
        let mut sampled = Vec::with_capacity(batch.samples.len());
        for index in 0..batch.num_seqs() {
            let rows = batch.query_start[index] as usize..batch.query_start[index + 1] as usize;
            let blocks = &batch.block_ids[batch.block_start[index] as usize..batch.block_start[index + 1] as usize];
            for row in rows.clone() {
                let position = batch.positions[row];
                let before = position
                    .checked_sub(1)
                    .map_or(ROOT, |before| self.slots[self.slot(blocks, before)]);
                self.slots[batch.slot_mapping[row] as usize] = slot_content(before, tokens[row], position);
            }
            while let Some(sample) = samples.next_if(|sample| rows.contains(&(sample.row as usize))) {
                let id = batch.request_ids[index];
                let input = tokens[sample.row as usize];
                let is_fed = batch
                    .fed
                    .iter()
                    .any(|fed| !self.config.is_cheap && fed.row == sample.row);
                sampled.push(match sample.given {
                    Some(token) => FakeSample {
                        id,
                        token,
                        mask: None,
                        score: Some(score(self.reached(blocks, sample, input), token)),
                    },
                    None => FakeSample {
                        id,
                        token: self.sample(id, blocks, sample, input, is_fed),
                        mask: sample.mask.clone(),
                        score: None,
                    },
                });
            }
        }
        sampled
    }

    fn sample(&self, id: RequestId, blocks: &[BlockId], sample: &SampleRow, input: TokenId, is_fed: bool) -> TokenId {
        let row = ScriptRow {
            request_id: id,
            input,
            position: sample.position,
        };
        if let Some(token) = self.config.script.as_ref().and_then(|script| script.0(row)) {
            return token;
        }
        let limits = Choice {
            banned: sample.banned.as_deref().unwrap_or_default(),
            mask: sample.mask.as_deref(),
        };
        let mut reached = self.reached(blocks, sample, input);
        if let Some(history) = &sample.history {
            let fed = is_fed.then_some(input);
            let tokens = history.prompt.iter().chain(&history.output).copied().chain(fed);
            reached = tokens.fold(reached, |hash, token| mix(hash, u64::from(token)));
        }
        choose(
            reached,
            sample.params.seed,
            sample.position,
            self.config.vocab_size,
            limits,
        )
    }

    /// A hash of all that a row can see.
    fn reached(&self, blocks: &[BlockId], sample: &SampleRow, input: TokenId) -> u64 {
        if self.config.is_cheap {
            return mix(u64::from(input), u64::from(sample.position));
        }
        (0..sample.position).fold(ROOT, |hash, position| {
            mix(hash, self.slots[self.slot(blocks, position)])
        })
    }

    fn slot(&self, blocks: &[BlockId], position: u32) -> usize {
        let block_size = self.config.kv_cache.block_size;
        (blocks[(position / block_size) as usize].0 * block_size + position % block_size) as usize
    }

    /// Blocks the batch writes.
    ///
    /// # Panics
    /// When the batch contradicts itself, or somebody reads or writes a block that another one writes in this step or
    /// in one that is not collected.
    fn check(&self, batch: &Batch) -> Vec<(BlockId, RequestId)> {
        let mut writes = Vec::new();
        assert_eq!(batch.positions.len(), batch.num_tokens());
        assert_eq!(batch.slot_mapping.len(), batch.num_tokens());
        assert_eq!(batch.query_start.len(), batch.num_seqs() + 1);
        assert_eq!(batch.query_start.last().copied(), Some(batch.num_tokens() as u32));
        assert_eq!(batch.block_start.last().copied(), Some(batch.block_ids.len() as u32));
        for (index, &id) in batch.request_ids.iter().enumerate() {
            let rows = batch.query_start[index] as usize..batch.query_start[index + 1] as usize;
            let blocks = &batch.block_ids[batch.block_start[index] as usize..batch.block_start[index + 1] as usize];
            assert!(!rows.is_empty(), "a sequence without tokens");
            assert!(!batch.request_ids[..index].contains(&id), "a sequence twice in a step");
            assert_eq!(batch.positions[rows.end - 1] + 1, batch.context_lens[index]);
            assert_eq!(
                blocks.len(),
                batch.context_lens[index].div_ceil(self.config.kv_cache.block_size) as usize
            );
            for row in rows.clone() {
                let position = batch.positions[row];
                assert_eq!(position - batch.positions[rows.start], (row - rows.start) as u32);
                assert_eq!(batch.slot_mapping[row] as usize, self.slot(blocks, position));
                writes.push((blocks[(position / self.config.kv_cache.block_size) as usize], id));
            }
        }
        writes.dedup();
        for (index, &id) in batch.request_ids.iter().enumerate() {
            let blocks = &batch.block_ids[batch.block_start[index] as usize..batch.block_start[index + 1] as usize];
            let in_flight = self.in_flight.iter().flat_map(|step| &step.writes);
            for (block, writer) in in_flight.chain(&writes) {
                assert!(
                    *writer == id || !blocks.contains(block),
                    "block {} is written by another",
                    block.0
                );
            }
        }
        for sample in &batch.samples {
            assert!(
                sample.given.is_some() || batch.query_start[1..].contains(&(sample.row + 1)),
                "a token chosen by a row that is not a sequence's last"
            );
            assert_eq!(sample.position, batch.positions[sample.row as usize] + 1);
            if let Some(mask) = &sample.mask
                && let Some(fed) = batch.fed.iter().find(|fed| fed.row == sample.row)
            {
                let before = self.last_sampled[fed.prev_sample as usize].mask.as_ref();
                let is_fixed = before.is_some_and(|before| Arc::ptr_eq(before, mask));
                assert!(is_fixed, "a mask of its own for what follows a token that was not read");
            }
        }
        for fed in &batch.fed {
            let index = batch.query_start.partition_point(|&start| start <= fed.row) - 1;
            let source = &self.last_sampled[fed.prev_sample as usize];
            assert_eq!(source.id, batch.request_ids[index], "fed by another");
            assert!(source.score.is_none(), "fed by a token that was given");
        }
        writes
    }

    /// Leaves garbage where the step would have written.
    fn poison(&mut self, batch: &Batch) {
        for &slot in &batch.slot_mapping {
            self.slots[slot as usize] = mix(self.num_attempts, u64::from(slot));
        }
    }
}

impl Executor for ScriptedExecutor {
    fn kv_cache_config(&self) -> KvCacheConfig {
        self.config.kv_cache
    }

    fn max_steps_in_flight(&self) -> usize {
        self.config.max_steps_in_flight
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), ExecutorError> {
        if self.config.gate.as_ref().is_some_and(|gate| gate.recv().is_err()) {
            self.config.gate = None;
        }
        let attempt = self.num_attempts;
        self.num_attempts += 1;
        assert_ne!(self.config.panic_at, Some(attempt), "panic was asked for");
        assert!(
            self.in_flight.len() < self.config.max_steps_in_flight,
            "too many steps in flight"
        );
        let writes = if self.config.is_cheap {
            Vec::new()
        } else {
            self.check(batch)
        };
        if self.config.device_lost_at == Some(attempt) {
            return Err(ExecutorError::DeviceLost(ScriptedFailure { attempt }.into()));
        }
        if self.config.failing_launches.contains(&attempt) {
            self.poison(batch);
            return Err(ExecutorError::Step(ScriptedFailure { attempt }.into()));
        }
        let sampled = self.run(batch);
        let result = if self.config.failing_collects.contains(&attempt) {
            self.poison(batch);
            Err(ExecutorError::Step(ScriptedFailure { attempt }.into()))
        } else {
            let token = |(row, sample): (&SampleRow, &FakeSample)| SampledToken {
                token: sample.token,
                logprobs: logprobs(row, sample),
            };
            Ok(batch.samples.iter().zip(&sampled).map(token).collect())
        };
        self.last_sampled = sampled;
        let ends_at = (!self.config.step_time.is_zero()).then(|| {
            let now = Instant::now();
            self.last_end.map_or(now, |end| end.max(now)) + self.config.step_time
        });
        self.last_end = ends_at;
        self.in_flight.push_back(StepInFlight {
            result,
            writes,
            ends_at,
        });
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError> {
        let step = self.in_flight.pop_front().expect("a step is in flight");
        if let Some(ends_at) = step.ends_at {
            std::thread::sleep(ends_at.saturating_duration_since(Instant::now()));
        }
        step.result
    }
}

impl Request {
    /// A greedy request for tests, without stop tokens.
    #[must_use]
    pub fn for_test(prompt: impl Into<Arc<[TokenId]>>, max_tokens: u32) -> Self {
        Self {
            prompt: prompt.into(),
            sampling: Arc::new(SamplingParams {
                temperature: 0.0,
                ..SamplingParams::default()
            }),
            stop: StopCriteria {
                max_tokens,
                min_tokens: 0,
                stop_token_ids: Arc::from([]),
            },
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            deadline: None,
            constraint: None,
            queue_deadline: None,
        }
    }
}

const ROOT: u64 = 0x243f_6a88_85a3_08d3;

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x9e37_79b9_7f4a_7c15) * u128::from(b ^ 0xd1b5_4a32_d192_ed03);
    (product as u64) ^ ((product >> 64) as u64)
}

fn slot_content(before: u64, token: TokenId, position: u32) -> u64 {
    mix(before, u64::from(token) << 32 | u64::from(position))
}

/// What may be chosen.
#[derive(Debug, Clone, Copy)]
struct Choice<'a> {
    banned: &'a [TokenId],
    mask: Option<&'a [u32]>,
}

impl Choice<'_> {
    fn allows(&self, token: TokenId) -> bool {
        let is_masked = |mask: &[u32]| mask[token as usize / 32] >> (token % 32) & 1 == 0;
        !self.banned.contains(&token) && !self.mask.is_some_and(is_masked)
    }
}

fn choose(reached: u64, seed: u64, position: u32, vocab_size: u32, limits: Choice<'_>) -> TokenId {
    let first = (mix(mix(reached, seed), u64::from(position)) % u64::from(vocab_size)) as u32;
    (0..vocab_size)
        .map(|offset| (first + offset) % vocab_size)
        .find(|token| limits.allows(*token))
        .expect("some token is allowed")
}

/// A [`TokenConstraint`] whose masks depend on every token before: a token that is missed, seen twice or seen by another
/// sequence's constraint changes the tokens that come out.
#[derive(Debug, Clone)]
pub struct ScriptedConstraint {
    vocab_size: u32,
    /// One token in so many is allowed.
    sparsity: u64,
    /// After so many tokens only `stop` is allowed.
    length: usize,
    stop: TokenId,
    /// Fails once so many tokens were taken in.
    fails_after: Option<usize>,
    /// Allows anything once so many tokens were taken in.
    free_after: Option<usize>,
    /// Allows the same tokens for ever once so many tokens were taken in.
    fixed_after: Option<usize>,
    /// Each mask takes this long.
    delay: Duration,
    /// Each mask takes a message first.
    gate: Option<Arc<Mutex<mpsc::Receiver<()>>>>,
    state: u64,
    num_tokens: usize,
}

impl ScriptedConstraint {
    /// Allows a third of the tokens each time, and after `length` tokens nothing but `stop`.
    #[must_use]
    pub fn new(vocab_size: u32, length: usize, stop: TokenId) -> Self {
        Self {
            vocab_size,
            sparsity: 3,
            length,
            stop,
            fails_after: None,
            free_after: None,
            fixed_after: None,
            delay: Duration::ZERO,
            gate: None,
            state: ROOT,
            num_tokens: 0,
        }
    }

    /// Fails once `num_tokens` tokens were taken in.
    #[must_use]
    pub fn failing_after(self, num_tokens: usize) -> Self {
        Self {
            fails_after: Some(num_tokens),
            ..self
        }
    }

    /// Allows anything once `num_tokens` tokens were taken in.
    #[must_use]
    pub fn free_after(self, num_tokens: usize) -> Self {
        Self {
            free_after: Some(num_tokens),
            ..self
        }
    }

    /// Allows the same tokens for ever, `stop` among them, once `num_tokens` tokens were taken in.
    #[must_use]
    pub fn fixed_after(self, num_tokens: usize) -> Self {
        Self {
            fixed_after: Some(num_tokens),
            ..self
        }
    }

    /// Takes this long for each mask.
    #[must_use]
    pub fn with_delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Masks wait for a message each, those of its forks too; all are computed once the sender is dropped.
    #[must_use]
    pub fn gated(self) -> (Self, mpsc::Sender<()>) {
        let (sender, gate) = mpsc::channel();
        let gate = Some(Arc::new(Mutex::new(gate)));
        (Self { gate, ..self }, sender)
    }

    fn is_fixed(&self) -> bool {
        self.fixed_after.is_some_and(|limit| self.num_tokens >= limit)
    }

    fn allows(&self, token: TokenId) -> bool {
        if self.is_fixed() {
            return mix(ROOT, u64::from(token)).is_multiple_of(self.sparsity) || token == self.stop;
        }
        if self.num_tokens >= self.length {
            return token == self.stop;
        }
        let is_chosen = mix(self.state, u64::from(token)).is_multiple_of(self.sparsity);
        // One token at least is always allowed.
        is_chosen || u64::from(token) == self.state % u64::from(self.vocab_size)
    }
}

impl TokenConstraint for ScriptedConstraint {
    fn advance(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        assert!(self.allows(token), "token {token} was not allowed");
        self.state = mix(self.state, u64::from(token));
        self.num_tokens += 1;
        Ok(())
    }

    fn allowed_tokens(&mut self) -> Result<Allowed, ConstraintError> {
        std::thread::sleep(self.delay);
        if let Some(gate) = &self.gate {
            // An error says that the gate is gone, and that all may pass.
            let _ = gate.lock().unwrap_or_else(PoisonError::into_inner).recv();
        }
        if self.free_after.is_some_and(|limit| self.num_tokens >= limit) {
            return Ok(Allowed::Anything);
        }
        if self.fails_after.is_some_and(|limit| self.num_tokens >= limit) {
            let attempt = self.num_tokens as u64;
            return Err(ConstraintError::Failed(ScriptedFailure { attempt }.into()));
        }
        let mut mask = vec![0_u32; self.vocab_size.div_ceil(32) as usize];
        for token in (0..self.vocab_size).filter(|token| self.allows(*token)) {
            mask[token as usize / 32] |= 1 << (token % 32);
        }
        match self.is_fixed() {
            true => Ok(Allowed::Always(mask.into())),
            false => Ok(Allowed::Next(mask.into())),
        }
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        Box::new(self.clone())
    }
}

/// In `-8..=-1`; seven digits write it exactly.
fn score(reached: u64, token: TokenId) -> f32 {
    -1.0 - (mix(reached, u64::from(token)) % 449) as f32 / 64.0
}

fn logprobs(row: &SampleRow, sample: &FakeSample) -> Option<Box<TokenLogprobs>> {
    let num_top = row.params.logprobs?;
    let top = (0..num_top)
        .map(|rank| (sample.token + rank, -0.5 - rank as f32))
        .collect();
    Some(Box::new(TokenLogprobs {
        logprob: sample.score.unwrap_or(-0.5),
        rank: 1,
        top,
    }))
}
