//! Writes a planned step down as a [`Batch`], in vectors that keep their capacity.

use super::plan::PlanEntry;
use super::samples::SampleRows;
use super::{Scheduler, StepRow};
use crate::constraint::allows_only;
use crate::sequence::Sequence;
use crate::stats::StepCounts;
use crate::{Batch, FedToken, SampleRow, TokenHistory};

impl Scheduler {
    /// Turns the plan into the batch and a step in flight.
    pub(super) fn fill_batch(&mut self) {
        let mut step = self.spare_steps.pop().unwrap_or_default();
        step.counts = StepCounts {
            starts: self.newly_started.len() as u64,
            cached_tokens: self.plan.num_cached_tokens as u64,
            ..StepCounts::default()
        };
        let batch = &mut self.batch;
        let mut samples = SampleRows::over(std::mem::take(&mut batch.samples));
        clear(batch, self.next_step);
        self.next_step += 1;
        for &PlanEntry { index, num_tokens, .. } in &self.plan.entries {
            let sequence = self.sequences[index].as_mut().expect("planned sequences are live");
            let start = sequence.num_computed_tokens;
            let end = start + num_tokens;
            step.counts.tokens += num_tokens as u64;
            step.counts.prompt_tokens += sequence.num_prompt_tokens().min(end).saturating_sub(start) as u64;
            push_rows(batch, sequence, start, end, self.kv.block_size());
            let num_scores = push_scores(&mut samples, batch, sequence, start, end);
            // Without tokens to generate, the prompt's last one is not even computed.
            let is_sampled = end == sequence.num_tokens();
            if is_sampled {
                push_sample(&mut samples, batch, sequence);
            }
            sequence.num_computed_tokens = end;
            sequence.num_steps_in_flight += 1;
            step.rows.push(StepRow {
                index,
                id: sequence.id,
                num_preemptions: sequence.num_preemptions,
                end,
                num_scores,
                is_sampled,
            });
        }
        step.num_samples = samples.len();
        batch.samples = samples.finish();
        self.in_flight.push_back(step);
    }
}

fn clear(batch: &mut Batch, step: u64) {
    batch.step = step;
    batch.request_ids.clear();
    batch.token_ids.clear();
    batch.fed.clear();
    batch.positions.clear();
    batch.slot_mapping.clear();
    batch.query_start.clear();
    batch.query_start.push(0);
    batch.context_lens.clear();
    batch.block_start.clear();
    batch.block_start.push(0);
    batch.block_ids.clear();
}

/// Rows for the tokens at positions `start..end`; the last may be one that is still in flight.
fn push_rows(batch: &mut Batch, sequence: &Sequence, start: usize, end: usize, block_size: usize) {
    let num_known = end.min(sequence.tokens.len());
    batch.request_ids.push(sequence.id);
    batch.token_ids.extend_from_slice(&sequence.tokens[start..num_known]);
    if num_known < end {
        debug_assert_eq!(
            (end - num_known, sequence.num_pending),
            (1, 1),
            "one token is in flight at most"
        );
        batch.fed.push(FedToken {
            row: batch.token_ids.len() as u32,
            prev_sample: sequence.last_sample,
        });
        batch.token_ids.push(0);
    }
    batch.positions.extend(start as u32..end as u32);
    let mut position = start;
    while position < end {
        let offset = position % block_size;
        let num_slots = (block_size - offset).min(end - position);
        let first = sequence.table.blocks()[position / block_size].0 * block_size as u32 + offset as u32;
        batch.slot_mapping.extend(first..first + num_slots as u32);
        position += num_slots;
    }
    batch.query_start.push(batch.token_ids.len() as u32);
    batch.context_lens.push(end as u32);
    batch
        .block_ids
        .extend_from_slice(&sequence.table.blocks()[..end.div_ceil(block_size)]);
    batch.block_start.push(batch.block_ids.len() as u32);
}

/// Asks for the scores of prompt tokens that the rows of `start..end`, just written, predict. Returns how many.
fn push_scores(samples: &mut SampleRows, batch: &Batch, sequence: &mut Sequence, start: usize, end: usize) -> usize {
    let positions = sequence.rows_to_score(start, end);
    let Some(scoring) = sequence.scoring.as_mut().filter(|_| !positions.is_empty()) else {
        return 0;
    };
    let first_row = batch.token_ids.len() - (end - start);
    for position in positions.clone() {
        let row = (first_row + position - start) as u32;
        let sample = samples.push(row, position as u32 + 1, &scoring.params);
        sample.given = Some(sequence.tokens[position + 1]);
    }
    scoring.num_launched = positions.end;
    positions.len()
}

/// Asks for the token after the sequence's last row, which was just written.
fn push_sample(samples: &mut SampleRows, batch: &Batch, sequence: &mut Sequence) {
    sequence.last_sample = samples.len() as u32;
    let row = batch.token_ids.len() as u32 - 1;
    let sample = samples.push(row, sequence.num_tokens() as u32, &sequence.request.sampling);
    if !sequence.chooses_freely() {
        restrict(sample, sequence);
    }
    sequence.num_pending += 1;
}

/// Says what the choice of a token depends on, beyond its logits.
fn restrict(sample: &mut SampleRow, sequence: &mut Sequence) {
    let num_generated = sequence.num_generated();
    sample.mask = sequence.take_mask();
    let request = &sequence.request;
    let stop_token_ids = &request.stop.stop_token_ids;
    // A form that is complete must be able to end.
    let must_stop = || {
        let mask = sample.mask.as_deref();
        mask.is_some_and(|mask| allows_only(mask, stop_token_ids))
    };
    let is_banned = num_generated < request.stop.min_tokens as usize && !stop_token_ids.is_empty() && !must_stop();
    sample.banned = is_banned.then(|| stop_token_ids.clone());
    sample.history = sequence.needs_history.then(|| TokenHistory {
        prompt: request.prompt.clone(),
        output: sequence.tokens[request.prompt.len()..].to_vec(),
    });
}
