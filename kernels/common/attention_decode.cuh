// Attention of sequences with one query token over the paged KV cache: soft-cap or running maximum, window, GQA. Kernels
// differ in how tiles of keys and values reach shared memory (`Copies`), not in a bit of the result.
//
// Work: a unit is (sequence, kv head, chunk), where a chunk is a fixed number of positions aligned to absolute position,
// so that what a sequence gets never depends on the batch. Blocks walk the units with the grid's stride; each finds them
// from the context lengths, so that a captured graph needs no plan. The kv heads of a chunk are neighbours: blocks at work
// together read whole pages, not one head's part of many, which all lie at the same distance and meet in the same memory
// channels. In a unit four warps take 16-position tiles in turn, each with a ring of stages of its own: nothing but the
// end of a unit brings them together, and a warp's loads for the next unit are under way while this one is computed.
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
  int first_unit;  // of the first sequence after the last, the number of units
  int context;
  int query_row;
  int block_start;
};

/// Shared memory: rings of the computing warps, then what they leave at a unit's end.
template <class Cache, int D>
struct DecodeShared {
  static constexpr int kTileBytes = kTile * Cache::kBytes * D;
  uint8_t* ring;     // [warps][stages]: K [16][D], V [16][D], as in the cache, Q [group][D], bf16
  float* outputs;    // [2][warps][group][D]
  float* sums;       // [2][warps][8]
  float* maxima;     // [2][warps][8]
  uint64_t* barriers;  // [warps][stages][K, V]
  int* scratch;      // [8]
  SeqEntry* seqs;    // [max_seqs + 1]
  int stage_bytes;

  DEVICE DecodeShared(uint8_t* base, int stages, int group) {
    stage_bytes = 2 * kTileBytes + group * 2 * D;
    ring = base;
    outputs = reinterpret_cast<float*>(base + kWarps * stages * stage_bytes);
    sums = outputs + 2 * kWarps * group * D;
    maxima = sums + 2 * kWarps * kMaxGroup;
    barriers = reinterpret_cast<uint64_t*>(maxima + 2 * kWarps * kMaxGroup);
    scratch = reinterpret_cast<int*>(barriers + 2 * kWarps * stages);
    seqs = reinterpret_cast<SeqEntry*>(scratch + 8);
  }
};

/// What a unit covers: positions [first, end). Without positions: no unit.
struct Unit {
  int index;
  int seq;
  int head;
  int chunk;   // among the sequence's
  int chunks;  // of the sequence
  int first;
  int end;
  int query_row;
  int block_start;
  int context;  // of the sequence
};

/// All threads, one for each sequence: the table of sequences and how many units precede each. Returns their number.
DEVICE int list_seqs(const AttentionDecode& p, SeqEntry* seqs, int* warp_totals) {
  const Step& step = p.attention.step;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int num_seqs = load_l2(&step.counts->num_seqs);
  int total = 0;
  // The first round does not wait for the number of sequences.
  for (int base = 0; base == 0 || base < num_seqs; base += kAllThreads) {
    const int seq = base + int(threadIdx.x);
    SeqEntry entry = {0, 1, 0, 0};
    int units = 0;
    if (seq < p.max_seqs) {
      entry = {0, load_l2(step.context_lens + seq), load_l2(step.query_start + seq), load_l2(step.block_start + seq)};
      const int next_row = load_l2(step.query_start + seq + 1);
      const bool is_decode = seq < num_seqs && next_row - entry.query_row == 1;
      if (is_decode) units = chunks_of(p, entry.context) * p.attention.num_kv_heads;
    }
    int inclusive = units;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int before = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += before;
    }
    if (lane == 31) warp_totals[warp] = inclusive;
    __syncthreads();
    int before = total;
    for (int other = 0; other < kWarps + kFinishers; other++) {
      if (other == warp) entry.first_unit = before + inclusive - units;
      before += warp_totals[other];
    }
    total = before;
    if (seq < num_seqs) seqs[seq] = entry;
    __syncthreads();
  }
  if (threadIdx.x == 0) seqs[num_seqs] = {total, 0, 0, 0};
  __syncthreads();
  return num_seqs;
}

/// The units as every warp sees them.
struct Units {
  const AttentionDecode& p;
  const SeqEntry* seqs;
  int num_seqs;
  int count;

  DEVICE Units(const AttentionDecode& params, const SeqEntry* entries, int num_entries)
      : p(params), seqs(entries), num_seqs(num_entries), count(entries[num_entries].first_unit) {}

  DEVICE Unit find(int index) const {
    if (index >= count) return {index, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    int low = 0, high = num_seqs;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (seqs[middle].first_unit <= index) low = middle;
      else high = middle;
    }
    const SeqEntry entry = seqs[low];
    const int chunks = chunks_of(p, entry.context);
    const int within = index - entry.first_unit;
    const int chunk = within / p.attention.num_kv_heads;
    const int head = within - chunk * p.attention.num_kv_heads;
    const int start = (first_chunk(p, entry.context) + chunk) << p.chunk_shift;
    const int first = max(start, entry.context - p.attention.window);
    const int end = min(entry.context, start + (1 << p.chunk_shift));
    return {index, low, head, chunk, chunks, first, end, entry.query_row, entry.block_start, entry.context};
  }
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

  // The unit being loaded. Lane i knows where its tile i lies; so for the next one, to hide that look-up's latency.
  int position;
  int first, end;
  unsigned tiles;
  unsigned queries;  // in 16 bytes from the step's first; kNoQueries once they are loaded
  int next_index;
  unsigned next_tiles;
  static constexpr unsigned kNoQueries = ~0u;

  DEVICE Loader(const Units& all, const Shared& shared, int w, int l)
      : p(all.p), units(all), warp(w), lane(l), group(all.p.attention.num_heads / all.p.attention.num_kv_heads) {
    ring = {shared_address(shared.ring + warp * p.stages * shared.stage_bytes),
            shared_address(shared.barriers + 2 * warp * p.stages)};
    look_up(int(blockIdx.x));
    next_unit();
  }

  DEVICE Stage at(int stage) const {
    const int stage_bytes = 2 * Shared::kTileBytes + group * 2 * D;
    return {ring.keys + uint32_t(stage * stage_bytes), ring.barrier + uint32_t(16 * stage)};
  }

  DEVICE void look_up(int index) {
    const Attention& a = p.attention;
    const Unit unit = units.find(index);
    next_index = index;
    next_tiles = 0;
    const int tile_position = (unit.first >> p.chunk_shift << p.chunk_shift) + lane * kTile;
    if (tile_position + kTile > unit.first && tile_position < unit.end) {
      next_tiles = key_tile(a, a.step.block_ids + unit.block_start, unit.head, tile_position);
    }
  }
  /// Moves to the next unit that has a tile for this warp; `first == end` if there is none.
  DEVICE void next_unit() {
    const Attention& a = p.attention;
    do {
      const Unit unit = units.find(next_index);
      first = unit.first;
      end = unit.end;
      tiles = next_tiles;
      queries = unsigned((unit.query_row * (a.num_heads + 2 * a.num_kv_heads) + unit.head * group) * (D / 8));
      if (first == end) return;
      position = first_tile(first, warp);
      look_up(next_index + int(gridDim.x));
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
      for (; filled < p.stages && !done() && position + kTile < this_context(); filled++) {
        const TileRows rows(position, first, end);
        Copies::load_keys_before_queries(at(next.stage), p.attention.kv, tile(), rows, queries != kNoQueries, group, lane);
        if (lane == filled) late = queries;
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
  /// Of the sequence whose unit is being loaded.
  DEVICE int this_context() const { return units.find(next_index - int(gridDim.x)).context; }
  /// Values of the tile whose keys were loaded last.
  DEVICE void load_values() {
    if (!done()) {
      const unsigned values = tile() + value_tile_offset(p.attention);
      Copies::load_values(at(next.stage), p.attention.kv, values, TileRows(position, first, end), lane);
      next.advance(p.stages);
      position += kWarps * kTile;
      if (position >= end) next_unit();
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

/// A logit in powers of e, in units of log2.
template <bool Capped>
DEVICE float exponent(float dot, const Attention& p) {
  return Capped ? capped_exponent(dot, p.score_scale, p.cap) : dot * p.score_scale;
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
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int key = position + lane / 4 + i / 2 * 8;
    s[i] = key >= unit.first && key < unit.end ? exponent<Capped>(s[i], p) : kNoScore;
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

/// A computing warp's way through the block's units, each of which `Threads` threads finish.
template <int D, bool Capped, class Copies, int Threads>
DEVICE void compute_units(const Units& units, const DecodeShared<typename Copies::Cache, D>& shared, int warp, int lane) {
  Loader<D, Copies> loader(units, shared, warp, lane);
  loader.fill();
  Place place;
  int count = 0;
  for (int index = int(blockIdx.x); index < units.count; index += int(gridDim.x), count++) {
    const Unit unit = units.find(index);
    Sums<D> sums;
    clear<D>(sums);
    run_unit<D, Capped>(sums, loader, place, unit);
    if (count >= kBuffers) named_barrier_sync(kEmpty + (count - kBuffers) % kWarps, kThreads + Threads);
    share(sums, shared, loader.group, count % kBuffers * kWarps + warp, lane);
    named_barrier_arrive(kFull + count % kWarps, kThreads + Threads);
  }
  Copies::finish();
}

/// The finishing warps' way through them: teams of `Threads` take turns.
template <class Cache, int D, bool Capped, int Threads>
DEVICE void finish_units(const Units& units, const DecodeShared<Cache, D>& shared, int thread) {
  constexpr int kTeams = kFinishThreads / Threads;
  const AttentionDecode& p = units.p;
  const int group = p.attention.num_heads / p.attention.num_kv_heads, grid = int(gridDim.x);
  const int team = thread / Threads, member = thread % Threads;
  wait_for_previous_kernels();
  int count = team;
  for (int index = int(blockIdx.x) + team * grid; index < units.count; index += kTeams * grid, count += kTeams) {
    const Unit unit = units.find(index);
    named_barrier_sync(kFull + count % kWarps, kThreads + Threads);
    add_warps<Cache, D, Capped, Threads>(p, shared, unit, group, count % kBuffers, member);
    if (index + kBuffers * grid < units.count) {
      named_barrier_arrive(kEmpty + count % kWarps, kThreads + Threads);
    }
  }
}

/// A block's units; `Threads` threads finish each.
template <int D, bool Capped, class Copies, int Threads>
DEVICE void run_units(const Units& units, const DecodeShared<typename Copies::Cache, D>& shared, int warp, int lane) {
  if (warp < kWarps) compute_units<D, Capped, Copies, Threads>(units, shared, warp, lane);
  else finish_units<typename Copies::Cache, D, Capped, Threads>(units, shared, int(threadIdx.x) - kThreads);
}

template <int D, bool Capped, class Copies>
DEVICE void attention_decode(const AttentionDecode& p, uint8_t* memory) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const DecodeShared<typename Copies::Cache, D> shared(memory, p.stages, p.attention.num_heads / p.attention.num_kv_heads);
  let_next_kernel_start();
  // Whoever uses the barriers synchronises in between.
  if (threadIdx.x == 0) Copies::init(shared_address(shared.barriers), 2 * kWarps * p.stages);
  const int num_seqs = list_seqs(p, shared.seqs, shared.scratch);
  const Units units(p, shared.seqs, num_seqs);
  // A block's only unit is finished by all: nothing else is to be done meanwhile.
  if (units.count <= int(gridDim.x)) run_units<D, Capped, Copies, kFinishThreads>(units, shared, warp, lane);
  else run_units<D, Capped, Copies, 32>(units, shared, warp, lane);
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
