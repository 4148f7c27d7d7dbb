//! One step's inputs, and how its attention is split.

use lapidary_engine::{Batch, BlockId, TokenId};

use crate::ops::attention::TILE_TOKENS;

/// Made by `begin`, used by every layer.
#[derive(Debug)]
pub struct Plan {
    /// With the tokens of the previous step in place.
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    pub(crate) block_ids: Vec<BlockId>,
    /// Rows of tokens whose logits are wanted.
    pub(crate) sample_rows: Vec<u32>,
    pub(crate) tiles: Vec<Tile>,
    /// `[num_kv_heads * tiles + 1]` where each task's piece of the attention output starts, in elements.
    pub(crate) tile_starts: Vec<usize>,
}

/// Adjacent tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) first_row: usize,
    pub(crate) num_rows: usize,
    /// Where the sequence's blocks start in `block_ids`.
    pub(crate) first_block: usize,
}

impl Plan {
    /// `head_width` is the elements of all query heads that share a key/value head.
    pub(crate) fn new(batch: &Batch, token_ids: Vec<TokenId>, num_kv_heads: usize, head_width: usize) -> Self {
        let mut tiles = Vec::with_capacity(batch.num_seqs() + batch.num_tokens() / TILE_TOKENS);
        for (rows, blocks) in batch.query_start.windows(2).zip(&batch.block_start) {
            for first_row in (rows[0] as usize..rows[1] as usize).step_by(TILE_TOKENS) {
                let num_rows = TILE_TOKENS.min(rows[1] as usize - first_row);
                tiles.push(Tile {
                    first_row,
                    num_rows,
                    first_block: *blocks as usize,
                });
            }
        }
        let num_tokens = batch.num_tokens();
        let starts = |head: usize| {
            let tiles = tiles.iter();
            tiles.map(move |tile| (head * num_tokens + tile.first_row) * head_width)
        };
        let mut tile_starts: Vec<usize> = (0..num_kv_heads).flat_map(starts).collect();
        tile_starts.push(num_kv_heads * num_tokens * head_width);
        Self {
            token_ids,
            positions: batch.positions.clone(),
            slots: batch.slot_mapping.clone(),
            block_ids: batch.block_ids.clone(),
            sample_rows: batch.samples.iter().map(|sample| sample.row).collect(),
            tiles,
            tile_starts,
        }
    }

    pub(crate) fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }
}
