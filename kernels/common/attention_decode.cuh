// Attention of sequences with one query token over the paged KV cache: soft-cap or running maximum, window, GQA. Kernels
// differ in how tiles of keys and values reach shared memory (`Copies`), not in a bit of the result.
//
// Work: a unit is (sequence, kv head, chunk), where a chunk is a fixed number of positions aligned to absolute position,
// so that what a sequence gets never depends on the batch. Blocks walk the units with the grid's stride; each lists its own
// from the context lengths, a unit a thread, so that a captured graph needs no plan and no warp looks for its next unit
// between two. The last chunks of all sequences come after all others: with each sequence's own, a grid that is a multiple of
// a sequence's units would give some blocks whole chunks only, and others what contexts end with. The kv heads of a chunk are
// neighbours: blocks at work together read whole pages, not one head's part of many, which all lie at the same distance and
// meet in the same memory channels. In a unit four warps take 16-position tiles in turn, each with a ring of stages of its
// own: nothing but the end of a unit brings them together, and a warp's loads for the next unit are under way while this one
// is computed.
//
// Two more warps finish units: they add up what those leave in shared memory (in two buffers) and write it out, taking turns;
// no load ever waits for them. Of a sequence with several chunks that is the chunk's part, for `attention_merge` to add.
//
// A tile's products run on tensor cores (`Cache`, attention_cache.cuh), for any group of up to 8 query heads at the same cost.
// Between them, S^T is exponentiated and transposed.
//
// Bound: bytes of K and V; two products of 16 x 8 x 16 for 1 KB leave tensor cores and issue slots mostly idle.
#pragma once

#include "attention_cache.cuh"
#include "attention_chunks.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
/// Warps that finish units.
constexpr int kFinishers = 2;
constexpr int kFinishThreads = kFinishers * 32;
constexpr int kAllThreads = kThreads + kFinishThreads;
/// Buffers between the warps that compute and those that finish.
constexpr int kBuffers = 2;
/// Named barriers, of a block's every fourth unit: its buffer is full, its buffer is empty again.
constexpr int kFull = 1, kEmpty = kFull + kWarps;

/// What a block must know of a sequence.
struct __align__(16) SeqEntry {
  int first_unit;  // but for the unit of its last chunk
  int context;
  int query_row;
  int block_start;
};

/// What a unit covers: positions [first, end) of a sequence for one kv head.
struct __align__(16) Unit {
  int first;
  int end;
  int query_row;
  int block_start;
  int seq;
  int head;
  int chunk;   // among the sequence's
  int chunks;  // of the sequence

  DEVICE bool is_last() const { return chunk + 1 == chunks; }
};
static_assert(sizeof(SeqEntry) == 16 && sizeof(Unit) == 32, "what the host reserves for them");
/// Units that a block lists at a time. Between two lists its loads pause, for less than a percent of the time of so many units.
constexpr int kListed = 64;

/// Shared memory: rings of the computing warps, then what they leave at a unit's end.
template <class Cache, int D>
struct DecodeShared {
  static constexpr int kTileBytes = kTile * Cache::kBytes * D;
  uint8_t* ring;     // [warps][stages]: K [16][D], V [16][D], as in the cache, Q [group][D], bf16
  float* outputs;    // [2][warps][group][D]
  float* sums;       // [2][warps][8]
  float* maxima;     // [2][warps][8]
  uint64_t* barriers;  // [warps][stages][K, V]
  int* scratch;      // [2][8]
  Unit* units;       // [kListed]
  SeqEntry* seqs;    // [max_seqs]
  int* ends;         // [max_seqs]: sequences in the order of the units of their last chunks
  int stage_bytes;

  DEVICE DecodeShared(uint8_t* base, int stages, int group, int max_seqs) {
    stage_bytes = 2 * kTileBytes + group * 2 * D;
    ring = base;
    outputs = reinterpret_cast<float*>(base + kWarps * stages * stage_bytes);
    sums = outputs + 2 * kWarps * group * D;
    maxima = sums + 2 * kWarps * kMaxGroup;
    barriers = reinterpret_cast<uint64_t*>(maxima + 2 * kWarps * kMaxGroup);
    scratch = reinterpret_cast<int*>(barriers + 2 * kWarps * stages);
    units = reinterpret_cast<Unit*>(scratch + 16);
    seqs = reinterpret_cast<SeqEntry*>(units + kListed);
    ends = reinterpret_cast<int*>(seqs + max_seqs);
  }
};

/// The step's sequences, and how many units they have.
struct Seqs {
  const SeqEntry* entries;
  const int* ends;
  int count;
  int whole;  // units of chunks that are not their sequence's last; they come first
  int units;
};

/// All threads, one for each sequence: the tables of sequences.
DEVICE Seqs list_seqs(const AttentionDecode& p, SeqEntry* entries, int* ends, int* scratch) {
  const Step& step = p.attention.step;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int num_seqs = load_l2(&step.counts->num_seqs);
  int* const warp_units = scratch;
  int* const warp_ends = scratch + 8;
  int whole = 0, num_ends = 0;
  // The first round does not wait for the number of sequences.
  for (int base = 0; base == 0 || base < num_seqs; base += kAllThreads) {
    const int seq = base + int(threadIdx.x);
    SeqEntry entry = {0, 1, 0, 0};
    int units = 0;
    bool is_decode = false;
    if (seq < p.max_seqs) {
      entry = {0, load_l2(step.context_lens + seq), load_l2(step.query_start + seq), load_l2(step.block_start + seq)};
      const int next_row = load_l2(step.query_start + seq + 1);
      is_decode = seq < num_seqs && next_row - entry.query_row == 1;
      if (is_decode) units = (chunks_of(p, entry.context) - 1) * p.attention.num_kv_heads;
    }
    int inclusive = units;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int before = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += before;
    }
    const unsigned decoding = __ballot_sync(~0u, is_decode);
    if (lane == 31) warp_units[warp] = inclusive, warp_ends[warp] = __popc(decoding);
    __syncthreads();
    int end = 0;
    for (int other = 0; other < kWarps + kFinishers; other++) {
      if (other == warp) {
        entry.first_unit = whole + inclusive - units;
        end = num_ends + __popc(decoding & ((1u << lane) - 1));
      }
      whole += warp_units[other];
      num_ends += warp_ends[other];
    }
    if (seq < num_seqs) entries[seq] = entry;
    if (is_decode) ends[end] = seq;
    __syncthreads();
  }
  return {entries, ends, num_seqs, whole, whole + num_ends * p.attention.num_kv_heads};
}

/// The sequence of a unit at `index` of those whose chunk is not a last one.
DEVICE int seq_of(const Seqs& seqs, int index) {
  int low = 0, high = seqs.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (seqs.entries[middle].first_unit <= index) low = middle;
    else high = middle;
  }
  return low;
}

/// The unit at `index` of all. A division and as many steps as halve the sequences: for many threads at once.
DEVICE Unit find_unit(const AttentionDecode& p, const Seqs& seqs, int index) {
  const int heads = p.attention.num_kv_heads;
  const bool is_last = index >= seqs.whole;
  const int seq = is_last ? seqs.ends[(index - seqs.whole) / heads] : seq_of(seqs, index);
  const SeqEntry entry = seqs.entries[seq];
  const int chunks = chunks_of(p, entry.context), within = index - (is_last ? seqs.whole : entry.first_unit);
  const int chunk = is_last ? chunks - 1 : within / heads;
  const int start = (first_chunk(p, entry.context) + chunk) << p.chunk_shift;
  const int first = max(start, entry.context - p.attention.window);
  const int end = min(entry.context, start + (1 << p.chunk_shift));
  return {first, end, entry.query_row, entry.block_start, seq, within % heads, chunk, chunks};
}

/// All threads: lists the block's units from its `passed`th on, as many as there is room for. Returns how many.
DEVICE int list_units(const AttentionDecode& p, Unit* units, const Seqs& seqs, int passed) {
  const int stride = int(gridDim.x), first = int(blockIdx.x) + passed * stride;
  const int index = first + int(threadIdx.x) * stride;
  if (int(threadIdx.x) < kListed && index < seqs.units) units[threadIdx.x] = find_unit(p, seqs, index);
  __syncthreads();
  return first < seqs.units ? min((seqs.units - first - 1) / stride + 1, kListed) : 0;
}

/// The units that a block has listed.
struct Units {
  const AttentionDecode& p;
  const Unit* listed;
  int count;
};

/// A place in a warp's ring of stages.
struct Place {
  int stage = 0;
  uint32_t parity = 0;  // of the phase that the stage's next load ends

  DEVICE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// A stage in shared memory.
struct Stage {
  uint32_t keys;     // K, V, Q
  uint32_t barrier;  // of K; that of V follows
};

/// Rows of a tile that belong to its unit: [first, end).
struct TileRows {
  int first, end;
  DEVICE TileRows(const int position, int unit_first, int unit_end)
      : first(max(0, unit_first - position)), end(min(kTile, unit_end - position)) {}
};

/// Tiles by cp.async, 16 bytes a thread. Loads are told apart by the order they are made in: one of K, one of V, ...
template <class Cache_, int D>
struct SmallCopies {
  using Cache = Cache_;
  static constexpr int kRowBytes = Cache::kBytes * D;
  /// With the addresses of all those copies, half of an SM's registers would not do.
  static constexpr int kMinBlocks = 1;
  static constexpr bool kLoadsEarly = false;
  static DEVICE void init(uint32_t, int) {}
  static DEVICE void load_keys(Stage to, const uint8_t* kv, unsigned tile, TileRows rows, const bf16* queries, int group,
                               int lane) {
    load_tile<kRowBytes, PlainRows<kRowBytes>>(to.keys, 0, kv, tile, lane, rows.first, rows.end);
    if (queries == nullptr) return;
    const uint32_t at = to.keys + 2 * DecodeShared<Cache, D>::kTileBytes;
    for (int i = lane; i < group * (D / 8); i += 32) cp_async_16(at + uint32_t(16 * i), queries + i * 8, true);
  }
  static DEVICE void load_values(Stage to, const uint8_t* kv, unsigned tile, TileRows rows, int lane) {
    load_tile<kRowBytes, PlainRows<kRowBytes>>(to.keys + DecodeShared<Cache, D>::kTileBytes, 0, kv, tile, lane, rows.first, rows.end);
  }
  /// After every load, also one that found nothing left.
  static DEVICE void commit() { cp_async_commit(); }
  /// The oldest load: all but the newest 2 * stages - 1.
  static DEVICE void wait(Stage, uint32_t, int, int stages) {
    switch (stages) {
      case 1:
        return cp_async_wait<1>();
      case 2:
        return cp_async_wait<3>();
      case 3:
        return cp_async_wait<5>();
      case 4:
        return cp_async_wait<7>();
      case 5:
        return cp_async_wait<9>();
      case 6:
        return cp_async_wait<11>();
      case 7:
        return cp_async_wait<13>();
      default:
        return cp_async_wait<15>();
    }
  }
  static DEVICE void load_keys_before_queries(Stage, const uint8_t*, unsigned, TileRows, bool, int, int) {}
  static DEVICE void load_queries(Stage, const bf16*, int) {}
  static DEVICE void clear_values(Stage, TileRows, int) {}
  static DEVICE void finish() { cp_async_wait<0>(); }
};

/// Runs ahead of the computation and keeps a warp's ring full.
template <int D, class Copies>
struct Loader {
  using Shared = DecodeShared<typename Copies::Cache, D>;
  const AttentionDecode& p;
  const Units& units;
  int warp;
  int lane;
  int group;
  Stage ring;  // its first
  Place next;  // where the next tile goes

  // The unit being loaded. Lane i knows where its tile i lies, and of the next one which block that is in: no one waits for
  // that look-up.
  int position;
  int first, end;
  bool is_last;  // of its sequence
  unsigned tiles;
  unsigned queries;  // in 16 bytes from the step's first; kNoQueries once they are loaded
  int next_unit;     // among those listed
  unsigned next_block = 0, next_tile = 0;
  static constexpr unsigned kNoQueries = ~0u;

  DEVICE Loader(const Units& all, const Shared& shared, Place place, int w, int l)
      : p(all.p), units(all), warp(w), lane(l), group(all.p.attention.num_heads / all.p.attention.num_kv_heads), next(place) {
    ring = {shared_address(shared.ring + warp * p.stages * shared.stage_bytes),
            shared_address(shared.barriers + 2 * warp * p.stages)};
    next_unit = 0;
    look_up();
    take_unit();
  }

  DEVICE Stage at(int stage) const {
    const int stage_bytes = 2 * Shared::kTileBytes + group * 2 * D;
    return {ring.keys + uint32_t(stage * stage_bytes), ring.barrier + uint32_t(16 * stage)};
  }

  DEVICE void look_up() {
    if (next_unit >= units.count) return;
    const Unit unit = units.listed[next_unit];
    const int tile_position = (unit.first >> p.chunk_shift << p.chunk_shift) + lane * kTile;
    if (tile_position + kTile <= unit.first || tile_position >= unit.end) return;
    const KeyTile tile(p.attention, tile_position);
    next_block = unsigned(load_l2(p.attention.step.block_ids + unit.block_start + tile.block));
    next_tile = tile.within;
  }
  /// Moves to the next unit that has a tile for this warp; `first == end` if there is none.
  DEVICE void take_unit() {
    const Attention& a = p.attention;
    do {
      if (next_unit >= units.count) {
        first = end = 0;
        return;
      }
      const Unit unit = units.listed[next_unit];
      first = unit.first;
      end = unit.end;
      is_last = unit.is_last();
      tiles = key_tile(a, next_block, unit.head, next_tile);
      queries = unsigned((unit.query_row * (a.num_heads + 2 * a.num_kv_heads) + unit.head * group) * (D / 8));
      position = first_tile(first, warp);
      next_unit++;
      look_up();
    } while (position >= end);
  }
  /// Position of the first tile at or after `first`'s that is the warp's.
  static DEVICE int first_tile(int first, int warp) {
    const int tile = first / kTile;
    return (tile + ((warp - tile) & (kWarps - 1))) * kTile;
  }

  DEVICE bool done() const { return first == end; }
  DEVICE unsigned tile() const {
    return __shfl_sync(~0u, tiles, (position & ((1 << p.chunk_shift) - 1)) / kTile);
  }
  /// Keys of the next tile, and the queries that a unit begins with.
  DEVICE void load_keys() {
    if (!done()) {
      const bf16* from = queries == kNoQueries ? nullptr : p.attention.qkv + size_t(queries) * 8;
      Copies::load_keys(at(next.stage), p.attention.kv, tile(), TileRows(position, first, end), from, group, lane);
      queries = kNoQueries;
    }
    Copies::commit();
  }
  /// Fills the ring, and not only when the kernels before are done: keys and values of earlier steps are there since those
  /// ended, and no kernel of this one began before. Queries and the step's own token must wait.
  DEVICE void fill() {
    unsigned late = kNoQueries;  // lane i: the queries that stage i lacks
    int filled = 0;
    if (Copies::kLoadsEarly) {
      for (; filled < p.stages && !done() && !(is_last && position + kTile >= end); filled++) {
        const TileRows rows(position, first, end);
        Copies::load_keys_before_queries(at(next.stage), p.attention.kv, tile(), rows, queries != kNoQueries, group, lane);
        if (lane == next.stage) late = queries;
        queries = kNoQueries;
        load_values();
      }
    }
    wait_for_previous_kernels();
    if (late != kNoQueries) {
      Copies::load_queries(at(lane), p.attention.qkv + size_t(late) * 8, group);
    }
    __syncwarp();
    for (; filled < p.stages; filled++) {
      load_keys();
      load_values();
    }
  }
  /// Values of the tile whose keys were loaded last.
  DEVICE void load_values() {
    if (!done()) {
      const unsigned values = tile() + value_tile_offset(p.attention);
      Copies::load_values(at(next.stage), p.attention.kv, values, TileRows(position, first, end), lane);
      next.advance(p.stages);
      position += kWarps * kTile;
      if (position >= end) take_unit();
    }
    Copies::commit();
  }
};

/// Whether sums are relative to a maximum: without soft-cap exp would overflow, and so would f16 with it.
template <class Cache, bool Capped>
DEVICE constexpr bool is_relative() {
  return !Capped || Cache::kNeedsMaximum;
}
/// The maximum is raised once a score exceeds it by so many powers of two; f16 ends at 16.
constexpr float kHeadroom = 8.0f;

/// A warp's sums over its tiles of a unit; lane l has those of heads 2 (l % 4) + {0, 1}.
template <int D>
struct Sums {
  float output[D / 16][4];  // of which elements: `Cache::accumulate`
  float sum[2];      // over the lane's keys
  float maximum[2];  // of all keys but for kHeadroom
};

template <int D>
DEVICE void clear(Sums<D>& sums) {
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.output[j][i] = 0.0f;
  }
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    sums.sum[odd] = 0.0f;
    sums.maximum[odd] = kNoScore;
  }
}

/// Raises the maxima to those of all scores so far, and multiplies what was summed for it.
template <int D>
DEVICE void raise_maxima(Sums<D>& sums, const float (&s)[4]) {
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    float maximum = fmaxf(sums.maximum[odd], fmaxf(s[odd], s[2 + odd]));
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, mask));
    const float factor = sums.maximum[odd] == kNoScore ? 0.0f : exp2_approx(sums.maximum[odd] - maximum);
    sums.maximum[odd] = maximum;
    sums.sum[odd] *= factor;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      sums.output[j][odd] *= factor;
      sums.output[j][2 + odd] *= factor;
    }
  }
}

/// Scores to probabilities, as the B operand of the product with V.
template <class Cache, int D, bool Capped>
DEVICE void weigh(uint32_t (&probabilities)[2], Sums<D>& sums, float (&s)[4], const Attention& p, int position,
                  const Unit& unit, int lane) {
  if (Capped) capped_exponents(s, p);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int key = position + lane / 4 + i / 2 * 8;
    if (key < unit.first || key >= unit.end) s[i] = kNoScore;
    else if (!Capped) s[i] *= p.score_scale;
  }
  if (is_relative<Cache, Capped>()) {
    const bool exceeds = fmaxf(s[0], s[2]) > sums.maximum[0] + kHeadroom || fmaxf(s[1], s[3]) > sums.maximum[1] + kHeadroom;
    if (__any_sync(~0u, exceeds)) raise_maxima<D>(sums, s);
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] -= sums.maximum[i % 2];
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t pair = Cache::pair(exp2_approx(s[2 * half]), exp2_approx(s[2 * half + 1]));
    // What is divided by is the sum of what is multiplied.
    sums.sum[0] += Cache::low(pair);
    sums.sum[1] += Cache::high(pair);
    probabilities[half] = transposed(pair);
  }
}

/// All of a warp's tiles of one unit.
template <int D, bool Capped, class Copies>
DEVICE void run_unit(Sums<D>& sums, Loader<D, Copies>& loader, Place& place, const Unit& unit) {
  using Cache = typename Copies::Cache;
  constexpr int kTileBytes = DecodeShared<Cache, D>::kTileBytes;
  const AttentionDecode& p = loader.p;
  const int lane = loader.lane;
  uint32_t q[D / 8];
  const uint32_t key_offset = Cache::template key_offset<D>(lane);
  const uint32_t value_offset = kTileBytes + Cache::template value_offset<D>(lane);
  const int first = loader.first_tile(unit.first, loader.warp);
  for (int position = first; position < unit.end; position += kWarps * kTile) {
    float s[4];
    uint32_t probabilities[2];
    const Stage stage = loader.at(place.stage);
    Copies::wait(stage, place.parity, 0, p.stages);
    __syncwarp();
    if (position == first) Cache::template read_queries<D>(q, stage.keys + 2 * kTileBytes, loader.group, lane);
    Cache::template score<D>(s, q, stage.keys + key_offset);
    __syncwarp();
    loader.load_keys();
    weigh<Cache, D, Capped>(probabilities, sums, s, p.attention, position, unit, lane);
    Copies::wait(stage, place.parity, 1, p.stages);
    Copies::clear_values(stage, TileRows(position, unit.first, unit.end), lane);
    __syncwarp();
    Cache::template accumulate<D>(sums.output, probabilities, stage.keys + value_offset);
    __syncwarp();
    loader.load_values();
    place.advance(p.stages);
  }
}

/// Leaves a warp's sums in shared memory. `slot` counts warps of both buffers.
template <class Cache, int D>
DEVICE void share(const Sums<D>& sums, const DecodeShared<Cache, D>& shared, int group, int slot, int lane) {
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    const int head = lane % 4 * 2 + odd;
    float sum = sums.sum[odd];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    if (lane / 4 == 0) {
      shared.sums[slot * kMaxGroup + head] = sum;
      shared.maxima[slot * kMaxGroup + head] = sums.maximum[odd];
    }
    if (head >= group) continue;
    float* to = shared.outputs + (slot * group + head) * D;
#pragma unroll
    for (int j = 0; j < D / 16; j++) Cache::store(to + 16 * j, sums.output[j][odd], sums.output[j][2 + odd], lane);
  }
}

/// Adds what the warps left in a buffer of shared memory. The result is either final or this chunk's part of it.
template <class Cache, int D, bool Capped, int Threads>
DEVICE void add_warps(const AttentionDecode& p, const DecodeShared<Cache, D>& shared, const Unit& unit, int group, int buffer,
                      int thread) {
  for (int quad = thread; quad < group * D / 4; quad += Threads) {
    const int head = quad * 4 / D;
    Part total = {{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, kNoScore};
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      const int slot = buffer * kWarps + warp;
      const float4 output = *reinterpret_cast<const float4*>(shared.outputs + slot * group * D + quad * 4);
      add<!is_relative<Cache, Capped>()>(total, {output, shared.sums[slot * kMaxGroup + head], shared.maxima[slot * kMaxGroup + head]});
    }
    if (unit.chunks == 1) {
      write_result<D>(p.attention, unit.query_row, unit.head, quad, total);
      continue;
    }
    const size_t part = part_index(p, unit.seq, unit.chunk, unit.head);
    *reinterpret_cast<float4*>(p.partial_outputs + part * size_t(group * D) + quad * 4) = total.output;
    if (quad * 4 % D == 0) {
      float* sums = p.partial_sums + part * (2 * kMaxGroup) + head;
      sums[0] = total.sum;
      sums[kMaxGroup] = total.maximum;
    }
  }
}

/// A computing warp's way through the listed units, each of which `finishers` threads finish. `place` is where its ring stands.
template <int D, bool Capped, class Copies>
DEVICE void compute_units(const Units& units, const DecodeShared<typename Copies::Cache, D>& shared, Place& place, int finishers,
                          int warp, int lane) {
  Loader<D, Copies> loader(units, shared, place, warp, lane);
  loader.fill();
  for (int count = 0; count < units.count; count++) {
    const Unit unit = units.listed[count];
    Sums<D> sums;
    clear<D>(sums);
    run_unit<D, Capped>(sums, loader, place, unit);
    if (count >= kBuffers) named_barrier_sync(kEmpty + (count - kBuffers) % kWarps, kThreads + finishers);
    share(sums, shared, loader.group, count % kBuffers * kWarps + warp, lane);
    named_barrier_arrive(kFull + count % kWarps, kThreads + finishers);
  }
  Copies::finish();
}

/// The finishing warps' way through them: teams of `Threads` take turns.
template <class Cache, int D, bool Capped, int Threads>
DEVICE void finish_units(const Units& units, const DecodeShared<Cache, D>& shared, int thread) {
  constexpr int kTeams = kFinishThreads / Threads;
  const AttentionDecode& p = units.p;
  const int group = p.attention.num_heads / p.attention.num_kv_heads;
  const int team = thread / Threads, member = thread % Threads;
  wait_for_previous_kernels();
  for (int count = team; count < units.count; count += kTeams) {
    const Unit unit = units.listed[count];
    named_barrier_sync(kFull + count % kWarps, kThreads + Threads);
    add_warps<Cache, D, Capped, Threads>(p, shared, unit, group, count % kBuffers, member);
    if (count + kBuffers < units.count) named_barrier_arrive(kEmpty + count % kWarps, kThreads + Threads);
  }
}

template <int D, bool Capped, class Copies>
DEVICE void attention_decode(const AttentionDecode& p, uint8_t* memory) {
  using Cache = typename Copies::Cache;
  // The shuffle tells the compiler that all lanes agree.
  const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0), lane = int(threadIdx.x) % 32;
  const DecodeShared<Cache, D> shared(memory, p.stages, p.attention.num_heads / p.attention.num_kv_heads, p.max_seqs);
  let_next_kernel_start();
  // Whoever uses the barriers synchronises in between.
  if (threadIdx.x == 0) Copies::init(shared_address(shared.barriers), 2 * kWarps * p.stages);
  const Seqs seqs = list_seqs(p, shared.seqs, shared.ends, shared.scratch);
  Place place;
  for (int passed = 0;; passed += kListed) {
    const Units units = {p, shared.units, list_units(p, shared.units, seqs, passed)};
    // A block's only unit is finished by all: nothing else is to be done meanwhile.
    const bool is_single = passed == 0 && units.count <= 1;
    if (warp < kWarps) {
      compute_units<D, Capped, Copies>(units, shared, place, is_single ? kFinishThreads : 32, warp, lane);
    } else if (is_single) {
      finish_units<Cache, D, Capped, kFinishThreads>(units, shared, int(threadIdx.x) - kThreads);
    } else {
      finish_units<Cache, D, Capped, 32>(units, shared, int(threadIdx.x) - kThreads);
    }
    if (units.count < kListed) break;
    // All are done with this list.
    __syncthreads();
  }
}

#define ATTENTION_DECODE_KERNEL(NAME, D, CAPPED, COPIES, CACHE)                                        \
  KERNEL(NAME##_##D, AttentionDecode, kAllThreads, ((CAPPED) ? COPIES<CACHE, D>::kMinBlocks : 1)) {     \
    DYNAMIC_SHARED(memory);                                                                            \
    attention_decode<D, CAPPED, COPIES<CACHE, D>>(p, memory);                                          \
  }
/// `NAME_D` and `NAME_capped_D` for every head dimension.
#define ATTENTION_DECODE(NAME, COPIES, CACHE)                         \
  ATTENTION_DECODE_KERNEL(NAME, 64, false, COPIES, CACHE)             \
  ATTENTION_DECODE_KERNEL(NAME, 128, false, COPIES, CACHE)            \
  ATTENTION_DECODE_KERNEL(NAME, 256, false, COPIES, CACHE)            \
  ATTENTION_DECODE_KERNEL(NAME##_capped, 64, true, COPIES, CACHE)     \
  ATTENTION_DECODE_KERNEL(NAME##_capped, 128, true, COPIES, CACHE)    \
  ATTENTION_DECODE_KERNEL(NAME##_capped, 256, true, COPIES, CACHE)
