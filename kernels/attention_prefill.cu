// Attention of sequences with several query tokens (a prompt or a part of one) over the paged KV cache, whose positions
// up to the last query token are already in place: causal, window, soft-cap or running maximum, GQA.
//
// Work: one block computes a tile of query tokens for one kv head. The tile's rows are (token, head of the group) pairs,
// so that one load of K and V serves the whole group; a warp has 16 rows. Blocks of keys are aligned to absolute position
// and taken in order; where a row sees nothing of a block, the block adds nothing to it: a row's result does not depend
// on which rows share its tile, hence not on how its prompt was cut into steps.
//
// In the manner of FlashAttention-2: the block of K and V after the current one is on its way (cp.async, two buffers)
// while S = Q K^T and O += P V run on tensor cores; O and P stay in registers, Q is read from shared memory each time.
//
// Bound: tensor cores in principle; in practice shared memory, which every warp reads all of K and V from for 16 rows.
#include "common/attention.cuh"

/// Query tokens that share a block: rows `first_row`, ... of the step, all of sequence `seq`.
struct QueryTile {
  int seq;
  int first_row;
  int num_rows;
};

struct AttentionPrefill {
  Attention attention;
  const QueryTile* tiles;  // [gridDim.y], complete before the step begins; gridDim.x is num_kv_heads
};

constexpr float kNoScore = -INFINITY;

/// What a block of threads works on.
struct Prefill {
  const Attention& p;
  QueryTile tile;
  int head;
  int group;
  int first_position;  // of the tile's first token
  int begin, end;      // positions that any of its rows sees; `begin` is rounded down to a block of keys
  int warp, lane;
  // This warp's rows see positions first_seen, ... of first_position + [first_token, last_token].
  int first_token, last_token;

  static DEVICE QueryTile read_tile(const QueryTile* tiles) {
    const int* words = &tiles[blockIdx.y].seq;
    return {load_l2(words), load_l2(words + 1), load_l2(words + 2)};
  }
  DEVICE Prefill(const AttentionPrefill& params, int keys)
      : p(params.attention), tile(read_tile(params.tiles)), head(int(blockIdx.x)) {
    group = p.num_heads / p.num_kv_heads;
    const int rows_after = load_l2(p.step.query_start + tile.seq + 1) - tile.first_row;
    first_position = load_l2(p.step.context_lens + tile.seq) - rows_after;
    begin = max(0, first_position - p.window + 1) / keys * keys;
    end = first_position + tile.num_rows;
    warp = int(threadIdx.x) / 32;
    lane = int(threadIdx.x) % 32;
    first_token = warp * 16 / group;
    last_token = min((warp * 16 + 15) / group, tile.num_rows - 1);
  }
  /// Whether any row of this warp sees any of the keys [from, to).
  DEVICE bool sees(int from, int to) const {
    return first_token <= last_token && from <= first_position + last_token &&
           to > first_position + first_token - p.window + 1;
  }
  /// Whether every row of this warp sees all of them.
  DEVICE bool sees_all(int from, int to) const {
    return to - 1 <= first_position + first_token && from > first_position + last_token - p.window;
  }
};

/// Shared memory of a block.
template <int D, int Rows, int Keys>
struct PrefillShared {
  static constexpr int kRowBytes = 2 * D;
  static constexpr int kStageBytes = 2 * Keys * kRowBytes;
  uint8_t* queries;     // [Rows][D] bf16; in the end the result
  uint32_t stages;      // [2][K, V][Keys][D] bf16
  unsigned* key_tiles;  // where every 16 positions from `begin` on lie

  DEVICE explicit PrefillShared(uint8_t* memory) {
    queries = memory;
    stages = shared_address(memory) + Rows * kRowBytes;
    key_tiles = reinterpret_cast<unsigned*>(memory + Rows * kRowBytes + 2 * kStageBytes);
  }
};

template <int Threads>
DEVICE void find_key_tiles(const Prefill& work, unsigned* key_tiles) {
  const Step& step = work.p.step;
  const int* blocks = step.block_ids + load_l2(step.block_start + work.tile.seq);
  for (int i = int(threadIdx.x); work.begin + i * kTile < work.end; i += Threads) {
    key_tiles[i] = key_tile(work.p, blocks, work.head, work.begin + i * kTile);
  }
}

/// A warp loads its own 16 rows.
template <int D>
DEVICE void load_queries(const Prefill& work, uint32_t queries) {
  constexpr int kChunks = D / 8;
  const size_t cols = size_t(work.p.num_heads + 2 * work.p.num_kv_heads) * D;
  const bf16* from = work.p.qkv + size_t(work.tile.first_row) * cols + size_t(work.head * work.group) * D;
#pragma unroll 4
  for (int i = work.lane; i < 16 * kChunks; i += 32) {
    const int row = work.warp * 16 + i / kChunks, chunk = i % kChunks;
    const int token = row / work.group;
    const bool valid = token < work.tile.num_rows;
    const bf16* at = from + size_t(valid ? token : 0) * cols + (row - token * work.group) * D + chunk * 8;
    cp_async_16(queries + swizzled<D>(row, chunk), at, valid);
  }
}

/// Loads the block of keys that starts at `position`, and its values.
template <int D, int Rows, int Keys>
DEVICE void load_block(const Prefill& work, const PrefillShared<D, Rows, Keys>& shared, int position, uint32_t stage) {
  for (int i = work.warp; i < 2 * Keys / kTile; i += Rows / 16) {
    const int at = position + i % (Keys / kTile) * kTile;
    unsigned tile = 0;
    if (at < work.end) tile = shared.key_tiles[(at - work.begin) / kTile];
    if (i >= Keys / kTile) tile += value_tile_offset(work.p);
    load_tile<D>(stage + uint32_t(i * kTile * 2 * D), work.p.kv, tile, work.lane, 0, work.end - at);
  }
  cp_async_commit();
}

/// A warp's 16 rows. Lane l: rows l / 4 and l / 4 + 8, of `output[j]` columns 8j + 2 (l % 4) + {0, 1}.
template <int D>
struct RowSums {
  float output[D / 8][4];
  float sum[2];
  float maximum[2];
};

template <int D>
DEVICE void clear(RowSums<D>& sums) {
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums.output[j][i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) sums.sum[i] = 0.0f, sums.maximum[i] = kNoScore;
}

/// S = Q K^T for a block of keys. `queries` and `keys` are where this lane points ldmatrix at for the first columns.
template <int D, int Keys>
DEVICE void score(float (&s)[Keys / 8][4], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[n][i] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
    uint32_t q[4];
    ldmatrix_x4(q, queries ^ uint32_t(32 * j));
#pragma unroll
    for (int n = 0; n < Keys / 16; n++) {
      uint32_t k[4];
      ldmatrix_x4(k, (keys ^ uint32_t(32 * j)) + uint32_t(n * 16 * 2 * D));
      mma_m16n8k16_bf16(s[2 * n], q, {k[0], k[1]}, s[2 * n]);
      mma_m16n8k16_bf16(s[2 * n + 1], q, {k[2], k[3]}, s[2 * n + 1]);
    }
  }
}

/// Which of a lane's scores count: `masked` false if all do.
struct Mask {
  bool masked;
  int position[2];  // of the lane's rows
  int key;          // of its first column
  int window;

  DEVICE bool sees(int column, int i) const {
    return !masked || unsigned(position[i / 2] - (key + column * 8 + i % 2)) < unsigned(window);
  }
};

/// Multiplies what was summed so far for the new maximum; the scores become probabilities relative to it.
template <int D, int Keys>
DEVICE void rescale(RowSums<D>& sums, float (&s)[Keys / 8][4], const Mask& mask, float score_scale) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float maximum = sums.maximum[half];
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        s[n][i] *= score_scale;
        if (mask.sees(n, i)) maximum = fmaxf(maximum, s[n][i]);
      }
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
    const float factor = sums.maximum[half] == kNoScore ? 0.0f : exp2_approx(sums.maximum[half] - maximum);
    sums.maximum[half] = maximum;
    sums.sum[half] *= factor;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      sums.output[j][2 * half] *= factor;
      sums.output[j][2 * half + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) s[n][i] = exp2_approx(s[n][i] - maximum);
    }
  }
}

/// Scores to probabilities, in bf16, as A operands of the product with V: 16 keys each.
template <int D, int Keys, bool Capped>
DEVICE void weigh(uint32_t (&probabilities)[Keys / 16][4], RowSums<D>& sums, float (&s)[Keys / 8][4], const Mask& mask,
                  const Attention& p) {
  if (!Capped) rescale<D, Keys>(sums, s, mask, p.score_scale);
#pragma unroll
  for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (Capped) s[n][i] = capped_exp(s[n][i], p.score_scale, p.cap);
      if (!mask.sees(n, i)) s[n][i] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = bf16x2_from_floats(s[n][2 * half], s[n][2 * half + 1]);
      probabilities[n / 2][n % 2 * 2 + half] = pair;
      // What is divided by is the sum of what is multiplied.
      sums.sum[half] += low_float(pair) + high_float(pair);
    }
  }
}

template <int D, int Keys>
DEVICE void accumulate(RowSums<D>& sums, const uint32_t (&probabilities)[Keys / 16][4], uint32_t values) {
#pragma unroll
  for (int n = 0; n < Keys / 16; n++) {
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t v[4];
      ldmatrix_x4_transposed(v, (values ^ uint32_t(32 * j)) + uint32_t(n * 16 * 2 * D));
      mma_m16n8k16_bf16(sums.output[2 * j], probabilities[n], {v[0], v[1]}, sums.output[2 * j]);
      mma_m16n8k16_bf16(sums.output[2 * j + 1], probabilities[n], {v[2], v[3]}, sums.output[2 * j + 1]);
    }
  }
}

/// One block of keys for one warp.
template <int D, int Keys, bool Capped>
DEVICE void attend(RowSums<D>& sums, const Prefill& work, int position, uint32_t queries, uint32_t stage) {
  const int lane = work.lane;
  float s[Keys / 8][4];
  uint32_t probabilities[Keys / 16][4];
  score<D, Keys>(s, queries + swizzled<D>(work.warp * 16 + lane % 16, lane / 16),
                 stage + swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2));
  Mask mask{};
  if (work.sees_all(position, position + Keys)) {
    weigh<D, Keys, Capped>(probabilities, sums, s, mask, work.p);
  } else {
    mask.masked = true;
    const int row = work.warp * 16 + lane / 4;
    mask.position[0] = work.first_position + row / work.group;
    mask.position[1] = work.first_position + (row + 8) / work.group;
    mask.key = position + lane % 4 * 2;
    mask.window = work.p.window;
    weigh<D, Keys, Capped>(probabilities, sums, s, mask, work.p);
  }
  accumulate<D, Keys>(sums, probabilities, stage + Keys * 2 * D + swizzled<D>(lane % 16, lane / 16));
}

/// Leaves the divided result of a warp's rows where its queries were, as it will lie in memory.
template <int D>
DEVICE void stage_result(const RowSums<D>& sums, const Prefill& work, uint8_t* rows) {
  const int lane = work.lane;
  const bool fp8 = work.p.out.scheme == kSchemeStatic;
  const float scale = work.p.out.static_scale;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = sums.sum[half] + __shfl_xor_sync(~0u, sums.sum[half], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = 1.0f / sum;
    const int row = work.warp * 16 + lane / 4 + half * 8;
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
      const float low = sums.output[j][2 * half] * inverse, high = sums.output[j][2 * half + 1] * inverse;
      if (fp8) {
        uint8_t* to = rows + swizzled<D>(row, j / 2) + j % 2 * 8 + lane % 4 * 2;
        *reinterpret_cast<uint16_t*>(to) = e4m3x2_from_floats(__fdiv_rn(low, scale), __fdiv_rn(high, scale));
      } else {
        *reinterpret_cast<uint32_t*>(rows + swizzled<D>(row, j) + lane % 4 * 4) = bf16x2_from_floats(low, high);
      }
    }
  }
}

template <int D>
DEVICE void write_rows(const Prefill& work, const uint8_t* rows) {
  const Attention& p = work.p;
  const bool fp8 = p.out.scheme == kSchemeStatic;
  const int size = fp8 ? 1 : 2;
  const int chunks = D * size / 16;
  for (int i = work.lane; i < 16 * chunks; i += 32) {
    const int row = work.warp * 16 + i / chunks, chunk = i % chunks;
    const int token = row / work.group;
    if (token >= work.tile.num_rows) return;
    const int head = work.head * work.group + row - token * work.group;
    const int to_row = work.tile.first_row + token;
    const uint4 bytes = *reinterpret_cast<const uint4*>(rows + swizzled<D>(row, chunk));
    *reinterpret_cast<uint4*>(result_address(p, to_row, head * D + chunk * (16 / size), size, D)) = bytes;
    if (fp8 && head == 0 && chunk == 0) p.out.scales[to_row] = p.out.static_scale;
  }
}

template <int D, int Rows, int Keys, bool Capped>
DEVICE void attention_prefill(const AttentionPrefill& params, uint8_t* memory) {
  using Shared = PrefillShared<D, Rows, Keys>;
  const Shared shared(memory);
  let_next_kernel_start();
  const Prefill work(params, Keys);
  const uint32_t queries = shared_address(shared.queries);
  find_key_tiles<2 * Rows>(work, shared.key_tiles);
  wait_for_previous_kernels();
  load_queries<D>(work, queries);
  __syncthreads();
  load_block<D, Rows, Keys>(work, shared, work.begin, shared.stages);
  RowSums<D> sums;
  clear<D>(sums);
  uint32_t stage = 0;
  for (int position = work.begin; position < work.end; position += Keys) {
    cp_async_wait<0>();
    __syncthreads();
    const uint32_t here = shared.stages + stage * Shared::kStageBytes;
    stage ^= 1;
    if (position + Keys < work.end) {
      load_block<D, Rows, Keys>(work, shared, position + Keys, shared.stages + stage * Shared::kStageBytes);
    }
    if (work.sees(position, position + Keys)) attend<D, Keys, Capped>(sums, work, position, queries, here);
  }
  stage_result<D>(sums, work, shared.queries);
  __syncwarp();
  write_rows<D>(work, shared.queries);
}

#define ATTENTION_PREFILL(D, ROWS, KEYS)                                                    \
  KERNEL(attention_prefill_##D##_##ROWS##x##KEYS, AttentionPrefill, 2 * ROWS, 1) {           \
    DYNAMIC_SHARED(memory);                                                                 \
    attention_prefill<D, ROWS, KEYS, false>(p, memory);                                     \
  }                                                                                         \
  KERNEL(attention_prefill_capped_##D##_##ROWS##x##KEYS, AttentionPrefill, 2 * ROWS, 1) {    \
    DYNAMIC_SHARED(memory);                                                                 \
    attention_prefill<D, ROWS, KEYS, true>(p, memory);                                      \
  }

// What fits a block's shared memory: 227 KB or 99 KB. Of the larger tiles, 64 rows are for steps with few tokens.
#if defined(LAPIDARY_EMULATOR) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
ATTENTION_PREFILL(64, 64, 64)
ATTENTION_PREFILL(64, 128, 64)
ATTENTION_PREFILL(128, 64, 64)
ATTENTION_PREFILL(128, 128, 64)
ATTENTION_PREFILL(256, 64, 64)
ATTENTION_PREFILL(256, 128, 64)
#endif
#if defined(LAPIDARY_EMULATOR) || __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200
ATTENTION_PREFILL(64, 64, 32)
ATTENTION_PREFILL(128, 64, 32)
ATTENTION_PREFILL(256, 64, 32)
#endif
