//! Decides what each step computes: a state machine on plain data, without clock, channel, device or thread.
//!
//! There is no prefill or decode phase. A sequence has tokens, and `num_computed_tokens` of them in the KV cache; each
//! step spends one budget of tokens on catching up. A step is *launched* when [`Scheduler::schedule`] returns its batch
//! and *collected* when [`Scheduler::update`] takes its tokens in. Two steps may be in flight: a row of the second then
//! takes the token that the first is about to sample.

mod fill;
mod plan;
#[cfg(test)]
mod properties;
mod samples;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::kv_cache::{BlockTable, KvCacheManager};
use crate::sequence::{Guide, Rank, Scoring, Sequence, SequenceIndex};
use crate::stats::{Gauges, StepCounts};
use crate::{Allowed, Batch, FinishReason, KvCacheConfig, MaskJob, Request, RequestId, SampledToken, TokenConstraint};

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens a step computes at most.
    pub max_num_batched_tokens: u32,
    /// Sequences that take part in steps at most; bounded by `max_num_batched_tokens`, so that each running sequence
    /// can have a token in each step.
    pub max_num_seqs: u32,
    /// Reuse the KV of equal prefixes.
    pub enable_prefix_caching: bool,
    /// 1, or 2 to launch a step before the tokens of the one before are known.
    pub max_steps_in_flight: usize,
}

/// A token a sequence got.
#[derive(Debug, Clone)]
pub struct SequenceOutput {
    /// Whose.
    pub id: RequestId,
    /// The token.
    pub sampled: SampledToken,
    /// It is one of the prompt's, scored.
    pub is_prompt: bool,
    /// Set when it is the sequence's last.
    pub finish: Option<FinishReason>,
    /// Prompt tokens that came from the prefix cache.
    pub num_cached_tokens: u32,
}

/// Owns all sequences and their blocks.
///
/// Waiting sequences hold no blocks. Running ones are kept in order of rank (priority, then arrival); blocks taken by
/// force are taken from the last of them, so the first always progresses, and with it everyone in turn.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    kv: KvCacheManager,
    sequences: Vec<Option<Sequence>>,
    vacant: Vec<SequenceIndex>,
    indices: HashMap<RequestId, SequenceIndex>,
    waiting: BTreeMap<Rank, SequenceIndex>,
    /// Ordered by rank.
    running: Vec<SequenceIndex>,
    num_arrivals: u64,
    /// Launched and not collected, oldest first.
    in_flight: VecDeque<Step>,
    next_step: u64,
    batch: Batch,
    plan: plan::Plan,
    newly_started: Vec<RequestId>,
    /// Masks that sequences wait for, until the caller takes the jobs.
    mask_jobs: Vec<MaskJob>,
    /// Emptied steps, kept for their capacity.
    spare_steps: Vec<Step>,
    /// Waiting sequences that have run before.
    num_preempted: u64,
    totals: Totals,
}

/// A launched step.
#[derive(Debug, Default)]
struct Step {
    rows: Vec<StepRow>,
    num_samples: usize,
    /// Blocks this step may still write though their sequence has let go of them.
    deferred: Vec<BlockTable>,
    /// How many blocks come free with those.
    num_deferred_blocks: usize,
    counts: StepCounts,
}

/// What a launched step computes for one sequence.
#[derive(Debug, Clone, Copy)]
struct StepRow {
    index: SequenceIndex,
    id: RequestId,
    num_preemptions: u32,
    /// Tokens in the KV cache when it is done.
    end: usize,
    /// Prompt tokens it scores; their samples come before the one of a generated token.
    num_scores: usize,
    is_sampled: bool,
}

#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    preemptions: u64,
    prefix_cache_queried_tokens: u64,
    prefix_cache_hit_tokens: u64,
}

impl Scheduler {
    /// A scheduler without sequences.
    ///
    /// # Panics
    /// When a limit is 0 or more than two steps may be in flight.
    #[must_use]
    pub fn new(config: SchedulerConfig, kv_cache: KvCacheConfig) -> Self {
        assert!(
            config.max_num_batched_tokens > 0 && config.max_num_seqs > 0,
            "limits are at least 1"
        );
        assert!((1..=2).contains(&config.max_steps_in_flight), "1 or 2 steps in flight");
        Self {
            config: SchedulerConfig {
                max_num_seqs: config.max_num_seqs.min(config.max_num_batched_tokens),
                ..config
            },
            kv: KvCacheManager::new(kv_cache, config.enable_prefix_caching),
            sequences: Vec::new(),
            vacant: Vec::new(),
            indices: HashMap::new(),
            waiting: BTreeMap::new(),
            running: Vec::new(),
            num_arrivals: 0,
            in_flight: VecDeque::new(),
            next_step: 0,
            batch: Batch::default(),
            plan: plan::Plan::default(),
            newly_started: Vec::new(),
            mask_jobs: Vec::new(),
            spare_steps: Vec::new(),
            num_preempted: 0,
            totals: Totals::default(),
        }
    }

    /// Takes a request in, to wait its turn.
    ///
    /// # Panics
    /// When the request can never run, or its name is taken: the caller checks both.
    pub fn add(&mut self, id: RequestId, mut request: Request) {
        assert!(
            !request.prompt.is_empty() && (request.stop.max_tokens > 0 || request.num_scores() > 0),
            "nothing to compute"
        );
        let num_tokens = request.prompt.len() + request.stop.max_tokens as usize;
        assert!(
            self.kv.blocks_for(num_tokens - 1) <= self.kv.num_blocks(),
            "{num_tokens} tokens can never fit"
        );
        let rank = Rank {
            priority: request.priority,
            arrival: self.num_arrivals,
        };
        self.num_arrivals += 1;
        // Scores are of given tokens: a request that generates nothing has nothing to constrain.
        let constraint = request.constraint.take().filter(|_| request.stop.max_tokens > 0);
        let guide = match constraint {
            None => Guide::Free,
            Some(constraint) => {
                self.mask_jobs.push(MaskJob {
                    id,
                    constraint,
                    token: None,
                });
                Guide::Away
            }
        };
        let sequence = Sequence {
            id,
            rank,
            tokens: request.prompt.to_vec(),
            hashes: self.kv.hashes(request.cache_salt),
            table: BlockTable::new(request.cache_salt),
            scoring: request.prompt_logprobs.map(Scoring::new),
            needs_history: request.sampling.needs_history(),
            request,
            is_running: false,
            has_started: false,
            num_computed_tokens: 0,
            num_steps_in_flight: 0,
            num_pending: 0,
            last_sample: 0,
            num_preemptions: 0,
            num_cached_tokens: 0,
            guide,
            leader: None,
        };
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.sequences.push(None);
            self.sequences.len() - 1
        });
        self.sequences[index] = Some(sequence);
        self.waiting.insert(rank, index);
        let previous = self.indices.insert(id, index);
        assert!(previous.is_none(), "request {} is already here", id.0);
    }

    /// Forgets a sequence wherever it is. False when there is none of this name (it may have ended).
    pub fn abort(&mut self, id: RequestId) -> bool {
        let Some(&index) = self.indices.get(&id) else {
            return false;
        };
        self.running.retain(|&other| other != index);
        self.remove(index);
        true
    }

    /// Masks to compute. Each must come back by [`set_mask`](Self::set_mask), or its sequence be aborted.
    pub fn take_mask_jobs(&mut self) -> std::vec::Drain<'_, MaskJob> {
        self.mask_jobs.drain(..)
    }

    /// Says which token may come next; nothing if the sequence is gone.
    pub fn set_mask(&mut self, id: RequestId, constraint: Box<dyn TokenConstraint>, allowed: Allowed) {
        if let Some(&index) = self.indices.get(&id) {
            self.sequence_mut(index).guide = match allowed {
                Allowed::Anything => Guide::Free,
                Allowed::Always(mask) => Guide::Fixed(mask),
                Allowed::Next(mask) => Guide::Ready(constraint, mask),
            };
        }
    }

    /// Chooses what the next step computes. `None` when nothing can be computed before the oldest step in flight is
    /// collected, until a request is added, or until a mask is set.
    ///
    /// The step counts as launched; if it could not be, [`launch_failed`](Self::launch_failed) must be called at once.
    ///
    /// # Panics
    /// When as many steps are in flight as there may be.
    pub fn schedule(&mut self) -> Option<&Batch> {
        assert!(
            self.in_flight.len() < self.config.max_steps_in_flight,
            "collect a step first"
        );
        self.newly_started.clear();
        self.make_plan();
        if self.plan.is_empty() {
            return None;
        }
        self.fill_batch();
        Some(&self.batch)
    }

    /// The step scheduled last.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Takes in the tokens of the oldest step in flight, one for each of its samples. What was generated counts in the
    /// result; what was scored does not.
    ///
    /// # Panics
    /// When no step is in flight, or `sampled` has another length than [`num_samples`](Self::num_samples).
    pub fn update(&mut self, sampled: Vec<SampledToken>, outputs: &mut Vec<SequenceOutput>) -> StepCounts {
        let mut step = self.in_flight.pop_front().expect("a step is in flight");
        assert_eq!(sampled.len(), step.num_samples, "one token for each sample");
        let mut sampled = sampled.into_iter();
        let mut num_ended = 0;
        let num_outputs = outputs.len();
        for row in &step.rows {
            let mut samples = sampled.by_ref().take(row.num_scores + usize::from(row.is_sampled));
            num_ended += usize::from(self.update_row(row, &mut samples, outputs));
            // Those of a sequence that is gone are in the way of the next one's.
            samples.for_each(drop);
        }
        if num_ended > 0 {
            let sequences = &self.sequences;
            self.running.retain(|&index| sequences[index].is_some());
        }
        let counts = StepCounts {
            generated_tokens: outputs[num_outputs..].iter().filter(|output| !output.is_prompt).count() as u64,
            ..step.counts
        };
        self.retire(&mut step);
        self.spare_steps.push(step);
        counts
    }

    /// The oldest step in flight failed: all its sequences end here.
    ///
    /// # Panics
    /// When no step is in flight.
    pub fn step_failed(&mut self, failed: &mut Vec<RequestId>) -> StepCounts {
        let step = self.in_flight.pop_front().expect("a step is in flight");
        self.fail(step, failed)
    }

    /// The step just scheduled did not start: all its sequences end here.
    ///
    /// # Panics
    /// When no step is in flight.
    pub fn launch_failed(&mut self, failed: &mut Vec<RequestId>) -> StepCounts {
        let step = self.in_flight.pop_back().expect("a step was scheduled");
        self.next_step -= 1;
        self.fail(step, failed)
    }

    /// Steps launched and not collected.
    #[must_use]
    pub fn num_steps_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Tokens that the oldest step in flight samples.
    #[must_use]
    pub fn num_samples(&self) -> usize {
        self.in_flight.front().map_or(0, |step| step.num_samples)
    }

    /// Number of the oldest step in flight, or of the next one.
    #[must_use]
    pub fn oldest_step(&self) -> u64 {
        self.next_step - self.in_flight.len() as u64
    }

    /// Requests whose first rows are in the step scheduled last.
    #[must_use]
    pub fn newly_started(&self) -> &[RequestId] {
        &self.newly_started
    }

    /// Whether no sequence is left; steps may still be in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// What runs, waits and is held.
    #[must_use]
    pub(crate) fn gauges(&self) -> Gauges {
        // Those whom the last plan left waiting may be gone.
        let lacks_slots = self.plan.lacks_slots && !self.waiting.is_empty();
        let num_slots = match lacks_slots {
            true => self.plan.num_slots,
            false => self.config.max_num_seqs as usize,
        };
        Gauges {
            num_running: self.running.len() as u64,
            lacks_slots,
            num_slots: num_slots as u64,
            num_preempted: self.num_preempted,
            blocks_total: self.kv.num_blocks() as u64,
            blocks_free: self.kv.num_free_blocks() as u64,
            blocks_cached: self.kv.num_cached_blocks() as u64,
            preemptions: self.totals.preemptions,
            prefix_cache_queried_tokens: self.totals.prefix_cache_queried_tokens,
            prefix_cache_hit_tokens: self.totals.prefix_cache_hit_tokens,
        }
    }

    fn sequence(&self, index: SequenceIndex) -> &Sequence {
        self.sequences[index].as_ref().expect("the index of a live sequence")
    }

    fn sequence_mut(&mut self, index: SequenceIndex) -> &mut Sequence {
        self.sequences[index].as_mut().expect("the index of a live sequence")
    }

    /// Takes in what a collected step did for one sequence. True when that was its end.
    fn update_row(
        &mut self,
        row: &StepRow,
        samples: &mut impl Iterator<Item = SampledToken>,
        outputs: &mut Vec<SequenceOutput>,
    ) -> bool {
        // The sequence may have ended since the launch, and its place be another's.
        let Some(sequence) = self.sequences[row.index]
            .as_mut()
            .filter(|sequence| sequence.id == row.id)
        else {
            return false;
        };
        sequence.num_steps_in_flight -= 1;
        if row.num_preemptions == sequence.num_preemptions {
            let num_full_blocks = row.end / self.kv.block_size();
            if num_full_blocks > sequence.table.num_published() {
                self.kv.extend_hashes(&mut sequence.hashes, &sequence.tokens);
                self.kv
                    .publish(&mut sequence.table, &sequence.tokens, &sequence.hashes, row.end);
            }
        }
        let mut has_ended = false;
        for (index, sampled) in samples.enumerate() {
            let is_prompt = index < row.num_scores;
            let token = sampled.token;
            let finish = if is_prompt {
                sequence.push_score()
            } else {
                sequence.push(token)
            };
            if !is_prompt && finish.is_none() {
                self.mask_jobs.extend(sequence.mask_job(token));
            }
            has_ended |= finish.is_some();
            outputs.push(SequenceOutput {
                id: row.id,
                sampled,
                is_prompt,
                finish,
                num_cached_tokens: sequence.num_cached_tokens,
            });
        }
        if has_ended {
            self.remove(row.index);
        }
        has_ended
    }

    fn fail(&mut self, mut step: Step, failed: &mut Vec<RequestId>) -> StepCounts {
        for row in &step.rows {
            let Some(sequence) = self.sequences[row.index]
                .as_mut()
                .filter(|sequence| sequence.id == row.id)
            else {
                continue;
            };
            sequence.num_steps_in_flight -= 1;
            failed.push(row.id);
            self.abort(row.id);
        }
        let counts = StepCounts {
            failed: true,
            ..step.counts
        };
        self.retire(&mut step);
        self.spare_steps.push(step);
        counts
    }

    /// Forgets a sequence; the caller takes it out of `running`.
    fn remove(&mut self, index: SequenceIndex) {
        let sequence = self.sequences[index].take().expect("the index of a live sequence");
        self.vacant.push(index);
        self.indices.remove(&sequence.id);
        if !sequence.is_running {
            self.waiting.remove(&sequence.rank);
            self.num_preempted -= u64::from(sequence.has_started);
        }
        self.give_back(sequence.table, sequence.num_steps_in_flight);
    }

    /// Frees a table's blocks, but not before the last step that may write them is collected.
    fn give_back(&mut self, table: BlockTable, num_steps_in_flight: u32) {
        match self.in_flight.back_mut() {
            Some(step) if num_steps_in_flight > 0 => {
                step.num_deferred_blocks += self.kv.num_exclusive_blocks(&table);
                step.deferred.push(table);
            }
            _ => self.kv.release(table),
        }
    }

    /// Frees what waited for a step to end, and empties it.
    fn retire(&mut self, step: &mut Step) {
        for table in step.deferred.drain(..) {
            self.kv.release(table);
        }
        step.rows.clear();
        step.num_samples = 0;
        step.num_deferred_blocks = 0;
    }
}
