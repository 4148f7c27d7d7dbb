//! Order, fairness and sharing, stated in steps.

use std::collections::BTreeMap;

use super::{Scheduler, SchedulerConfig};
use crate::{
    Executor, KvCacheConfig, Request, RequestId, ScriptedConfig, ScriptedConstraint, ScriptedExecutor, TokenConstraint,
    TokenId,
};

const VOCAB_SIZE: u32 = 1000;

/// A scheduler, its executor, and who got how many tokens after how many steps.
struct Bench {
    scheduler: Scheduler,
    executor: ScriptedExecutor,
    max_steps_in_flight: usize,
    next_id: u64,
    num_launched: usize,
    requests: BTreeMap<RequestId, Request>,
    tokens: BTreeMap<RequestId, Vec<TokenId>>,
    scores: BTreeMap<RequestId, Vec<f32>>,
    num_cached: BTreeMap<RequestId, u32>,
    /// Launched steps when the first token was sampled.
    first_launch: BTreeMap<RequestId, usize>,
}

impl Bench {
    fn new(budget: u32, num_blocks: u32, max_steps_in_flight: usize) -> Self {
        Self::with_max_num_seqs(budget, num_blocks, max_steps_in_flight, 64)
    }

    fn with_max_num_seqs(budget: u32, num_blocks: u32, max_steps_in_flight: usize, max_num_seqs: u32) -> Self {
        let kv_cache = KvCacheConfig {
            num_blocks,
            block_size: 4,
        };
        let config = SchedulerConfig {
            max_num_batched_tokens: budget,
            max_num_seqs,
            enable_prefix_caching: true,
            max_steps_in_flight,
        };
        let executor = ScriptedExecutor::new(ScriptedConfig {
            kv_cache,
            max_steps_in_flight,
            ..ScriptedConfig::default()
        });
        Self {
            scheduler: Scheduler::new(config, kv_cache),
            executor,
            max_steps_in_flight,
            next_id: 0,
            num_launched: 0,
            requests: BTreeMap::new(),
            tokens: BTreeMap::new(),
            scores: BTreeMap::new(),
            num_cached: BTreeMap::new(),
            first_launch: BTreeMap::new(),
        }
    }

    fn add(&mut self, request: Request) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.scheduler.add(id, request.clone());
        self.requests.insert(id, request);
        id
    }

    /// A prompt nobody else has.
    fn add_unique(&mut self, num_tokens: usize, max_tokens: u32) -> RequestId {
        let first = self.next_id as u32 * 7919 % VOCAB_SIZE;
        let prompt: Vec<_> = (0..num_tokens as u32)
            .map(|offset| (first + offset * offset) % VOCAB_SIZE)
            .collect();
        self.add(Request::for_test(prompt, max_tokens))
    }

    /// Launches one step and collects what the pipeline's depth demands. Returns whose tokens it computed.
    fn step(&mut self) -> Vec<(RequestId, usize)> {
        let Some(batch) = self.scheduler.schedule() else {
            assert!(self.scheduler.num_steps_in_flight() > 0, "nothing to do");
            self.collect();
            return Vec::new();
        };
        self.num_launched += 1;
        self.executor.launch(batch).unwrap();
        let lens = batch.query_start.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let computed = batch.request_ids.iter().copied().zip(lens).collect();
        for sample in &batch.samples {
            let index = batch.query_start.partition_point(|&start| start <= sample.row) - 1;
            self.first_launch
                .entry(batch.request_ids[index])
                .or_insert(self.num_launched);
        }
        if self.scheduler.num_steps_in_flight() == self.max_steps_in_flight {
            self.collect();
        }
        computed
    }

    fn collect(&mut self) {
        let sampled = self.executor.collect().unwrap();
        let mut outputs = Vec::new();
        self.scheduler.update(sampled, &mut outputs);
        for output in outputs {
            self.num_cached.insert(output.id, output.num_cached_tokens);
            let tokens = self.tokens.entry(output.id).or_default();
            if output.is_prompt {
                let logprobs = output.sampled.logprobs.unwrap();
                self.scores.entry(output.id).or_default().push(logprobs.logprob);
            } else {
                tokens.push(output.sampled.token);
            }
        }
    }

    fn finish(&mut self) {
        while !self.scheduler.is_empty() || self.scheduler.num_steps_in_flight() > 0 {
            self.step();
        }
        for (id, request) in &self.requests {
            assert_eq!(self.tokens[id], ScriptedExecutor::expected_tokens(VOCAB_SIZE, request));
            if request.prompt_logprobs.is_some() {
                assert_eq!(self.scores[id], ScriptedExecutor::expected_scores(&request.prompt));
            }
        }
        assert_eq!(self.scheduler.kv.num_free_blocks(), self.scheduler.kv.num_blocks());
    }
}

#[test]
fn a_newcomer_whose_prompt_fits_has_its_first_token_within_two_steps() {
    for depth in [1, 2] {
        let mut bench = Bench::new(64, 4096, depth);
        for _ in 0..32 {
            bench.add_unique(8, 200);
        }
        for _ in 0..20 {
            bench.step();
        }
        let newcomer = bench.add_unique(64, 5);
        let before = bench.num_launched;
        for _ in 0..6 {
            bench.step();
        }
        assert_eq!(
            bench.first_launch[&newcomer],
            before + 2,
            "half of the budget is left beside 32 decodes"
        );
        bench.finish();
    }
}

#[test]
fn every_decode_has_a_token_in_every_step_whatever_else_comes_in() {
    let mut bench = Bench::new(32, 4096, 1);
    let old: Vec<_> = (0..8).map(|_| bench.add_unique(4, 60)).collect();
    bench.step();
    for round in 0..40 {
        bench.add_unique(20 + round, 4);
        let computed = bench.step();
        for id in &old {
            assert!(computed.contains(&(*id, 1)), "{id:?} has no token in round {round}");
        }
    }
    bench.finish();
}

#[test]
fn a_mix_of_32k_tokens_starves_nobody() {
    const BUDGET: usize = 512;
    for depth in [1, 2] {
        let mut bench = Bench::new(BUDGET as u32, 16384, depth);
        let lens = [
            16000, 30, 8000, 500, 4000, 7, 2000, 1000, 700, 250, 100, 50, 40, 30, 20, 41,
        ];
        let total: usize = lens.iter().sum();
        assert_eq!(total, 32768);
        let ids: Vec<_> = lens.iter().map(|&len| bench.add_unique(len, 20)).collect();
        bench.finish();
        // Every step spends its whole budget, of which decodes take one each; a step more for each one's last piece.
        let bound = total.div_ceil(BUDGET - lens.len()) + 2;
        let last = ids.iter().map(|id| bench.first_launch[id]).max().unwrap();
        assert!(
            last <= bound,
            "the last first token comes in step {last}, bound {bound}"
        );
        // Those behind the long one share a quarter of the budget in order.
        assert!(bench.first_launch[&ids[1]] <= 1, "{:?}", bench.first_launch);
        assert!(bench.first_launch[&ids[5]] <= 1 + (30 + 8000 + 500 + 4000 + 7_usize).div_ceil((BUDGET - 16) / 4));
    }
}

#[test]
fn a_lone_prefill_has_the_whole_budget() {
    let mut bench = Bench::new(64, 4096, 1);
    let id = bench.add_unique(200, 1);
    let steps: Vec<_> = (0..4).map(|_| bench.step()).collect();
    assert_eq!(steps, [[(id, 64)], [(id, 64)], [(id, 64)], [(id, 8)]]);
}

#[test]
fn what_rivals_leave_of_the_budget_goes_back_to_the_first_prefill() {
    let mut bench = Bench::new(64, 4096, 1);
    let long = bench.add_unique(200, 1);
    let short = bench.add_unique(6, 1);
    assert_eq!(bench.step(), [(long, 58), (short, 6)]);
}

#[test]
fn lower_priorities_are_admitted_first_and_equal_ones_in_order_of_arrival() {
    let mut bench = Bench::new(10, 4096, 1);
    let request = |priority, first| Request {
        priority,
        ..Request::for_test([first, 2, 3, 4, 5, 6, 7, 8, 9, 10], 1)
    };
    let late = bench.add(request(5, 1));
    let first = bench.add(request(0, 2));
    let second = bench.add(request(0, 3));
    bench.finish();
    let order = |id| bench.first_launch[&id];
    assert!(
        order(first) <= order(second) && order(second) < order(late),
        "{:?}",
        bench.first_launch
    );
}

#[test]
fn equal_prompts_are_computed_once() {
    for depth in [1, 2] {
        let mut bench = Bench::new(256, 4096, depth);
        let prompt: Vec<_> = (0..41).collect();
        let ids: Vec<_> = (0..8)
            .map(|_| bench.add(Request::for_test(prompt.clone(), 4)))
            .collect();
        let computed = bench.step();
        assert_eq!(computed, [(ids[0], 41)], "the others wait for the first one's blocks");
        bench.finish();
        assert!(
            ids[1..].iter().all(|id| bench.num_cached[id] == 40),
            "{:?}",
            bench.num_cached
        );
        assert!(
            ids.iter().all(|id| bench.first_launch[id] <= depth + 1),
            "{:?}",
            bench.first_launch
        );
    }
}

#[test]
fn who_waits_for_a_prefix_goes_on_alone_when_its_leader_is_aborted() {
    let mut bench = Bench::new(16, 4096, 1);
    let prompt: Vec<_> = (0..64).collect();
    let leader = bench.add(Request::for_test(prompt.clone(), 2));
    let waiter = bench.add(Request::for_test(prompt, 2));
    assert_eq!(bench.step(), [(leader, 16)]);
    bench.scheduler.abort(leader);
    bench.requests.remove(&leader);
    assert_eq!(bench.step(), [(waiter, 16)]);
    assert_eq!(
        bench.scheduler.totals.prefix_cache_hit_tokens, 16,
        "what the leader had published is used"
    );
    bench.finish();
}

#[test]
fn another_sequence_in_a_leaders_place_is_not_taken_for_it() {
    let mut bench = Bench::new(16, 4096, 1);
    let prompt: Vec<_> = (0..64).collect();
    let leader = bench.add(Request::for_test(prompt.clone(), 2));
    let waiter = bench.add(Request {
        priority: 1,
        ..Request::for_test(prompt, 2)
    });
    bench.step();
    bench.scheduler.abort(leader);
    bench.requests.remove(&leader);
    let successor = bench.add_unique(100, 2);
    assert_eq!(
        bench.scheduler.indices[&successor], 0,
        "the leader's place is used again"
    );
    let computed = bench.step();
    assert_eq!(computed, [(successor, 12), (waiter, 4)]);
    bench.finish();
}

#[test]
fn a_newcomer_leaves_running_prefills_the_blocks_they_will_need() {
    // Room for 64 tokens.
    let mut bench = Bench::new(16, 16, 1);
    let first = bench.add_unique(60, 2);
    bench.step();
    let second = bench.add_unique(12, 20);
    bench.finish();
    assert_eq!(bench.scheduler.totals.preemptions, 0);
    assert!(bench.first_launch[&first] < bench.first_launch[&second]);
}

#[test]
fn nobody_else_is_preempted_while_enough_blocks_are_coming_free() {
    // Two blocks are left; the third sequence needs one a step after the prompts, the second after two, the first after
    // three: then all three are in flight and none is free.
    let mut bench = Bench::new(64, 17, 2);
    for num_tokens in [18, 19, 20] {
        bench.add_unique(num_tokens, 12);
    }
    while bench.scheduler.totals.preemptions == 0 {
        bench.step();
    }
    assert_eq!(
        bench.scheduler.totals.preemptions, 1,
        "the last one's blocks are enough"
    );
    bench.step();
    assert_eq!(bench.scheduler.totals.preemptions, 1);
    bench.finish();
}

#[test]
fn nobody_waits_for_a_leader_of_worse_priority() {
    let mut bench = Bench::new(64, 4096, 1);
    let prompt: Vec<_> = (0..200).collect();
    let idle = bench.add(Request {
        priority: 9,
        ..Request::for_test(prompt.clone(), 2)
    });
    bench.step();
    let urgent = bench.add(Request {
        priority: 0,
        ..Request::for_test(prompt, 2)
    });
    assert_eq!(
        bench.step().iter().map(|&(id, _)| id).collect::<Vec<_>>(),
        [idle, urgent]
    );
    bench.finish();
}

#[test]
fn a_second_turn_finds_the_first_turns_answer_in_the_cache() {
    let mut bench = Bench::new(64, 4096, 2);
    let first = bench.add_unique(10, 11);
    bench.finish();
    let mut prompt = bench.requests[&first].prompt.to_vec();
    prompt.extend(&bench.tokens[&first]);
    prompt.extend([1, 2, 3]);
    let second = bench.add(Request::for_test(prompt, 2));
    bench.finish();
    // 21 tokens, of which the last one's KV was never computed: 5 full blocks of 4.
    assert_eq!(bench.num_cached[&second], 20);
}

/// A prompt to be scored, of which nothing is continued.
fn scored(prompt: Vec<TokenId>) -> Request {
    Request {
        prompt_logprobs: Some(1),
        ..Request::for_test(prompt, 0)
    }
}

#[test]
fn a_cached_prefix_is_computed_again_to_be_scored() {
    for depth in [1, 2] {
        let mut bench = Bench::new(64, 4096, depth);
        let prompt: Vec<_> = (0..40).collect();
        bench.add(Request::for_test(prompt.clone(), 2));
        bench.finish();
        let id = bench.add(Request {
            prompt_logprobs: Some(0),
            ..Request::for_test(prompt.clone(), 3)
        });
        bench.finish();
        assert_eq!((bench.scores[&id].len(), bench.num_cached[&id]), (39, 0));
        // What was computed for the scores is there for others.
        let longer = (0..60).collect::<Vec<_>>();
        let other = bench.add(Request::for_test(longer, 2));
        bench.finish();
        assert_eq!(bench.num_cached[&other], 40);
    }
}

#[test]
fn a_prompt_that_is_only_scored_ends_with_its_last_score() {
    for depth in [1, 2] {
        let mut bench = Bench::new(64, 4096, depth);
        let id = bench.add(scored((0..21).collect()));
        let computed = bench.step();
        assert_eq!(computed, [(id, 20)], "the last token predicts nothing that is wanted");
        bench.finish();
        assert!(bench.tokens[&id].is_empty());
    }
}

#[test]
fn scores_take_no_more_rows_than_there_are() {
    let mut bench = Bench::with_max_num_seqs(64, 4096, 1, 10);
    let decodes: Vec<_> = (0..4).map(|_| bench.add_unique(3, 50)).collect();
    bench.step();
    let id = bench.add(scored((0..40).collect()));
    // Four rows are the decodes'; while others wait, a quarter of the rest stays for them.
    let waits = bench.add(Request {
        priority: 1,
        ..scored((100..140).collect())
    });
    let computed = bench.step();
    for decode in decodes {
        assert!(computed.contains(&(decode, 1)), "{computed:?}");
    }
    assert!(
        computed.contains(&(id, 4)) && computed.contains(&(waits, 2)),
        "{computed:?}"
    );
    bench.finish();
}

#[test]
fn scored_prompts_do_not_keep_others_out() {
    let mut bench = Bench::with_max_num_seqs(64, 4096, 2, 8);
    for _ in 0..3 {
        bench.add(scored((0..200).collect()));
    }
    for _ in 0..3 {
        bench.step();
    }
    let newcomer = bench.add_unique(8, 3);
    let before = bench.num_launched;
    bench.finish();
    assert!(bench.first_launch[&newcomer] <= before + 2, "{:?}", bench.first_launch);
}

#[test]
fn scores_survive_a_preemption() {
    // Room for 32 tokens; the second is sent back in the middle of its prompt or its answer.
    for depth in [1, 2] {
        let mut bench = Bench::with_max_num_seqs(64, 8, depth, 4);
        bench.add_unique(8, 20);
        let id = bench.add(Request {
            prompt_logprobs: Some(0),
            ..Request::for_test((0..12).collect::<Vec<_>>(), 18)
        });
        bench.finish();
        assert!(bench.scheduler.totals.preemptions > 0);
        assert_eq!(bench.scores[&id].len(), 11, "each token is scored once");
    }
}

#[test]
fn tenants_do_not_share_blocks() {
    let mut bench = Bench::new(64, 4096, 1);
    let prompt: Vec<_> = (0..40).collect();
    bench.add(Request {
        cache_salt: 1,
        ..Request::for_test(prompt.clone(), 2)
    });
    bench.finish();
    let other = bench.add(Request {
        cache_salt: 1 << 100,
        ..Request::for_test(prompt, 2)
    });
    bench.finish();
    assert_eq!(bench.num_cached[&other], 0);
}

#[test]
fn the_newest_gives_its_blocks_up_and_the_oldest_never_does() {
    // Room for 32 tokens; two sequences of 8 + 20.
    let mut bench = Bench::new(64, 8, 1);
    let oldest = bench.add_unique(8, 20);
    let newest = bench.add_unique(8, 20);
    let mut last_step = BTreeMap::new();
    while !bench.scheduler.is_empty() {
        let computed = bench.step();
        if bench.scheduler.indices.contains_key(&oldest) {
            assert!(
                computed.contains(&(oldest, 1)) || computed.contains(&(oldest, 8)),
                "{computed:?}"
            );
        }
        last_step.extend(computed.iter().map(|&(id, _)| (id, bench.num_launched)));
    }
    assert_eq!(last_step[&oldest], 20, "one step a token");
    assert!(last_step[&newest] > 20);
    assert!(bench.scheduler.totals.preemptions > 0);
    bench.finish();
}

#[test]
fn blocks_of_an_aborted_sequence_are_free_once_its_step_is_collected() {
    let mut bench = Bench::new(64, 16, 2);
    let id = bench.add_unique(20, 10);
    let batch = bench.scheduler.schedule().unwrap();
    bench.executor.launch(batch).unwrap();
    bench.scheduler.abort(id);
    assert_eq!(
        bench.scheduler.kv.num_free_blocks(),
        11,
        "the step in flight still writes five"
    );
    bench.collect();
    assert_eq!(bench.scheduler.kv.num_free_blocks(), 16);
}

#[test]
fn no_step_is_launched_for_a_sequence_whose_last_token_is_in_flight() {
    let mut bench = Bench::new(64, 64, 2);
    let id = bench.add_unique(5, 2);
    for _ in 0..2 {
        let batch = bench.scheduler.schedule().unwrap();
        bench.executor.launch(batch).unwrap();
        if bench.scheduler.num_steps_in_flight() == 2 {
            bench.collect();
        }
    }
    assert!(bench.scheduler.schedule().is_none());
    bench.collect();
    assert_eq!(bench.tokens[&id].len(), 2);
    assert!(bench.scheduler.is_empty());
}

#[test]
#[should_panic(expected = "can never fit")]
fn adding_what_can_never_fit_is_a_mistake_of_the_caller() {
    Bench::new(64, 4, 1).add_unique(10, 10);
}

#[test]
fn a_mask_that_stays_does_not_wait_for_tokens_to_be_read() {
    let num_steps = |constraint: ScriptedConstraint| {
        let mut bench = Bench::new(16, 8, 2);
        let request = Request {
            constraint: Some(constraint.fork()),
            ..Request::for_test([1, 2, 3], 8)
        };
        let id = bench.add(request.clone());
        let mut num_ahead = 0;
        while !bench.scheduler.is_empty() {
            for job in bench.scheduler.take_mask_jobs().collect::<Vec<_>>() {
                let (constraint, allowed) = job.run().unwrap();
                bench.scheduler.set_mask(id, constraint, allowed);
            }
            let was_in_flight = bench.scheduler.num_steps_in_flight() > 0;
            num_ahead += usize::from(!bench.step().is_empty() && was_in_flight);
        }
        assert_eq!(
            bench.tokens[&id],
            ScriptedExecutor::expected_tokens(VOCAB_SIZE, &request)
        );
        num_ahead
    };
    let form = ScriptedConstraint::new(VOCAB_SIZE, 20, 9);
    assert_eq!(num_steps(form.clone()), 0);
    assert_eq!(num_steps(form.clone().fixed_after(0)), 7);
    assert_eq!(num_steps(form.fixed_after(3)), 4);
}
