//! Which sequences take part in a step, and with how many tokens.

use std::ops::Bound;

use super::Scheduler;
use crate::RequestId;
use crate::kv_cache::BlockTable;
use crate::sequence::{Leader, Rank, Sequence, SequenceIndex};

/// Of the tokens a step has for prefills, the first one gets at most `FIRST_PREFILL_SHARE` / 4 while others want some:
/// a short prompt behind a very long one has its first token soon, and the long one loses at most a quarter.
const FIRST_PREFILL_SHARE: usize = 3;

/// Waiting sequences passed over in one step because another computes their prefix.
const MAX_PASSED_OVER: usize = 256;

/// A step in the making. Every sequence in it has blocks for its tokens.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) entries: Vec<PlanEntry>,
    /// Tokens left to give.
    budget: usize,
    /// Sampled rows left to give: each running sequence has one of its own, those that score their prompt want more.
    spare_samples: usize,
    /// A running sequence needs blocks that are not there: nobody new may take any.
    is_short_of_blocks: bool,
    /// Somebody waits until another ends: for a slot, a sampled row or blocks.
    pub(super) lacks_slots: bool,
    /// How many run then.
    pub(super) num_slots: usize,
    /// Prompt tokens that those it starts found in the cache.
    pub(super) num_cached_tokens: usize,
    /// A prefill that was cut to its share.
    cut: Option<SequenceIndex>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct PlanEntry {
    pub(super) index: SequenceIndex,
    pub(super) num_tokens: usize,
    /// Sampled rows beyond the sequence's own.
    num_extra_samples: usize,
}

/// What became of a waiting sequence that was offered a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Admitted,
    /// Better off waiting; those behind it need not.
    PassedOver,
    /// Does not fit, and nobody may overtake it.
    NoRoom,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Gives a sequence that has computed `num_computed_tokens` of its tokens the next `num_tokens`.
    fn give(&mut self, index: SequenceIndex, sequence: &Sequence, num_tokens: usize) {
        let num_extra_samples = extra_samples(sequence, num_tokens);
        self.entries.push(PlanEntry {
            index,
            num_tokens,
            num_extra_samples,
        });
        self.budget -= num_tokens;
        self.spare_samples -= num_extra_samples;
    }

    fn take_back(&mut self, index: SequenceIndex) {
        if let Some(position) = self.entries.iter().position(|entry| entry.index == index) {
            let entry = self.entries.remove(position);
            self.budget += entry.num_tokens;
            self.spare_samples += entry.num_extra_samples;
        }
    }

    /// Tokens for a prefill.
    fn prefill_share(&mut self, index: SequenceIndex, sequence: &Sequence, has_rivals: bool, is_first: bool) -> usize {
        let remaining = sequence.num_remaining();
        let mut share = remaining.min(self.budget);
        if is_first && has_rivals {
            share = share.min((self.budget * FIRST_PREFILL_SHARE / 4).max(1));
        }
        let num_samples = if has_rivals {
            self.spare_samples * FIRST_PREFILL_SHARE / 4
        } else {
            self.spare_samples
        };
        share = share.min(tokens_for(sequence, 1 + num_samples));
        if share < remaining.min(self.budget) && self.cut.is_none() {
            self.cut = Some(index);
        }
        share
    }
}

/// Sampled rows beyond one that the next `num_tokens` tokens of a sequence take.
fn extra_samples(sequence: &Sequence, num_tokens: usize) -> usize {
    let start = sequence.num_computed_tokens;
    let end = start + num_tokens;
    let num_samples = sequence.rows_to_score(start, end).len() + usize::from(end == sequence.num_tokens());
    num_samples.saturating_sub(1)
}

/// Tokens a sequence may compute next if it has so many sampled rows.
fn tokens_for(sequence: &Sequence, num_samples: usize) -> usize {
    match sequence.next_to_score() {
        None => usize::MAX,
        // Computed before, and lost to a preemption: the rows up to there are not sampled again.
        Some(next) => next.saturating_sub(sequence.num_computed_tokens) + num_samples,
    }
}

impl Scheduler {
    /// Running sequences first, those that need one token before those that need many; then waiting ones, in order.
    pub(super) fn make_plan(&mut self) {
        self.plan.entries.clear();
        self.plan.budget = self.config.max_num_batched_tokens as usize;
        self.plan.spare_samples = self.config.max_num_seqs as usize - self.running.len();
        self.plan.is_short_of_blocks = false;
        self.plan.lacks_slots = false;
        self.plan.num_cached_tokens = 0;
        self.plan.cut = None;
        let num_prefills = self.plan_decodes();
        let mut is_first = true;
        if num_prefills > 0 {
            self.plan_prefills(num_prefills > 1 || !self.waiting.is_empty());
            is_first = false;
        }
        if self.plan.is_short_of_blocks {
            self.plan.lacks_slots = !self.waiting.is_empty();
        } else {
            self.admit_waiting(is_first);
        }
        self.plan.num_slots = self.running.len();
        self.extend_cut_prefill();
    }

    /// Gives each sequence that needs just one token that token. Returns how many need more.
    fn plan_decodes(&mut self) -> usize {
        let mut num_prefills = 0;
        let mut position = 0;
        // Preemption shortens `running` from its end.
        while position < self.running.len() {
            let index = self.running[position];
            position += 1;
            match self.sequence(index).num_remaining() {
                0 => {}
                1 if self.plan.budget > 0 => {
                    self.plan_running(index, 1);
                }
                _ => num_prefills += 1,
            }
        }
        num_prefills
    }

    fn plan_prefills(&mut self, has_rivals: bool) {
        let mut is_first = true;
        let mut position = 0;
        while position < self.running.len() && self.plan.budget > 0 {
            let index = self.running[position];
            position += 1;
            let sequence = self.sequences[index].as_ref().expect("running sequences are live");
            if sequence.num_remaining() > 1 {
                let num_tokens = self.plan.prefill_share(index, sequence, has_rivals, is_first);
                is_first = false;
                self.plan_running(index, num_tokens);
            }
        }
    }

    /// Plans tokens of a running sequence, taking blocks from those behind it if there is no other way.
    fn plan_running(&mut self, index: SequenceIndex, num_tokens: usize) {
        loop {
            let sequence = self.sequences[index].as_mut().expect("running sequences are live");
            let Err(out) = self
                .kv
                .grow(&mut sequence.table, sequence.num_computed_tokens + num_tokens)
            else {
                self.plan.give(index, sequence, num_tokens);
                return;
            };
            self.plan.is_short_of_blocks = true;
            let num_coming: usize = self.in_flight.iter().map(|step| step.num_deferred_blocks).sum();
            let last = *self.running.last().expect("this one is running");
            // Enough blocks come free with the steps in flight, or everyone behind has given all: it is skipped for now.
            if out.free + num_coming >= out.needed || last == index {
                return;
            }
            self.preempt(last);
        }
    }

    /// Sends the last running sequence back to the queue, in its old place.
    fn preempt(&mut self, index: SequenceIndex) {
        self.plan.take_back(index);
        self.running.pop();
        let sequence = self.sequence_mut(index);
        let (rank, num_steps_in_flight) = (sequence.rank, sequence.num_steps_in_flight);
        let table = sequence.preempt();
        tracing::warn!(
            request = sequence.id.0,
            blocks = table.blocks().len(),
            "preempted for want of KV blocks"
        );
        self.waiting.insert(rank, index);
        self.give_back(table, num_steps_in_flight);
        self.num_preempted += 1;
        self.totals.preemptions += 1;
    }

    fn admit_waiting(&mut self, mut is_first: bool) {
        let mut num_reserved = self.num_reserved_blocks();
        let mut after = Bound::Unbounded;
        let mut num_passed_over = 0;
        while num_passed_over < MAX_PASSED_OVER
            && let Some((&rank, &index)) = self.waiting.range((after, Bound::Unbounded)).next()
        {
            // A newcomer takes a sampled row, of which there are as many as sequences may run.
            self.plan.lacks_slots = self.plan.spare_samples == 0;
            if self.plan.lacks_slots || self.plan.budget == 0 {
                break;
            }
            after = Bound::Excluded(rank);
            match self.admit(index, rank, is_first, &mut num_reserved) {
                Admission::Admitted => is_first = false,
                Admission::PassedOver => num_passed_over += 1,
                Admission::NoRoom => {
                    self.plan.lacks_slots = true;
                    break;
                }
            }
        }
    }

    /// Blocks that running sequences need for the tokens they have, beyond those they hold; and one more each, so that
    /// a newcomer is not sent back as soon as someone's block is full.
    fn num_reserved_blocks(&self) -> usize {
        let missing = |&index: &SequenceIndex| {
            let sequence = self.sequence(index);
            self.kv
                .blocks_for(sequence.num_tokens())
                .saturating_sub(sequence.table.blocks().len())
                + 1
        };
        self.running.iter().map(missing).sum()
    }

    fn admit(&mut self, index: SequenceIndex, rank: Rank, is_first: bool, num_reserved: &mut usize) -> Admission {
        let sequence = self.sequences[index].as_mut().expect("waiting sequences are live");
        // Preempted with a token in flight, without which its next row is unknown; or its mask is not there yet; or with
        // nothing more to compute.
        if sequence.num_pending > 0
            || sequence.lacks_mask()
            || sequence.only_awaits_scores()
            || is_led(&self.sequences, index)
        {
            return Admission::PassedOver;
        }
        let sequence = self.sequences[index].as_mut().expect("waiting sequences are live");
        self.kv.extend_hashes(&mut sequence.hashes, &sequence.tokens);
        let num_matchable = sequence.next_to_score().map_or(sequence.tokens.len(), |next| next + 1);
        let matchable = &sequence.tokens[..num_matchable];
        let table = self
            .kv
            .match_prefix(matchable, sequence.request.cache_salt, &sequence.hashes);
        if let Some(leader) = self.find_leader(index, &table) {
            self.kv.release(table);
            self.sequence_mut(index).leader = Some(leader);
            return Admission::PassedOver;
        }
        let num_tokens = self.sequence(index).tokens.len();
        let needed = self.kv.blocks_for(num_tokens) - table.blocks().len();
        if needed + *num_reserved > self.kv.num_free_blocks() {
            self.kv.release(table);
            return Admission::NoRoom;
        }
        self.waiting.remove(&rank);
        let position = self.running.partition_point(|&other| self.sequence(other).rank < rank);
        self.running.insert(position, index);
        self.start(index, table);
        self.plan.spare_samples -= 1;
        let has_rivals = !self.waiting.is_empty();
        let sequence = self.sequences[index].as_mut().expect("just admitted");
        let share = self.plan.prefill_share(index, sequence, has_rivals, is_first);
        self.kv
            .grow(&mut sequence.table, sequence.num_computed_tokens + share)
            .expect("room for all its tokens was counted");
        *num_reserved += self.kv.blocks_for(num_tokens) - sequence.table.blocks().len() + 1;
        self.plan.give(index, sequence, share);
        Admission::Admitted
    }

    /// Marks a sequence as running on what was matched for it.
    fn start(&mut self, index: SequenceIndex, table: BlockTable) {
        let num_matched = table.blocks().len() * self.kv.block_size();
        let sequence = self.sequences[index].as_mut().expect("the index of a live sequence");
        sequence.is_running = true;
        sequence.leader = None;
        sequence.num_computed_tokens = num_matched;
        let unused = std::mem::replace(&mut sequence.table, table);
        debug_assert!(unused.blocks().is_empty(), "waiting sequences hold no blocks");
        self.kv.release(unused);
        if sequence.has_started {
            self.num_preempted -= 1;
        } else {
            sequence.has_started = true;
            sequence.num_cached_tokens = num_matched as u32;
            self.plan.num_cached_tokens += num_matched;
            if sequence.next_to_score().is_none() {
                self.totals.prefix_cache_queried_tokens += sequence.num_prompt_tokens() as u64;
            }
            self.totals.prefix_cache_hit_tokens += num_matched as u64;
            self.newly_started.push(sequence.id);
        }
    }

    /// A running sequence that is computing more of the same prefix than `matched` has: waiting for it costs less than
    /// computing it twice. Only for those of no worse priority, so that nobody is held up by someone less urgent.
    fn find_leader(&self, index: SequenceIndex, matched: &BlockTable) -> Option<Leader> {
        let sequence = self.sequence(index);
        // Who has rows to score computes them itself.
        if !self.config.enable_prefix_caching || sequence.next_to_score().is_some() {
            return None;
        }
        let limit = (sequence.tokens.len() - 1) / self.kv.block_size();
        let num_matched = matched.blocks().len();
        self.running.iter().find_map(|&other| {
            let candidate = self.sequence(other);
            if candidate.rank.priority > sequence.rank.priority
                || !candidate.hashes.share_block(&sequence.hashes, num_matched)
            {
                return None;
            }
            let num_blocks = candidate.hashes.common_blocks(&sequence.hashes, limit);
            let is_ahead = num_blocks > num_matched && num_blocks > candidate.table.num_published();
            is_ahead.then_some(Leader {
                index: other,
                id: candidate.id,
                num_preemptions: candidate.num_preemptions,
                num_blocks,
            })
        })
    }

    /// Gives what nobody else wanted to the prefill that was cut.
    fn extend_cut_prefill(&mut self) {
        let Some(index) = self.plan.cut.filter(|_| self.plan.budget > 0) else {
            return;
        };
        let Some(entry) = self.plan.entries.iter_mut().find(|entry| entry.index == index) else {
            return;
        };
        let sequence = self.sequences[index].as_mut().expect("planned sequences are live");
        let num_samples = 1 + entry.num_extra_samples + self.plan.spare_samples;
        let num_tokens = sequence
            .num_remaining()
            .min(entry.num_tokens + self.plan.budget)
            .min(tokens_for(sequence, num_samples));
        if self
            .kv
            .grow(&mut sequence.table, sequence.num_computed_tokens + num_tokens)
            .is_ok()
        {
            self.plan.budget -= num_tokens - entry.num_tokens;
            entry.num_tokens = num_tokens;
            self.plan.spare_samples += entry.num_extra_samples;
            entry.num_extra_samples = extra_samples(sequence, num_tokens);
            self.plan.spare_samples -= entry.num_extra_samples;
        }
    }
}

/// Whether the leader a waiting sequence was given still runs and has not published all it was awaited for.
fn is_led(sequences: &[Option<Sequence>], index: SequenceIndex) -> bool {
    let leader_of = |sequence: &Sequence| sequence.leader;
    let Some(leader) = sequences[index].as_ref().and_then(leader_of) else {
        return false;
    };
    let is_same = |id: RequestId, num_preemptions| id == leader.id && num_preemptions == leader.num_preemptions;
    sequences[leader.index].as_ref().is_some_and(|candidate| {
        is_same(candidate.id, candidate.num_preemptions) && candidate.table.num_published() < leader.num_blocks
    })
}
