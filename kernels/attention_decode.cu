// Attention of sequences with one query token over the paged KV cache: soft-cap or running maximum, window, GQA.
//
// Work: a unit is (sequence, kv head, chunk), where a chunk is a fixed number of positions aligned to absolute position,
// so that what a sequence gets never depends on the batch. Blocks walk the units with the grid's stride; each finds them
// from the context lengths, so that a captured graph needs no plan. In a unit the four warps take 16-position tiles in
// turn, each with a ring of stages of its own: no barrier but one at a unit's end, and a warp's loads for the next unit
// are under way while this one is computed. Whichever block finishes the last chunk of a (sequence, kv head) adds all
// its partial sums in chunk order and writes the result.
//
// A tile's products run on tensor cores, for any group of up to 8 query heads at the same cost:
//   S [heads][16 keys] = Q K^T   Q is the A operand (rows 8-15 are zero), kept in registers; K the B operand;
//   O^T [D][heads] += V^T P^T    V is the A operand (transposed by ldmatrix); P is S's registers as they lie.
//
// Bound: bytes of K and V; two products of 16 x 8 x 16 for 1 KB leave tensor cores and issue slots mostly idle.
#include "common/attention.cuh"

struct AttentionDecode {
  Attention attention;
  float* partial_outputs;  // [units][group][D]
  float* partial_sums;     // [units][2][8]: sum of probabilities, maximum score
  unsigned* arrivals;      // [max_seqs * num_kv_heads], zero between launches
  int max_seqs;
  /// Positions of a chunk are 1 << chunk_shift: 64, 128, 256 or 512.
  int chunk_shift;
  /// Tiles of K and of V a warp has under way: 1 to 8.
  int stages;
  /// 1 if the step's inputs, token ids excepted, were complete before the previous kernel could start: they are then
  /// read before it ends.
  int step_is_settled;
};

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
/// Query heads a kv head may have.
constexpr int kMaxGroup = 8;
constexpr float kNoScore = -INFINITY;

/// Shared memory: rings of the warps, then what a unit's end exchanges.
template <int D>
struct DecodeShared {
  uint8_t* ring;     // [warps][stages][K, V][16][D] bf16
  float* outputs;    // [warps][group][D]
  float* sums;       // [warps][8]
  float* maxima;     // [warps][8]
  int* is_last;      // [4], of which the first counts
  int* first_unit;   // [max_seqs + 1]

  DEVICE DecodeShared(uint8_t* base, int stages, int group) {
    ring = base;
    outputs = reinterpret_cast<float*>(base + kWarps * stages * (2 * kTile * 2 * D));
    sums = outputs + kWarps * group * D;
    maxima = sums + kWarps * kMaxGroup;
    is_last = reinterpret_cast<int*>(maxima + kWarps * kMaxGroup);
    first_unit = is_last + 4;
  }
};

/// What a unit covers. Without positions: no unit.
struct Unit {
  int index;
  int seq;
  int head;
  int chunk;   // among the sequence's
  int chunks;  // of the sequence
  int first;   // positions [first, end)
  int end;
};

/// Number of the chunk that the window of a sequence's last token starts in.
DEVICE int first_chunk(const AttentionDecode& p, int context) {
  return max(0, context - p.attention.window) >> p.chunk_shift;
}
DEVICE int chunks_of(const AttentionDecode& p, int context) {
  return ((context - 1) >> p.chunk_shift) - first_chunk(p, context) + 1;
}

/// One warp: how many units precede each sequence.
DEVICE void count_units(const AttentionDecode& p, int* first_unit, int lane) {
  const Step& step = p.attention.step;
  const int num_seqs = step.counts->num_seqs;
  int total = 0;
  for (int base = 0; base < p.max_seqs && (base == 0 || base < num_seqs); base += 32) {
    const int seq = base + lane;
    int units = 0;
    if (seq < p.max_seqs) {
      const int queries = step.query_start[seq + 1] - step.query_start[seq];
      const int context = step.context_lens[seq];
      if (seq < num_seqs && queries == 1) units = chunks_of(p, context) * p.attention.num_kv_heads;
    }
    int inclusive = units;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int before = __shfl_up_sync(~0u, inclusive, delta);
      if (lane >= delta) inclusive += before;
    }
    if (seq < p.max_seqs) first_unit[seq] = total + inclusive - units;
    total += __shfl_sync(~0u, inclusive, 31);
  }
  if (lane == 0) first_unit[num_seqs] = total;
}

/// The unit of this number; with `first == end` if there is none.
DEVICE Unit find_unit(const AttentionDecode& p, const int* first_unit, int num_seqs, int index) {
  if (index >= first_unit[num_seqs]) return {index, 0, 0, 0, 0, 0, 0};
  int low = 0, high = num_seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_unit[middle] <= index) low = middle;
    else high = middle;
  }
  const int context = p.attention.step.context_lens[low];
  const int chunks = chunks_of(p, context);
  const int within = index - first_unit[low];
  const int head = within / chunks;
  const int chunk = within - head * chunks;
  const int start = (first_chunk(p, context) + chunk) << p.chunk_shift;
  const int first = max(start, context - p.attention.window);
  return {index, low, head, chunk, chunks, max(first, 0), min(context, start + (1 << p.chunk_shift))};
}

/// Runs ahead of the computation and keeps a warp's ring full.
template <int D>
struct Loader {
  const AttentionDecode& p;
  const int* first_unit;
  int num_seqs;
  int warp;
  int lane;
  uint32_t ring;
  uint32_t ring_end;
  uint32_t stage;  // where the next tile goes

  // The unit being loaded. Lane i knows where its tile i lies; so for the next one, to hide that look-up's latency.
  int position;
  int first, end;
  unsigned tiles;
  int next_index;
  int next_first, next_end;
  unsigned next_tiles;

  DEVICE Loader(const AttentionDecode& params, const DecodeShared<D>& shared, int seqs, int w, int l)
      : p(params), first_unit(shared.first_unit), num_seqs(seqs), warp(w), lane(l) {
    const uint32_t bytes = uint32_t(p.stages) * (2 * kTile * 2 * D);
    ring = shared_address(shared.ring) + uint32_t(warp) * bytes;
    ring_end = ring + bytes;
    stage = ring;
    look_up(int(blockIdx.x));
    next_unit();
  }

  DEVICE void look_up(int index) {
    const Unit unit = find_unit(p, first_unit, num_seqs, index);
    next_index = index;
    next_first = unit.first;
    next_end = unit.end;
    const int at = (unit.first >> p.chunk_shift << p.chunk_shift) + lane * kTile;
    next_tiles = 0;
    if (at + kTile > unit.first && at < unit.end) {
      const int* blocks = p.attention.step.block_ids + p.attention.step.block_start[unit.seq];
      next_tiles = key_tile(p.attention, blocks, unit.head, at);
    }
  }
  /// Moves to the next unit that has a tile for this warp; `first == end` if there is none.
  DEVICE void next_unit() {
    do {
      first = next_first;
      end = next_end;
      tiles = next_tiles;
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
  DEVICE void load(uint32_t to, unsigned offset) {
    if (!done()) {
      const int index = (position & ((1 << p.chunk_shift) - 1)) / kTile;
      const unsigned tile = __shfl_sync(~0u, tiles, index) + offset;
      load_tile<D>(to, p.attention.kv, tile, lane, first - position, end - position);
    }
    cp_async_commit();
  }
  DEVICE void load_keys() { load(stage, 0); }
  DEVICE void load_values() {
    load(stage + kTile * 2 * D, value_tile_offset(p.attention));
    stage += 2 * kTile * 2 * D;
    if (stage == ring_end) stage = ring;
    if (done()) return;
    position += kWarps * kTile;
    if (position >= end) next_unit();
  }
};

/// Waits for all but the newest 2 * stages - 1 loads.
DEVICE void wait_for_oldest(int stages) {
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

/// A warp's sums over its tiles of a unit. Lane l: head l / 4 in `sum` (its own keys' part) and `maximum`; heads
/// 2 (l % 4) + {0, 1} in `output`.
template <int D>
struct Sums {
  float output[D / 16][4];
  float sum;
  float maximum;
};

template <int D>
DEVICE void clear(Sums<D>& sums) {
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.output[j][i] = 0.0f;
  }
  sums.sum = 0.0f;
  sums.maximum = kNoScore;
}

/// Q as A operands: register j holds elements 8j + 2 (l % 4) + {0, 1} of head l / 4.
template <int D>
DEVICE void load_queries(uint32_t (&q)[D / 8], const Attention& p, const Unit& unit, int lane) {
  const int group = p.num_heads / p.num_kv_heads;
  const int row = p.step.query_start[unit.seq];
  const size_t cols = size_t(p.num_heads + 2 * p.num_kv_heads) * D;
  const bf16* from = p.qkv + size_t(row) * cols + (unit.head * group + lane / 4) * D + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    q[j] = lane / 4 < group ? *reinterpret_cast<const uint32_t*>(from + 8 * j) : 0u;
  }
}

/// Scores of 16 keys: lane l gets those of head l / 4 with keys 2 (l % 4) + {0, 1} and 8 more.
template <int D>
DEVICE void score(float (&s)[4], const uint32_t (&q)[D / 8], uint32_t keys) {
  float sums[2][2][4] = {};  // halves of D alternate: shorter chains
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
    uint32_t k[4];
    ldmatrix_x4(k, keys ^ uint32_t(32 * j));
    const uint32_t a[4] = {q[2 * j], 0, q[2 * j + 1], 0};
    mma_m16n8k16_bf16(sums[j % 2][0], a, {k[0], k[1]}, sums[j % 2][0]);
    mma_m16n8k16_bf16(sums[j % 2][1], a, {k[2], k[3]}, sums[j % 2][1]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = sums[0][i / 2][i % 2] + sums[1][i / 2][i % 2];
}

/// Multiplies what was summed so far for the new maximum; the scores become relative to it.
template <int D>
DEVICE void rescale(Sums<D>& sums, float (&s)[4], const bool (&seen)[4], float score_scale, int lane) {
  float maximum = sums.maximum;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    s[i] *= score_scale;
    if (seen[i]) maximum = fmaxf(maximum, s[i]);
  }
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
  maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
  const float factor = sums.maximum == kNoScore ? 0.0f : exp2_approx(sums.maximum - maximum);
  sums.maximum = maximum;
  sums.sum *= factor;
  const float even = __shfl_sync(~0u, factor, lane % 4 * 8), odd = __shfl_sync(~0u, factor, lane % 4 * 8 + 4);
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.output[j][i] *= i % 2 == 0 ? even : odd;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = exp2_approx(s[i] - maximum);
}

/// Scores to probabilities, in bf16, as the B operand of the product with V.
template <int D, bool Capped>
DEVICE void weigh(uint32_t (&probabilities)[2], Sums<D>& sums, float (&s)[4], const Attention& p, int position,
                  const Unit& unit, int lane) {
  bool seen[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int key = position + lane % 4 * 2 + i % 2 + i / 2 * 8;
    seen[i] = key >= unit.first && key < unit.end;
  }
  if (Capped) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = capped_exp(s[i], p.score_scale, p.cap);
  } else {
    rescale<D>(sums, s, seen, p.score_scale, lane);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float low = seen[2 * half] ? s[2 * half] : 0.0f, high = seen[2 * half + 1] ? s[2 * half + 1] : 0.0f;
    probabilities[half] = bf16x2_from_floats(low, high);
    // What is divided by is the sum of what is multiplied.
    sums.sum += low_float(probabilities[half]) + high_float(probabilities[half]);
  }
}

template <int D>
DEVICE void accumulate(Sums<D>& sums, const uint32_t (&probabilities)[2], uint32_t values) {
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
    uint32_t v[4];
    ldmatrix_x4_transposed(v, values ^ uint32_t(32 * j));
    mma_m16n8k16_bf16(sums.output[j], v, probabilities, sums.output[j]);
  }
}

/// All of a warp's tiles of one unit.
template <int D, bool Capped>
DEVICE void run_unit(Sums<D>& sums, Loader<D>& loader, uint32_t& stage, const AttentionDecode& p, const Unit& unit) {
  const int lane = loader.lane;
  uint32_t q[D / 8];
  load_queries<D>(q, p.attention, unit, lane);
  // Row and chunk that this lane points ldmatrix at; the chunk's other bits are flipped in by the loops.
  const uint32_t offset = swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  for (int position = Loader<D>::first_tile(unit.first, loader.warp); position < unit.end; position += kWarps * kTile) {
    float s[4];
    uint32_t probabilities[2];
    wait_for_oldest(p.stages);
    __syncwarp();
    score<D>(s, q, stage + offset);
    __syncwarp();
    loader.load_keys();
    weigh<D, Capped>(probabilities, sums, s, p.attention, position, unit, lane);
    wait_for_oldest(p.stages);
    __syncwarp();
    accumulate<D>(sums, probabilities, stage + kTile * 2 * D + offset);
    __syncwarp();
    loader.load_values();
    stage += 2 * kTile * 2 * D;
    if (stage == loader.ring_end) stage = loader.ring;
  }
}

/// Leaves a warp's sums in shared memory.
template <int D>
DEVICE void share(const Sums<D>& sums, const DecodeShared<D>& shared, int group, int warp, int lane) {
  float sum = sums.sum + __shfl_xor_sync(~0u, sums.sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (lane % 4 == 0) {
    shared.sums[warp * kMaxGroup + lane / 4] = sum;
    shared.maxima[warp * kMaxGroup + lane / 4] = sums.maximum;
  }
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    const int head = lane % 4 * 2 + odd;
    if (head >= group) continue;
    float* to = shared.outputs + (warp * group + head) * D + lane / 4;
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      to[16 * j] = sums.output[j][odd];
      to[16 * j + 8] = sums.output[j][2 + odd];
    }
  }
}

/// Four neighbouring values of a head's sum, its divisor and the maximum both are relative to.
struct Part {
  float4 output;
  float sum;
  float maximum;
};

template <bool Capped>
DEVICE void add(Part& to, const Part& part) {
  float old_factor = 1.0f, factor = 1.0f;
  if (!Capped) {
    const float maximum = fmaxf(to.maximum, part.maximum);
    old_factor = to.maximum == kNoScore ? 0.0f : exp2_approx(to.maximum - maximum);
    factor = part.maximum == kNoScore ? 0.0f : exp2_approx(part.maximum - maximum);
    to.maximum = maximum;
  }
  to.output.x = to.output.x * old_factor + part.output.x * factor;
  to.output.y = to.output.y * old_factor + part.output.y * factor;
  to.output.z = to.output.z * old_factor + part.output.z * factor;
  to.output.w = to.output.w * old_factor + part.output.w * factor;
  to.sum = to.sum * old_factor + part.sum * factor;
}

/// Columns `4 * quad`, ... of the group's heads, divided and in the form the o projection reads.
template <int D>
DEVICE void write_result(const Attention& p, const Unit& unit, int quad, const Part& part) {
  const int row = p.step.query_start[unit.seq];
  const int col = unit.head * (p.num_heads / p.num_kv_heads) * D + quad * 4;
  const float inverse = 1.0f / part.sum;
  const float4 x = {part.output.x * inverse, part.output.y * inverse, part.output.z * inverse, part.output.w * inverse};
  if (p.out.scheme == kSchemeStatic) {
    const float scale = p.out.static_scale;
    const uint32_t codes = e4m3x4_from_floats(__fdiv_rn(x.x, scale), __fdiv_rn(x.y, scale), __fdiv_rn(x.z, scale),
                                              __fdiv_rn(x.w, scale));
    *reinterpret_cast<uint32_t*>(result_address(p, row, col, 1, D)) = codes;
    if (col == 0) p.out.scales[row] = scale;
  } else {
    const uint2 pairs = make_uint2(bf16x2_from_floats(x.x, x.y), bf16x2_from_floats(x.z, x.w));
    *reinterpret_cast<uint2*>(result_address(p, row, col, 2, D)) = pairs;
  }
}

DEVICE float4 read_partial(const float* from) {
  const uint4 bits = load_l2(reinterpret_cast<const uint4*>(from));
  return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
}

/// Adds the chunks of a (sequence, kv head) in their order and writes the result.
template <int D, bool Capped>
DEVICE void merge_chunks(const AttentionDecode& p, const Unit& unit, int group) {
  const size_t first = size_t(unit.index - unit.chunk);
  const size_t stride = size_t(group) * D;
  for (int quad = int(threadIdx.x); quad < group * D / 4; quad += kThreads) {
    Part total = {{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, kNoScore};
    const float* outputs = p.partial_outputs + first * stride + quad * 4;
    const float* sums = p.partial_sums + first * (2 * kMaxGroup) + quad * 4 / D;
#pragma unroll 8
    for (int chunk = 0; chunk < unit.chunks; chunk++) {
      const Part part = {read_partial(outputs + chunk * stride), load_l2(sums + chunk * 2 * kMaxGroup),
                         Capped ? 0.0f : load_l2(sums + chunk * 2 * kMaxGroup + kMaxGroup)};
      add<Capped>(total, part);
    }
    write_result<D>(p.attention, unit, quad, total);
  }
}

/// Whether this block is the last of the unit's (sequence, kv head) to leave its partial sums.
template <int D>
DEVICE bool arrives_last(const AttentionDecode& p, const DecodeShared<D>& shared, const Unit& unit) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* arrivals = p.arrivals + unit.seq * p.attention.num_kv_heads + unit.head;
    __threadfence();
    const bool last = atomicAdd(arrivals, 1u) == unsigned(unit.chunks - 1);
    if (last) *arrivals = 0;
    __threadfence();
    *shared.is_last = last;
  }
  __syncthreads();
  return *shared.is_last != 0;
}

/// Adds what the warps left in shared memory. The result is either final or this chunk's part of it.
template <int D, bool Capped>
DEVICE void finish_unit(const AttentionDecode& p, const DecodeShared<D>& shared, const Unit& unit, int group) {
  __syncthreads();
  for (int quad = int(threadIdx.x); quad < group * D / 4; quad += kThreads) {
    const int head = quad * 4 / D;
    Part total = {{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, kNoScore};
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      const float4 output = *reinterpret_cast<const float4*>(shared.outputs + warp * group * D + quad * 4);
      add<Capped>(total, {output, shared.sums[warp * kMaxGroup + head], shared.maxima[warp * kMaxGroup + head]});
    }
    if (unit.chunks == 1) {
      write_result<D>(p.attention, unit, quad, total);
      continue;
    }
    float* outputs = p.partial_outputs + size_t(unit.index) * size_t(group * D) + quad * 4;
    *reinterpret_cast<float4*>(outputs) = total.output;
    if (quad * 4 % D == 0) {
      float* sums = p.partial_sums + size_t(unit.index) * (2 * kMaxGroup) + head;
      sums[0] = total.sum;
      sums[kMaxGroup] = total.maximum;
    }
  }
  if (unit.chunks > 1 && arrives_last<D>(p, shared, unit)) merge_chunks<D, Capped>(p, unit, group);
}

template <int D, bool Capped>
DEVICE void attention_decode(const AttentionDecode& p, uint8_t* memory) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int group = p.attention.num_heads / p.attention.num_kv_heads;
  const DecodeShared<D> shared(memory, p.stages, group);
  let_next_kernel_start();
  if (!p.step_is_settled) wait_for_previous_kernels();
  if (warp == 0) count_units(p, shared.first_unit, lane);
  __syncthreads();
  const int num_seqs = p.attention.step.counts->num_seqs;
  Loader<D> loader(p, shared, num_seqs, warp, lane);
  wait_for_previous_kernels();
  for (int i = 0; i < p.stages; i++) {
    loader.load_keys();
    loader.load_values();
  }
  uint32_t stage = loader.ring;
  for (int index = int(blockIdx.x);; index += int(gridDim.x)) {
    const Unit unit = find_unit(p, shared.first_unit, num_seqs, index);
    if (unit.first == unit.end) break;
    Sums<D> sums;
    clear<D>(sums);
    run_unit<D, Capped>(sums, loader, stage, p, unit);
    share<D>(sums, shared, group, warp, lane);
    finish_unit<D, Capped>(p, shared, unit, group);
    __syncthreads();
  }
  cp_async_wait<0>();
}

#define ATTENTION_DECODE(D)                                        \
  KERNEL(attention_decode_##D, AttentionDecode, kThreads, 1) {      \
    DYNAMIC_SHARED(memory);                                        \
    attention_decode<D, false>(p, memory);                         \
  }                                                                \
  KERNEL(attention_decode_capped_##D, AttentionDecode, kThreads, 1) { \
    DYNAMIC_SHARED(memory);                                        \
    attention_decode<D, true>(p, memory);                          \
  }

ATTENTION_DECODE(64)
ATTENTION_DECODE(128)
ATTENTION_DECODE(256)
