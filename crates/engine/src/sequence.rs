//! A request's live state in the scheduler.

use std::ops::Range;
use std::sync::Arc;

use crate::kv_cache::{BlockTable, PrefixHashes};
use crate::{FinishReason, MaskJob, Request, RequestId, SamplingParams, TokenConstraint, TokenId, TokenMask};

/// Runs before another where it is less: priority, then arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: i32,
    pub(crate) arrival: u64,
}

/// Index of a sequence in the scheduler; reused, so whoever keeps one keeps the [`RequestId`] as well.
pub(crate) type SequenceIndex = usize;

/// A running sequence that computes blocks a waiting one needs as well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leader {
    pub(crate) index: SequenceIndex,
    pub(crate) id: RequestId,
    pub(crate) num_preemptions: u32,
    /// Worth waiting for until it published this many blocks.
    pub(crate) num_blocks: usize,
}

/// What a constrained sequence may go on with.
#[derive(Debug)]
pub(crate) enum Guide {
    /// Anything.
    Free,
    /// Tokens of the mask, now and later.
    Fixed(TokenMask),
    /// A launched step samples the token that the constraint has to see next.
    Sampling(Box<dyn TokenConstraint>),
    /// The constraint is away, computing the next mask.
    Away,
    /// Tokens of the mask.
    Ready(Box<dyn TokenConstraint>, TokenMask),
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) rank: Rank,
    pub(crate) request: Request,
    /// Prompt, then all generated tokens that were collected.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) hashes: PrefixHashes,
    pub(crate) table: BlockTable,
    pub(crate) is_running: bool,
    pub(crate) has_started: bool,
    /// Tokens whose KV is in the table's blocks once all launched steps are collected.
    pub(crate) num_computed_tokens: usize,
    /// Launched steps that compute for it and are not collected.
    pub(crate) num_steps_in_flight: u32,
    /// Tokens those steps sample: 0, or 1 whenever a step is scheduled.
    pub(crate) num_pending: usize,
    /// Index of its row among the samples of the last launched step that samples for it.
    pub(crate) last_sample: u32,
    /// What its sampling parameters say, without a look at them.
    pub(crate) needs_history: bool,
    /// Present when the prompt is to be scored.
    pub(crate) scoring: Option<Scoring>,
    /// Also tells whether rows launched before still belong to the table.
    pub(crate) num_preemptions: u32,
    /// Prompt tokens matched when it first ran.
    pub(crate) num_cached_tokens: u32,
    /// Which tokens may come next.
    pub(crate) guide: Guide,
    /// While waiting: who computes the same prefix.
    pub(crate) leader: Option<Leader>,
}

/// How far the scoring of a prompt has come. The first token has no score: nothing predicts it.
#[derive(Debug)]
pub(crate) struct Scoring {
    /// Of every row that scores.
    pub(crate) params: Arc<SamplingParams>,
    /// Prompt tokens scored by launched steps. What predicts token `i + 1` is the row of token `i`, so it is also the first
    /// position that must be computed and not taken from the prefix cache.
    pub(crate) num_launched: usize,
    /// Those of them that were collected.
    pub(crate) num_collected: usize,
}

impl Scoring {
    pub(crate) fn new(num_alternatives: u32) -> Self {
        let params = SamplingParams {
            temperature: 0.0,
            logprobs: Some(num_alternatives),
            ..SamplingParams::default()
        };
        Self {
            params: Arc::new(params),
            num_launched: 0,
            num_collected: 0,
        }
    }
}

impl Sequence {
    pub(crate) fn num_prompt_tokens(&self) -> usize {
        self.request.prompt.len()
    }

    /// Tokens generated, those in flight included.
    pub(crate) fn num_generated(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens() + self.num_pending
    }

    /// All tokens there are, those in flight included.
    pub(crate) fn num_tokens(&self) -> usize {
        self.tokens.len() + self.num_pending
    }

    /// Tokens to compute before the next one can be sampled; 0 while no further one is wanted.
    pub(crate) fn num_remaining(&self) -> usize {
        // The last token wanted needs no KV: nothing comes after it.
        let wanted = self.num_prompt_tokens() + self.request.stop.max_tokens as usize - 1;
        let remaining = self.num_tokens().min(wanted) - self.num_computed_tokens;
        // The row that samples has to wait for its mask.
        remaining.saturating_sub(usize::from(self.lacks_mask()))
    }

    /// Whether it is not known yet which tokens may come next.
    pub(crate) fn lacks_mask(&self) -> bool {
        matches!(self.guide, Guide::Sampling(_) | Guide::Away)
    }

    /// Whether its next token may be any, whatever came before.
    pub(crate) fn chooses_freely(&self) -> bool {
        matches!(self.guide, Guide::Free)
            && !self.needs_history
            && self.num_generated() >= self.request.stop.min_tokens as usize
    }

    /// Its mask, for the step that is being launched.
    pub(crate) fn take_mask(&mut self) -> Option<TokenMask> {
        let (guide, mask) = match std::mem::replace(&mut self.guide, Guide::Free) {
            Guide::Ready(constraint, mask) => (Guide::Sampling(constraint), Some(mask)),
            Guide::Fixed(mask) => (Guide::Fixed(Arc::clone(&mask)), Some(mask)),
            guide => {
                debug_assert!(matches!(guide, Guide::Free), "a row that samples has its mask");
                (guide, None)
            }
        };
        self.guide = guide;
        mask
    }

    /// What the constraint has to do now that the token it waited for is known.
    pub(crate) fn mask_job(&mut self, token: TokenId) -> Option<MaskJob> {
        if matches!(self.guide, Guide::Free) {
            return None;
        }
        match std::mem::replace(&mut self.guide, Guide::Away) {
            Guide::Sampling(constraint) => Some(MaskJob {
                id: self.id,
                constraint,
                token: Some(token),
            }),
            guide => {
                self.guide = guide;
                None
            }
        }
    }

    /// The first position whose row still scores a prompt token; all before it may come from the prefix cache. `None` when
    /// no row does.
    pub(crate) fn next_to_score(&self) -> Option<usize> {
        let scoring = self.scoring.as_ref()?;
        (scoring.num_launched + 1 < self.num_prompt_tokens()).then_some(scoring.num_launched)
    }

    /// Positions among `start..end` whose rows score a prompt token.
    pub(crate) fn rows_to_score(&self, start: usize, end: usize) -> Range<usize> {
        let Some(next) = self.next_to_score() else {
            return end..end;
        };
        start.max(next)..end.min(self.num_prompt_tokens() - 1)
    }

    /// Nothing is to be generated, and every score wanted is on its way.
    pub(crate) fn only_awaits_scores(&self) -> bool {
        self.request.stop.max_tokens == 0 && self.next_to_score().is_none()
    }

    /// Takes in a collected score.
    pub(crate) fn push_score(&mut self) -> Option<FinishReason> {
        let num_wanted = self.num_prompt_tokens() - 1;
        let scoring = self.scoring.as_mut().expect("a score was asked for");
        scoring.num_collected += 1;
        let is_last = scoring.num_collected == num_wanted && self.request.stop.max_tokens == 0;
        is_last.then_some(FinishReason::Length)
    }

    /// Takes in a collected token.
    pub(crate) fn push(&mut self, token: TokenId) -> Option<FinishReason> {
        self.num_pending -= 1;
        self.tokens.push(token);
        if self.request.stop.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(token));
        }
        let num_generated = self.tokens.len() - self.num_prompt_tokens();
        (num_generated >= self.request.stop.max_tokens as usize).then_some(FinishReason::Length)
    }

    /// Gives up all blocks, to compute everything again later. Tokens in flight still count.
    pub(crate) fn preempt(&mut self) -> BlockTable {
        self.is_running = false;
        self.num_computed_tokens = 0;
        self.num_preemptions += 1;
        std::mem::replace(&mut self.table, BlockTable::new(self.request.cache_salt))
    }
}
