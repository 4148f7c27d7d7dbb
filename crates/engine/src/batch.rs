//! One step's ragged inputs as plain vectors. Whatever the executor must know is here and nowhere else.

use std::sync::Arc;

use crate::{RequestId, SamplingParams, TokenId, TokenMask};

/// Index of a KV block (kernels call it a page).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// The work of one step: `num_seqs` sequences, `num_tokens` tokens in all.
///
/// Sequence `i` owns rows `query_start[i]..query_start[i + 1]` of the per-token vectors and entries
/// `block_start[i]..block_start[i + 1]` of `block_ids`.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Counts launched steps from 0.
    pub step: u64,
    /// `[num_seqs]` whose tokens these are.
    pub request_ids: Vec<RequestId>,
    /// `[num_tokens]` input tokens; rows named in `fed` hold 0.
    pub token_ids: Vec<TokenId>,
    /// Rows whose input is a token the step before sampled, which the host may not know yet.
    pub fed: Vec<FedToken>,
    /// `[num_tokens]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[num_tokens]` `block_id * block_size + offset`: where each token's K and V go.
    pub slot_mapping: Vec<u32>,
    /// `[num_seqs + 1]` prefix sums of tokens a sequence (FlashInfer's `qo_indptr`).
    pub query_start: Vec<u32>,
    /// `[num_seqs]` KV length after this step.
    pub context_lens: Vec<u32>,
    /// `[num_seqs + 1]` prefix sums of blocks a sequence (FlashInfer's `kv_indptr`).
    pub block_start: Vec<u32>,
    /// Block tables, one after another, covering `context_lens`.
    pub block_ids: Vec<BlockId>,
    /// The rows whose logits are wanted, in the order `collect` answers.
    pub samples: Vec<SampleRow>,
}

/// Row `row` takes the token that `samples[prev_sample]` of the previous launched step sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FedToken {
    /// Into [`Batch::token_ids`].
    pub row: u32,
    /// Into the previous step's [`Batch::samples`].
    pub prev_sample: u32,
}

/// A token to sample, or to score.
#[derive(Debug, Clone)]
pub struct SampleRow {
    /// Row of [`Batch::token_ids`] whose output predicts the token.
    pub row: u32,
    /// Position the sampled token will take; with [`SamplingParams::seed`] it keys the randomness.
    pub position: u32,
    /// This token is the answer, whatever the distribution: nothing is chosen, and only its log-probability, its rank and
    /// the best alternatives are wanted ([`SamplingParams::logprobs`] of `params`; the rest of the row is at its default).
    /// No later step is fed by such a row.
    pub given: Option<TokenId>,
    /// How to choose.
    pub params: Arc<SamplingParams>,
    /// Tokens that must not be chosen (`min_tokens` not reached).
    pub banned: Option<Arc<[TokenId]>>,
    /// Only tokens in this mask may be chosen; at least one of them is not banned.
    pub mask: Option<TokenMask>,
    /// Present when [`SamplingParams::needs_history`].
    pub history: Option<TokenHistory>,
}

/// What penalties look at. When the row's input is a [`FedToken`], that token counts as output too, though it is not in
/// `output`.
#[derive(Debug, Clone)]
pub struct TokenHistory {
    /// The request's prompt.
    pub prompt: Arc<[TokenId]>,
    /// Tokens generated so far, as far as the host knows.
    pub output: Vec<TokenId>,
}

impl Batch {
    /// Tokens computed in this step.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences in this step.
    #[must_use]
    pub fn num_seqs(&self) -> usize {
        self.request_ids.len()
    }
}
