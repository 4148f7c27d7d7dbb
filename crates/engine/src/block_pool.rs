//! Which KV blocks are held, how often, and in which order free ones are used again.

use crate::BlockId;

/// Reference counts of all blocks and the list of free ones, least recently used first.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// One node a block, and a last one that is head and tail of the ring of free blocks.
    nodes: Vec<Node>,
    num_free: usize,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    ref_count: u32,
    /// Neighbours in the ring of free blocks; meaningless while the block is held.
    prev: u32,
    next: u32,
}

/// Where a block that nobody holds any more joins the free ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// Its content is worthless.
    First,
    /// Its content may be matched again.
    Last,
}

impl BlockPool {
    pub(crate) fn new(num_blocks: u32) -> Self {
        let ring = num_blocks;
        let mut pool = Self {
            nodes: vec![
                Node {
                    ref_count: 0,
                    prev: ring,
                    next: ring
                };
                ring as usize + 1
            ],
            num_free: 0,
        };
        for block in 0..num_blocks {
            pool.insert_free(BlockId(block), Reuse::Last);
        }
        pool
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.nodes.len() - 1
    }

    pub(crate) fn num_free(&self) -> usize {
        self.num_free
    }

    pub(crate) fn ref_count(&self, block: BlockId) -> u32 {
        self.nodes[block.0 as usize].ref_count
    }

    /// Takes the free block that was unused for longest.
    pub(crate) fn take(&mut self) -> Option<BlockId> {
        if self.num_free == 0 {
            return None;
        }
        let block = BlockId(self.nodes[self.ring()].next);
        self.hold(block);
        Some(block)
    }

    /// Takes one more reference; the block may be free.
    pub(crate) fn hold(&mut self, block: BlockId) {
        let node = self.nodes[block.0 as usize];
        if node.ref_count == 0 {
            self.nodes[node.prev as usize].next = node.next;
            self.nodes[node.next as usize].prev = node.prev;
            self.num_free -= 1;
        }
        self.nodes[block.0 as usize].ref_count += 1;
    }

    /// Gives a reference back; the last one frees the block.
    pub(crate) fn let_go(&mut self, block: BlockId, reuse: Reuse) {
        let node = &mut self.nodes[block.0 as usize];
        assert!(
            node.ref_count > 0,
            "block {} is released more often than it was taken",
            block.0
        );
        node.ref_count -= 1;
        if node.ref_count == 0 {
            self.insert_free(block, reuse);
        }
    }

    fn ring(&self) -> usize {
        self.nodes.len() - 1
    }

    fn insert_free(&mut self, block: BlockId, reuse: Reuse) {
        let ring = self.ring();
        let (prev, next) = match reuse {
            Reuse::First => (ring as u32, self.nodes[ring].next),
            Reuse::Last => (self.nodes[ring].prev, ring as u32),
        };
        self.nodes[prev as usize].next = block.0;
        self.nodes[next as usize].prev = block.0;
        let node = &mut self.nodes[block.0 as usize];
        (node.prev, node.next) = (prev, next);
        self.num_free += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worthless_blocks_are_used_before_cached_ones_and_those_in_order_of_release() {
        let mut pool = BlockPool::new(4);
        let blocks: Vec<_> = (0..4).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.take(), None);
        pool.let_go(blocks[2], Reuse::Last);
        pool.let_go(blocks[0], Reuse::Last);
        pool.let_go(blocks[3], Reuse::First);
        let order: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(order, [blocks[3], blocks[2], blocks[0]]);
    }

    #[test]
    fn a_free_block_that_is_held_again_leaves_the_free_list_and_keeps_it_whole() {
        let mut pool = BlockPool::new(3);
        pool.hold(BlockId(1));
        pool.hold(BlockId(1));
        assert_eq!((pool.num_free(), pool.ref_count(BlockId(1))), (2, 2));
        pool.let_go(BlockId(1), Reuse::Last);
        assert_eq!(pool.num_free(), 2);
        pool.let_go(BlockId(1), Reuse::Last);
        let order: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(order, [BlockId(0), BlockId(2), BlockId(1)]);
    }
}
