//! Finds published blocks by the hash of what they hold.

use crate::BlockId;

/// No block: ends a chain, on both sides.
const END: u32 = u32::MAX;
/// Instead of a successor: the block is in no chain.
const ABSENT: u32 = END - 1;

/// A hash table that chains the blocks themselves, one block a hash at most.
///
/// Blocks are evicted in an order that no cache foresees. So that each costs few misses, its own entry says all that its
/// removal has to know: the others that change are written and not read.
#[derive(Debug)]
pub(crate) struct BlockIndex {
    /// The first block of each chain. Their number is a power of two, and no less than that of blocks.
    heads: Vec<u32>,
    /// `[num_blocks]`
    entries: Vec<Entry>,
    len: usize,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    hash: u64,
    /// The block before in the chain, or [`END`].
    prev: u32,
    /// The block after, [`END`] or [`ABSENT`].
    next: u32,
}

impl BlockIndex {
    /// # Panics
    /// When there are 2^32 - 2 blocks or more.
    pub(crate) fn new(num_blocks: u32) -> Self {
        assert!(num_blocks < ABSENT, "{num_blocks} KV blocks are too many to index");
        let absent = Entry {
            hash: 0,
            prev: END,
            next: ABSENT,
        };
        Self {
            heads: vec![END; (num_blocks as usize).next_power_of_two()],
            entries: vec![absent; num_blocks as usize],
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.entries[block.0 as usize].next != ABSENT
    }

    pub(crate) fn get(&self, hash: u64) -> Option<BlockId> {
        let mut block = self.heads[self.bucket(hash)];
        while block != END {
            let entry = self.entries[block as usize];
            if entry.hash == hash {
                return Some(BlockId(block));
            }
            block = entry.next;
        }
        None
    }

    /// Lists a block that is not listed, in place of whichever had this hash.
    pub(crate) fn insert(&mut self, hash: u64, block: BlockId) {
        debug_assert!(!self.contains(block), "block {} has a hash already", block.0);
        if let Some(previous) = self.get(hash) {
            self.remove(previous);
        }
        let bucket = self.bucket(hash);
        let next = std::mem::replace(&mut self.heads[bucket], block.0);
        if next != END {
            self.entries[next as usize].prev = block.0;
        }
        self.entries[block.0 as usize] = Entry { hash, prev: END, next };
        self.len += 1;
    }

    /// Forgets a block, listed or not.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let Entry { hash, prev, next } = self.entries[block.0 as usize];
        if next == ABSENT {
            return;
        }
        if prev == END {
            let bucket = self.bucket(hash);
            self.heads[bucket] = next;
        } else {
            self.entries[prev as usize].next = next;
        }
        if next != END {
            self.entries[next as usize].prev = prev;
        }
        self.entries[block.0 as usize].next = ABSENT;
        self.len -= 1;
    }

    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.heads.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const NUM_BLOCKS: u32 = 12;

    /// Lists a block by a hash (under none before), or forgets it.
    fn operations() -> impl Strategy<Value = Vec<(u32, Option<u64>)>> {
        // Three times as many hashes as buckets: chains are long, and hashes come again.
        proptest::collection::vec((0..NUM_BLOCKS, proptest::option::weighted(0.7, 0..48_u64)), 1..200)
    }

    proptest! {
        #[test]
        fn it_finds_what_a_map_of_the_same_entries_finds(operations in operations()) {
            let mut index = BlockIndex::new(NUM_BLOCKS);
            let mut expected = HashMap::new();
            for (block, hash) in operations {
                index.remove(BlockId(block));
                expected.retain(|_, other| *other != block);
                if let Some(hash) = hash {
                    index.insert(hash, BlockId(block));
                    expected.insert(hash, block);
                }
                prop_assert_eq!(index.len(), expected.len());
                for hash in 0..48 {
                    prop_assert_eq!(index.get(hash).map(|block| block.0), expected.get(&hash).copied());
                }
                for block in 0..NUM_BLOCKS {
                    let is_listed = expected.values().any(|&other| other == block);
                    prop_assert_eq!(index.contains(BlockId(block)), is_listed);
                }
            }
        }
    }

    #[test]
    fn an_index_of_no_blocks_finds_nothing() {
        assert_eq!(BlockIndex::new(0).get(7), None);
    }
}
