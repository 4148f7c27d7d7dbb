//! Who owns which KV block, and which blocks hold a prefix that another sequence can use.
//!
//! A full block whose tokens were computed and collected is *published*: found again by a hash of its tokens and of all
//! tokens before them. A hash only finds candidates. What makes a match is the content: equal tokens behind an equal
//! parent, so that a collision can never serve another prompt's KV.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;

use crate::block_index::BlockIndex;
use crate::block_pool::{BlockPool, Reuse};
use crate::{BlockId, KvCacheConfig, TokenId};

/// The blocks a sequence holds, in order of position. To be given back with [`KvCacheManager::release`].
#[must_use = "blocks that are not released leak"]
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    cache_salt: u128,
    /// Blocks from the start whose content is published, by this sequence or another.
    num_published: usize,
    /// Content of the last of those.
    parent: Option<ContentId>,
}

impl BlockTable {
    /// A table without blocks, for a sequence of this salt.
    pub fn new(cache_salt: u128) -> Self {
        Self {
            blocks: Vec::new(),
            cache_salt,
            num_published: 0,
            parent: None,
        }
    }

    /// The blocks, in order of position.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Blocks from the start that other sequences can match.
    #[must_use]
    pub fn num_published(&self) -> usize {
        self.num_published
    }
}

/// Never reused, so that it stands for the tokens of a block, of all before it, and for the salt before those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ContentId(NonZeroU64);

/// What a published block holds; its tokens are in [`KvCacheManager::tokens`].
#[derive(Debug, Clone, Copy)]
struct Content {
    id: ContentId,
    /// What the block before holds. `None` before the first, whose salt is in [`KvCacheManager::salts`].
    parent: Option<ContentId>,
}

/// Chained hashes of a sequence's full blocks, computed as its tokens become known.
#[derive(Debug, Clone)]
pub struct PrefixHashes {
    root: u64,
    hashes: Vec<u64>,
}

impl PrefixHashes {
    /// Number of blocks from the start that have equal hashes in both, `limit` at most.
    pub(crate) fn common_blocks(&self, other: &Self, limit: usize) -> usize {
        let (mut low, mut high) = (0, limit.min(self.hashes.len()).min(other.hashes.len()));
        // Chained: where one block is equal, all before it are.
        while low < high {
            let middle = (low + high).div_ceil(2);
            if self.hashes[middle - 1] == other.hashes[middle - 1] {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low
    }

    /// Whether block `index` is known to both and has equal hashes.
    pub(crate) fn share_block(&self, other: &Self, index: usize) -> bool {
        matches!((self.hashes.get(index), other.hashes.get(index)), (Some(a), Some(b)) if a == b)
    }
}

/// More blocks are needed than are free. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks needed, {free} free")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks free.
    pub free: usize,
}

/// Hands out KV blocks and finds those that can be shared.
#[derive(Debug)]
pub struct KvCacheManager {
    pool: BlockPool,
    block_size: usize,
    enable_prefix_caching: bool,
    /// Published blocks by hash: the latest where hashes collide.
    published: BlockIndex,
    /// `[num_blocks]` what published blocks hold; of others, what they once held.
    contents: Vec<Content>,
    /// `[num_blocks]` of those without a parent.
    salts: Vec<u128>,
    /// `[num_blocks, block_size]` the tokens of that.
    tokens: Vec<TokenId>,
    next_content: ContentId,
    /// Differs from process to process, so that nobody outside can craft collisions.
    seed: u64,
    /// All ones; tests narrow it to make hashes collide.
    hash_mask: u64,
}

impl KvCacheManager {
    /// All blocks free.
    ///
    /// # Panics
    /// When blocks have no size.
    #[must_use]
    pub fn new(config: KvCacheConfig, enable_prefix_caching: bool) -> Self {
        assert!(config.block_size > 0, "a KV block holds at least one token");
        let block_size = config.block_size as usize;
        let num_cacheable = if enable_prefix_caching { config.num_blocks } else { 0 } as usize;
        let next_content = ContentId(NonZeroU64::MIN);
        let unused = Content {
            id: next_content,
            parent: None,
        };
        Self {
            pool: BlockPool::new(config.num_blocks),
            block_size,
            enable_prefix_caching,
            published: BlockIndex::new(config.num_blocks),
            contents: vec![unused; num_cacheable],
            salts: vec![0; num_cacheable],
            tokens: vec![0; num_cacheable * block_size],
            next_content,
            seed: RandomState::new().hash_one(config.num_blocks),
            hash_mask: u64::MAX,
        }
    }

    /// Tokens a block holds.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks there are.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.pool.num_blocks()
    }

    /// Blocks no table holds; published ones among them can still be matched.
    #[must_use]
    pub fn num_free_blocks(&self) -> usize {
        self.pool.num_free()
    }

    /// Blocks that can be matched.
    #[must_use]
    pub fn num_cached_blocks(&self) -> usize {
        self.published.len()
    }

    /// How many blocks `num_tokens` tokens take.
    #[must_use]
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Blocks of `table` that no other table holds: those that releasing it would free.
    #[must_use]
    pub fn num_exclusive_blocks(&self, table: &BlockTable) -> usize {
        table
            .blocks
            .iter()
            .filter(|&&block| self.pool.ref_count(block) == 1)
            .count()
    }

    /// Hashes of nothing yet, for a sequence of this salt.
    #[must_use]
    pub fn hashes(&self, cache_salt: u128) -> PrefixHashes {
        let root = mix(self.seed ^ cache_salt as u64, HASH_KEY ^ (cache_salt >> 64) as u64);
        PrefixHashes {
            root,
            hashes: Vec::new(),
        }
    }

    /// Brings `hashes` up to all full blocks of `tokens`, of which the first ones are hashed already.
    pub fn extend_hashes(&self, hashes: &mut PrefixHashes, tokens: &[TokenId]) {
        if !self.enable_prefix_caching {
            return;
        }
        let mut parent = hashes.hashes.last().copied().unwrap_or(hashes.root);
        let start = hashes.hashes.len() * self.block_size;
        for block in tokens[start..].chunks_exact(self.block_size) {
            parent = hash_block(parent, block) & self.hash_mask;
            hashes.hashes.push(parent);
        }
    }

    /// Takes references on the longest published prefix of `tokens`. Never on all of it: the last token is left to be
    /// computed, since it is what predicts the next one.
    pub fn match_prefix(&mut self, tokens: &[TokenId], cache_salt: u128, hashes: &PrefixHashes) -> BlockTable {
        let mut table = BlockTable::new(cache_salt);
        let limit = tokens.len().saturating_sub(1) / self.block_size;
        for (block_tokens, &hash) in tokens.chunks_exact(self.block_size).zip(&hashes.hashes).take(limit) {
            let Some((block, content)) = self.find(hash, &table, block_tokens) else {
                break;
            };
            self.pool.hold(block);
            table.blocks.push(block);
            table.num_published += 1;
            table.parent = Some(content);
        }
        table
    }

    /// Adds blocks until the table has room for `num_tokens` tokens: all that are needed, or none.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when too few are free.
    pub fn grow(&mut self, table: &mut BlockTable, num_tokens: usize) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(num_tokens).saturating_sub(table.blocks.len());
        let free = self.pool.num_free();
        if needed > free {
            return Err(OutOfBlocks { needed, free });
        }
        for _ in 0..needed {
            let block = self.pool.take().expect("as many blocks are free as were counted");
            self.published.remove(block);
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Lets others match the full blocks of the first `num_computed` tokens, whose KV is known to be good.
    pub fn publish(&mut self, table: &mut BlockTable, tokens: &[TokenId], hashes: &PrefixHashes, num_computed: usize) {
        if !self.enable_prefix_caching {
            return;
        }
        while table.num_published < num_computed / self.block_size {
            let index = table.num_published;
            let block_tokens = &tokens[index * self.block_size..][..self.block_size];
            let hash = hashes.hashes[index];
            let content = match self.find(hash, table, block_tokens) {
                Some((_, content)) => content,
                None => self.insert(table.blocks[index], hash, table, block_tokens),
            };
            table.parent = Some(content);
            table.num_published += 1;
        }
    }

    /// Gives all blocks of a table back. Published ones stay matchable until they are needed.
    pub fn release(&mut self, table: BlockTable) {
        // Last block first: the end of a prefix is useless without its start, so it goes first.
        for block in table.blocks.into_iter().rev() {
            let reuse = if self.published.contains(block) {
                Reuse::Last
            } else {
                Reuse::First
            };
            self.pool.let_go(block, reuse);
        }
    }

    /// The block that holds `tokens` behind the published ones of `before`.
    fn find(&self, hash: u64, before: &BlockTable, tokens: &[TokenId]) -> Option<(BlockId, ContentId)> {
        let block = self.published.get(hash)?;
        let content = self.contents[block.0 as usize];
        let is_behind = content.parent == before.parent
            && (content.parent.is_some() || self.salts[block.0 as usize] == before.cache_salt);
        (is_behind && self.tokens_of(block) == tokens).then_some((block, content.id))
    }

    /// Publishes a block that holds `tokens` behind the published ones of `before`.
    fn insert(&mut self, block: BlockId, hash: u64, before: &BlockTable, tokens: &[TokenId]) -> ContentId {
        let id = self.next_content;
        self.next_content = ContentId(id.0.checked_add(1).expect("2^64 contents take ages"));
        // Whoever had this hash is a collision, or lost its parent and can't be matched any more.
        self.published.insert(hash, block);
        let parent = before.parent;
        self.contents[block.0 as usize] = Content { id, parent };
        if parent.is_none() {
            self.salts[block.0 as usize] = before.cache_salt;
        }
        let start = block.0 as usize * self.block_size;
        self.tokens[start..start + self.block_size].copy_from_slice(tokens);
        id
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let start = block.0 as usize * self.block_size;
        &self.tokens[start..start + self.block_size]
    }
}

/// An odd constant without structure (the golden ratio's fraction).
const HASH_KEY: u64 = 0x9e37_79b9_7f4a_7c15;

/// Multiplies to 128 bits and folds: wyhash's step, two tokens at a time.
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ (product >> 64) as u64
}

fn hash_block(parent: u64, tokens: &[TokenId]) -> u64 {
    let mut hash = parent ^ HASH_KEY;
    for pair in tokens.chunks(2) {
        let second = pair.get(1).copied().unwrap_or(0);
        // Never 0, which the multiplication would keep.
        hash = mix(hash ^ u64::from(pair[0]), HASH_KEY ^ (u64::from(second) << 32));
    }
    mix(hash, !HASH_KEY)
}

#[cfg(test)]
impl KvCacheManager {
    /// Makes almost all hashes collide.
    pub(crate) fn narrow_hashes(&mut self) {
        self.hash_mask = 1;
    }

    /// Checks what must hold whatever happened, given all tables that exist.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut refs = vec![0; self.num_blocks()];
        for table in tables {
            for (index, block) in table.blocks.iter().enumerate() {
                refs[block.0 as usize] += 1;
                assert!(!table.blocks[..index].contains(block), "a table holds a block twice");
            }
        }
        for (index, &count) in refs.iter().enumerate() {
            assert_eq!(
                self.pool.ref_count(BlockId(index as u32)),
                count,
                "references to block {index}"
            );
        }
        assert_eq!(self.num_free_blocks(), refs.iter().filter(|&&count| count == 0).count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(num_blocks: u32) -> KvCacheManager {
        KvCacheManager::new(
            KvCacheConfig {
                num_blocks,
                block_size: 4,
            },
            true,
        )
    }

    /// Computes `tokens` as a sequence would and leaves its full blocks published.
    fn compute(kv: &mut KvCacheManager, tokens: &[TokenId], salt: u128) -> BlockTable {
        let mut hashes = kv.hashes(salt);
        kv.extend_hashes(&mut hashes, tokens);
        let mut table = kv.match_prefix(tokens, salt, &hashes);
        kv.grow(&mut table, tokens.len()).unwrap();
        kv.publish(&mut table, tokens, &hashes, tokens.len());
        table
    }

    fn matched(kv: &mut KvCacheManager, tokens: &[TokenId], salt: u128) -> usize {
        let mut hashes = kv.hashes(salt);
        kv.extend_hashes(&mut hashes, tokens);
        let table = kv.match_prefix(tokens, salt, &hashes);
        let num_blocks = table.blocks().len();
        kv.release(table);
        num_blocks
    }

    #[test]
    fn a_released_prefix_is_matched_but_for_the_last_token() {
        let mut kv = manager(8);
        let tokens: Vec<_> = (0..8).collect();
        let table = compute(&mut kv, &tokens, 0);
        kv.release(table);
        assert_eq!(kv.num_free_blocks(), 8);
        assert_eq!(matched(&mut kv, &tokens, 0), 1, "the second block holds the last token");
        assert_eq!(matched(&mut kv, &[0, 1, 2, 3, 4, 5, 6, 7, 8], 0), 2);
        assert_eq!(matched(&mut kv, &[9, 1, 2, 3, 4, 5, 6, 7, 8], 0), 0);
    }

    #[test]
    fn another_salt_shares_nothing() {
        let mut kv = manager(8);
        let tokens: Vec<_> = (0..9).collect();
        let table = compute(&mut kv, &tokens, 1);
        kv.release(table);
        assert_eq!(matched(&mut kv, &tokens, 2), 0);
        assert_eq!(matched(&mut kv, &tokens, 1), 2);
    }

    #[test]
    fn colliding_hashes_never_match_other_tokens_or_another_salt() {
        let mut kv = manager(16);
        kv.narrow_hashes();
        for start in 0..20 {
            let tokens: Vec<_> = (start..start + 9).collect();
            assert_eq!(matched(&mut kv, &tokens, u128::from(start)), 0);
            let table = compute(&mut kv, &tokens, u128::from(start));
            kv.release(table);
            assert_eq!(matched(&mut kv, &tokens, u128::from(start) + 100), 0);
            kv.check(std::iter::empty());
        }
    }

    #[test]
    fn equal_tokens_behind_another_prefix_do_not_match() {
        let mut kv = manager(16);
        kv.narrow_hashes();
        let table = compute(&mut kv, &[1, 1, 1, 1, 7, 7, 7, 7, 0], 0);
        kv.release(table);
        let table = compute(&mut kv, &[2, 2, 2, 2, 7, 7, 7, 7, 0], 0);
        assert_ne!(table.blocks()[1], BlockId(1));
        kv.release(table);
        kv.check(std::iter::empty());
    }

    #[test]
    fn growing_takes_all_blocks_or_none() {
        let mut kv = manager(3);
        let mut table = BlockTable::new(0);
        kv.grow(&mut table, 5).unwrap();
        assert_eq!(kv.grow(&mut table, 17), Err(OutOfBlocks { needed: 3, free: 1 }));
        assert_eq!((table.blocks().len(), kv.num_free_blocks()), (2, 1));
        kv.release(table);
    }

    #[test]
    fn the_end_of_a_prefix_is_forgotten_before_its_start() {
        let mut kv = manager(4);
        let tokens: Vec<_> = (0..13).collect();
        let table = compute(&mut kv, &tokens, 0);
        kv.release(table);
        let mut other = BlockTable::new(0);
        // One block was never published, the next to go is the last published one.
        kv.grow(&mut other, 8).unwrap();
        assert_eq!(matched(&mut kv, &tokens, 0), 2);
        kv.release(other);
    }

    #[test]
    fn two_sequences_that_computed_the_same_block_publish_one_of_them() {
        let mut kv = manager(8);
        let tokens: Vec<_> = (0..9).collect();
        let mut hashes = kv.hashes(0);
        kv.extend_hashes(&mut hashes, &tokens);
        let mut tables = [BlockTable::new(0), BlockTable::new(0)];
        for table in &mut tables {
            kv.grow(table, 9).unwrap();
            kv.publish(table, &tokens, &hashes, 9);
        }
        kv.check(tables.iter());
        assert_eq!(kv.num_cached_blocks(), 2);
        tables.into_iter().for_each(|table| kv.release(table));
        assert_eq!(matched(&mut kv, &tokens, 0), 2);
    }

    #[test]
    fn common_blocks_ends_where_tokens_differ() {
        let kv = manager(1);
        let hashes = |tokens: &[TokenId]| {
            let mut hashes = kv.hashes(0);
            kv.extend_hashes(&mut hashes, tokens);
            hashes
        };
        let tokens: Vec<_> = (0..40).collect();
        let mut other = tokens.clone();
        other[21] = 99;
        assert_eq!(hashes(&tokens).common_blocks(&hashes(&other), 10), 5);
        assert_eq!(hashes(&tokens).common_blocks(&hashes(&other), 3), 3);
        assert_eq!(hashes(&tokens).common_blocks(&hashes(&tokens[..16]), 10), 4);
        assert!(hashes(&tokens).share_block(&hashes(&other), 4));
        assert!(!hashes(&tokens).share_block(&hashes(&other), 5));
    }
}
