//! Blocks of an e4m3 cache as bf16, for the prefill kernels: `kernels/attention_widen.cu`. What the prompts of a step read is
//! widened for each layer, into memory for a few sequences: many long ones take turns.

use std::ops::Range;

use lapidary_engine::Batch;
use lapidary_model::{AttentionConfig, BackendError, StepLimits};

use super::KEY_TILE;
use crate::device::{Device, DevicePtr, Grid, Kernel, bytes_of, kernel_params, launch};

const THREADS: usize = 256;
/// Values that a thread widens at a time.
const VALUES: usize = 16;
/// Tokens for which there is room beside a longest sequence and a step's own: what sequences leave unused of their last blocks.
const SPARE_TOKENS: usize = 1024;
/// Tokens that the prompts of a recorded step read at most, with those that came before them, in whole blocks: it widens no
/// more.
const RECORDED_TOKENS: usize = 2048;
/// Which block goes where, for threads that have none to widen.
const NO_PAIR: [i32; 2] = [-1, -1];

/// The kernel's `WidenParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct WidenParams {
    from: DevicePtr,
    to: DevicePtr,
    blocks: DevicePtr,
    block_rows: i32,
    head_dim: i32,
}

kernel_params!(WidenParams);

/// Sequences whose keys and values are widened together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Round {
    /// Of the step's sequences.
    pub(super) seqs: Range<usize>,
    /// Of the step's pairs of blocks.
    blocks: Range<usize>,
}

/// Rounds of a step, and its block table with the places of widened blocks instead.
#[derive(Debug, PartialEq, Eq)]
struct Rounds {
    rounds: Vec<Round>,
    /// Which block of the cache goes where.
    pairs: Vec<[i32; 2]>,
    table: Vec<i32>,
}

/// The kernel, and where it writes.
#[derive(Debug)]
pub(super) struct Widening {
    kernel: Kernel,
    config: AttentionConfig,
    max_tokens: usize,
    /// bf16 `[blocks][K, V][num_kv_heads][block_size][head_dim]`.
    widened: DevicePtr,
    pairs: DevicePtr,
    table: DevicePtr,
}

impl Widening {
    /// # Errors
    /// Not enough memory.
    pub(super) fn new(
        device: &mut dyn Device,
        config: AttentionConfig,
        limits: StepLimits,
    ) -> Result<Self, BackendError> {
        let max_tokens = limits.max_model_len + limits.max_tokens + SPARE_TOKENS;
        let max_blocks = limits.max_seqs * limits.max_model_len.div_ceil(KEY_TILE);
        let max_pairs = max_blocks.max(recorded_blocks(KEY_TILE));
        let token_bytes = 2 * config.num_kv_heads * config.head_dim * 2;
        Ok(Self {
            kernel: device.kernel("attention_widen", THREADS as u32)?,
            config,
            max_tokens,
            widened: device.alloc("keys and values of prompts", max_tokens * token_bytes)?,
            pairs: device.alloc("blocks of prompts", 8 * max_pairs)?,
            table: device.alloc("blocks of prompts", 4 * max_blocks)?,
        })
    }

    /// Splits the step's prompts into rounds and brings what the kernels must know of them to the device.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn plan(
        &self,
        device: &mut dyn Device,
        batch: &Batch,
        block_size: usize,
    ) -> Result<Vec<Round>, BackendError> {
        let Rounds { rounds, pairs, table } = self.split(batch, block_size);
        if !pairs.is_empty() {
            self.upload(device, &pairs, &table)?;
        }
        Ok(rounds)
    }

    /// Whether a recorded step has room for the blocks of a step's prompts.
    pub(super) fn has_room(&self, batch: &Batch, block_size: usize) -> bool {
        self.split(batch, block_size).is_one_of(recorded_blocks(block_size))
    }

    /// As [`Widening::plan`], for a step that runs as a recorded one, which [`Widening::has_room`] for it: one round, the same
    /// for all.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn plan_recorded(
        &self,
        device: &mut dyn Device,
        batch: &Batch,
        block_size: usize,
    ) -> Result<Round, BackendError> {
        let Rounds { mut pairs, table, .. } = self.split(batch, block_size);
        let blocks = recorded_blocks(block_size);
        pairs.resize(blocks, NO_PAIR);
        self.upload(device, &pairs, &table)?;
        Ok(Round {
            seqs: 0..0,
            blocks: 0..blocks,
        })
    }

    fn split(&self, batch: &Batch, block_size: usize) -> Rounds {
        split(batch, block_size, self.max_tokens / block_size)
    }

    fn upload(&self, device: &mut dyn Device, pairs: &[[i32; 2]], table: &[i32]) -> Result<(), BackendError> {
        device.upload(self.pairs, bytes_of(pairs.as_flattened()))?;
        device.upload(self.table, bytes_of(table))
    }

    /// Widens what a round's sequences read of the cache at `kv`. Gives the blocks and their table.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn run(
        &self,
        device: &mut dyn Device,
        round: &Round,
        kv: DevicePtr,
        block_size: usize,
    ) -> Result<(DevicePtr, DevicePtr), BackendError> {
        let block_rows = 2 * self.config.num_kv_heads * block_size;
        let params = WidenParams {
            from: kv,
            to: self.widened,
            blocks: self.pairs.offset(8 * round.blocks.start),
            block_rows: block_rows as i32,
            head_dim: self.config.head_dim as i32,
        };
        let pieces = (block_rows * self.config.head_dim).div_ceil(THREADS * VALUES);
        let grid = Grid {
            blocks: [round.blocks.len() as u32, pieces as u32, 1],
            shared_bytes: 0,
        };
        launch(device, &self.kernel, grid, &params)?;
        Ok((self.widened, self.table))
    }
}

impl Rounds {
    /// Whether there is one round of at most so many blocks.
    fn is_one_of(&self, max_blocks: usize) -> bool {
        self.rounds.len() == 1 && self.pairs.len() <= max_blocks
    }
}

/// Blocks that a recorded step widens.
fn recorded_blocks(block_size: usize) -> usize {
    RECORDED_TOKENS.div_ceil(block_size)
}

/// Takes sequences of more than one query token in their order, as many a round as `max_blocks` hold; one always fits.
fn split(batch: &Batch, block_size: usize, max_blocks: usize) -> Rounds {
    let mut table = vec![0; batch.block_ids.len()];
    let (mut rounds, mut pairs) = (Vec::<Round>::new(), Vec::new());
    let mut used = 0;
    for seq in 0..batch.num_seqs() {
        if batch.query_start[seq + 1] - batch.query_start[seq] < 2 {
            continue;
        }
        let first = batch.block_start[seq] as usize;
        let count = (batch.context_lens[seq] as usize).div_ceil(block_size);
        if rounds.is_empty() || used + count > max_blocks {
            used = 0;
            rounds.push(Round {
                seqs: seq..seq,
                blocks: pairs.len()..pairs.len(),
            });
        }
        for (place, index) in (used..).zip(first..first + count) {
            table[index] = place as i32;
            pairs.push([batch.block_ids[index].0 as i32, place as i32]);
        }
        used += count;
        if let Some(round) = rounds.last_mut() {
            round.seqs.end = seq + 1;
            round.blocks.end = pairs.len();
        }
    }
    Rounds { rounds, pairs, table }
}

#[cfg(test)]
mod tests {
    use lapidary_engine::{BlockId, RequestId};

    use super::*;

    #[test]
    fn prompts_are_split_into_rounds_that_fit() {
        // 3 blocks of a prompt, a decoding sequence, 2 and 4 blocks of prompts.
        let batch = Batch {
            request_ids: (0..4).map(RequestId).collect(),
            query_start: vec![0, 5, 6, 8, 72],
            context_lens: vec![40, 100, 17, 64],
            block_start: vec![0, 3, 10, 12, 16],
            block_ids: (0..16).map(|index| BlockId(100 + index)).collect(),
            ..Batch::default()
        };
        let pair = |index: i32, place: i32| [100 + index, place];
        let all = split(&batch, 16, 9);
        assert_eq!(
            all.rounds,
            [Round {
                seqs: 0..4,
                blocks: 0..9
            }]
        );
        let two = split(&batch, 16, 5);
        assert_eq!(
            two.rounds,
            [
                Round {
                    seqs: 0..3,
                    blocks: 0..5
                },
                Round {
                    seqs: 3..4,
                    blocks: 5..9
                }
            ]
        );
        let first = [pair(0, 0), pair(1, 1), pair(2, 2), pair(10, 3), pair(11, 4)];
        assert_eq!(two.pairs[..5], first);
        assert_eq!(two.pairs[5..], [pair(12, 0), pair(13, 1), pair(14, 2), pair(15, 3)]);
        assert_eq!(two.table[..3], [0, 1, 2]);
        assert_eq!(two.table[10..], [3, 4, 0, 1, 2, 3]);
        assert_eq!(split(&batch, 16, 4).rounds.len(), 3);
        assert!(all.is_one_of(9) && !all.is_one_of(8) && !two.is_one_of(9));
    }
}
