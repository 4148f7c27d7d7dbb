//! Whatever comes in whatever order: blocks are neither leaked nor shared with a writer, limits hold, everyone ends, and
//! everyone gets the tokens it would have got alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::{Scheduler, SchedulerConfig};
use crate::{
    Executor, KvCacheConfig, MaskJob, Request, RequestId, SamplingParams, ScriptedConfig, ScriptedConstraint,
    ScriptedExecutor, StopCriteria, TokenConstraint, TokenId,
};

/// Small, so that stop tokens are hit and prompts share prefixes.
const VOCAB_SIZE: u32 = 11;

#[derive(Debug, Clone)]
enum Action {
    Add(Box<Request>),
    /// Aborts one of those alive.
    Abort(usize),
    Launch,
    Collect,
}

#[derive(Debug, Clone, Copy)]
struct Setup {
    kv_cache: KvCacheConfig,
    config: SchedulerConfig,
    narrow_hashes: bool,
}

/// Drives a scheduler and an executor as the engine does, and checks after each move.
struct Rig {
    scheduler: Scheduler,
    executor: ScriptedExecutor,
    setup: Setup,
    alive: BTreeMap<RequestId, Request>,
    tokens: BTreeMap<RequestId, Vec<TokenId>>,
    scores: BTreeMap<RequestId, Vec<(TokenId, f32)>>,
    finished: Vec<(Request, Vec<TokenId>)>,
    num_failed: usize,
    next_id: u64,
    /// Masks that are not computed yet.
    mask_jobs: Vec<MaskJob>,
}

impl Rig {
    fn new(setup: Setup, script: ScriptedConfig) -> Self {
        let mut scheduler = Scheduler::new(setup.config, setup.kv_cache);
        if setup.narrow_hashes {
            scheduler.kv.narrow_hashes();
        }
        let executor = ScriptedExecutor::new(ScriptedConfig {
            kv_cache: setup.kv_cache,
            vocab_size: VOCAB_SIZE,
            max_steps_in_flight: setup.config.max_steps_in_flight,
            ..script
        });
        Self {
            scheduler,
            executor,
            setup,
            alive: BTreeMap::new(),
            tokens: BTreeMap::new(),
            scores: BTreeMap::new(),
            finished: Vec::new(),
            num_failed: 0,
            next_id: 0,
            mask_jobs: Vec::new(),
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Add(request) => self.add(*request),
            Action::Abort(nth) => {
                let Some(&id) = self.alive.keys().nth(nth % self.alive.len().max(1)) else {
                    return;
                };
                self.alive.remove(&id);
                assert!(self.scheduler.abort(id));
            }
            Action::Launch => {
                self.launch();
            }
            Action::Collect => self.collect(),
        }
        self.check();
    }

    fn add(&mut self, request: Request) {
        let num_tokens = request.prompt.len() + request.stop.max_tokens as usize;
        if num_tokens > (self.setup.kv_cache.num_blocks * self.setup.kv_cache.block_size) as usize {
            return;
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.scheduler.add(id, request.clone());
        self.alive.insert(id, request);
    }

    fn launch(&mut self) -> bool {
        if self.scheduler.num_steps_in_flight() == self.setup.config.max_steps_in_flight {
            self.collect();
        }
        self.compute_masks();
        let Some(batch) = self.scheduler.schedule() else {
            return false;
        };
        assert!(batch.num_tokens() <= self.setup.config.max_num_batched_tokens as usize);
        assert!(batch.num_seqs() <= self.setup.config.max_num_seqs as usize);
        assert!(batch.samples.len() <= self.setup.config.max_num_seqs as usize);
        for (id, &context_len) in batch.request_ids.iter().zip(&batch.context_lens) {
            let request = &self.alive[id];
            let wanted = request.prompt.len() as u32 + request.stop.max_tokens - 1;
            assert!(context_len <= wanted, "computes what nobody wants");
        }
        let launched = self.executor.launch(batch);
        if launched.is_err() {
            let mut failed = Vec::new();
            self.scheduler.launch_failed(&mut failed);
            self.fail(&failed);
            while self.scheduler.num_steps_in_flight() > 0 {
                self.collect();
            }
        }
        true
    }

    /// Computes a mask now and then, so that sequences wait for some.
    fn compute_masks(&mut self) {
        self.mask_jobs.extend(self.scheduler.take_mask_jobs());
        let num_left = self.mask_jobs.len() / 3;
        for job in self.mask_jobs.split_off(num_left) {
            let id = job.id;
            let (constraint, allowed) = job.run().unwrap();
            self.scheduler.set_mask(id, constraint, allowed);
        }
    }

    fn collect(&mut self) {
        if self.scheduler.num_steps_in_flight() == 0 {
            return;
        }
        let Ok(sampled) = self.executor.collect() else {
            let mut failed = Vec::new();
            self.scheduler.step_failed(&mut failed);
            return self.fail(&failed);
        };
        let mut outputs = Vec::new();
        self.scheduler.update(sampled, &mut outputs);
        for output in outputs {
            assert!(self.alive.contains_key(&output.id), "a token for somebody who is gone");
            let tokens = self.tokens.entry(output.id).or_default();
            let scores = self.scores.entry(output.id).or_default();
            if output.is_prompt {
                assert!(tokens.is_empty(), "the prompt comes first");
                let logprobs = output.sampled.logprobs.expect("that is what the row is for");
                scores.push((output.sampled.token, logprobs.logprob));
            } else {
                tokens.push(output.sampled.token);
            }
            if output.finish.is_some() {
                let (tokens, scores) = (std::mem::take(tokens), std::mem::take(scores));
                let request = self.alive.remove(&output.id).unwrap();
                check_scores(&request, &scores);
                assert_eq!(
                    tokens,
                    ScriptedExecutor::expected_tokens(VOCAB_SIZE, &request),
                    "{:?}",
                    output.id
                );
                self.finished.push((request, tokens));
            }
        }
    }

    fn fail(&mut self, failed: &[RequestId]) {
        for id in failed {
            assert!(self.alive.remove(id).is_some());
            self.num_failed += 1;
        }
    }

    fn check(&self) {
        let held = self
            .scheduler
            .sequences
            .iter()
            .flatten()
            .map(|sequence| &sequence.table);
        let deferred = self.scheduler.in_flight.iter().flat_map(|step| &step.deferred);
        self.scheduler.kv.check(held.chain(deferred));
        assert_eq!(self.scheduler.indices.len(), self.alive.len());
        assert_eq!(
            self.scheduler.running.len() + self.scheduler.waiting.len(),
            self.alive.len()
        );
        let ranks = self
            .scheduler
            .running
            .iter()
            .map(|&index| self.scheduler.sequence(index).rank);
        assert!(ranks.is_sorted(), "running sequences are kept in order");
        for index in self.scheduler.waiting.values() {
            assert!(
                self.scheduler.sequence(*index).table.blocks().is_empty(),
                "waiting sequences hold no blocks"
            );
        }
        let has_run = |index: &&usize| self.scheduler.sequence(**index).has_started;
        assert_eq!(
            self.scheduler.num_preempted,
            self.scheduler.waiting.values().filter(has_run).count() as u64
        );
    }

    /// Steps until nobody is left, in a bounded number of steps.
    fn finish(&mut self) {
        let mut num_steps = 0;
        while !self.alive.is_empty() {
            let launched = self.launch();
            self.check();
            if !launched {
                let is_stuck =
                    self.scheduler.num_steps_in_flight() == 0 && self.mask_jobs.is_empty() && !self.alive.is_empty();
                assert!(!is_stuck, "stuck: {:?}", self.scheduler.waiting);
                self.collect();
                self.check();
            }
            num_steps += 1;
            assert!(num_steps < 20_000, "someone starves");
        }
        while self.scheduler.num_steps_in_flight() > 0 {
            self.collect();
        }
        self.check();
        assert_eq!(
            self.scheduler.kv.num_free_blocks(),
            self.setup.kv_cache.num_blocks as usize,
            "blocks leaked"
        );
    }
}

/// Each prompt token but the first has been scored once, in order, from all that is before it.
fn check_scores(request: &Request, scores: &[(TokenId, f32)]) {
    let expected = ScriptedExecutor::expected_scores(&request.prompt);
    let expected = request.prompt.iter().skip(1).copied().zip(expected);
    let expected: Vec<_> = expected.take(request.num_scores()).collect();
    assert_eq!(scores, expected);
}

fn requests() -> impl Strategy<Value = Request> {
    let shared = prop_oneof![Just(vec![1; 9]), Just(vec![2, 3, 2, 3, 2, 3, 2, 3]), Just(Vec::new())];
    let sampling = (
        0..3_u64,
        prop::bool::weighted(0.2),
        prop::option::weighted(
            0.4,
            (0..20_usize, prop::option::weighted(0.5, (0..8_usize, any::<bool>()))),
        ),
    );
    (
        shared,
        prop::collection::vec(0..VOCAB_SIZE, 1..12),
        0..24_u32,
        0..6_u32,
        sampling,
        0..2_i32,
        0..2_u128,
        prop::option::weighted(0.3, 0..3_u32),
    )
        .prop_map(
            |(
                mut prompt,
                rest,
                max_tokens,
                min_tokens,
                (seed, has_penalty, form),
                priority,
                cache_salt,
                prompt_logprobs,
            )| {
                prompt.extend(rest);
                let is_scored = prompt_logprobs.is_some() && prompt.len() > 1;
                let max_tokens = if is_scored { max_tokens } else { max_tokens.max(1) };
                let presence_penalty = if has_penalty { 0.5 } else { 0.0 };
                Request {
                    sampling: Arc::new(SamplingParams {
                        seed,
                        presence_penalty,
                        ..SamplingParams::default()
                    }),
                    stop: StopCriteria {
                        max_tokens,
                        min_tokens,
                        stop_token_ids: Arc::from([3]),
                    },
                    prompt_logprobs,
                    priority,
                    cache_salt,
                    constraint: form.map(|(length, settled_after)| {
                        let form = ScriptedConstraint::new(VOCAB_SIZE, length, 3);
                        match settled_after {
                            None => form.fork(),
                            Some((num_tokens, true)) => form.free_after(num_tokens).fork(),
                            Some((num_tokens, false)) => form.fixed_after(num_tokens).fork(),
                        }
                    }),
                    ..Request::for_test(prompt, max_tokens)
                }
            },
        )
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        4 => requests().prop_map(|request| Action::Add(Box::new(request))),
        1 => any::<usize>().prop_map(Action::Abort),
        8 => Just(Action::Launch),
        3 => Just(Action::Collect),
    ];
    prop::collection::vec(action, 1..80)
}

fn setups() -> impl Strategy<Value = Setup> {
    (
        10..24_u32,
        1..5_u32,
        1..40_u32,
        1..9_u32,
        any::<bool>(),
        1..=2_usize,
        any::<bool>(),
    )
        .prop_map(
            |(
                num_blocks,
                block_size,
                budget,
                max_num_seqs,
                enable_prefix_caching,
                max_steps_in_flight,
                narrow_hashes,
            )| Setup {
                kv_cache: KvCacheConfig { num_blocks, block_size },
                config: SchedulerConfig {
                    max_num_batched_tokens: budget,
                    max_num_seqs,
                    enable_prefix_caching,
                    max_steps_in_flight,
                },
                narrow_hashes,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4 * ProptestConfig::default().cases, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everyone_gets_the_tokens_it_would_get_alone(setup in setups(), actions in actions()) {
        let mut rig = Rig::new(setup, ScriptedConfig::default());
        for action in actions {
            rig.act(action);
        }
        rig.finish();
        prop_assert_eq!(rig.num_failed, 0);
    }

    #[test]
    fn failed_steps_take_nobody_else_along(
        setup in setups(),
        actions in actions(),
        failing_launches in prop::collection::btree_set(0..60_u64, 0..8),
        failing_collects in prop::collection::btree_set(0..60_u64, 0..8),
    ) {
        let script = ScriptedConfig { failing_launches, failing_collects, ..ScriptedConfig::default() };
        let mut rig = Rig::new(setup, script);
        for action in actions {
            rig.act(action);
        }
        rig.finish();
    }
}
