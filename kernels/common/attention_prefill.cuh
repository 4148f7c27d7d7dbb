// What the two prefill attention kernels share: everything but how products are made. They differ in the instructions and
// in how the operands of those lie in shared memory (`Layout`).
#pragma once

#include "attention.cuh"
#include "quantize.cuh"

/// Query tokens that share a block: rows `first_row`, ... of the step, all of sequence `seq`. A recorded step has more tiles
/// than it needs: those left have no rows.
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
  // Tokens of the lane's rows, warp * 16 + lane / 4 and 8 on, the second times 256: of registers none is to spare.
  int lane_tokens;

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
    end = tile.num_rows == 0 ? 0 : first_position + tile.num_rows;
    warp = int(threadIdx.x) / 32;
    lane = int(threadIdx.x) % 32;
    first_token = warp * 16 / group;
    last_token = min((warp * 16 + 15) / group, tile.num_rows - 1);
    const int row = warp * 16 + lane / 4;
    lane_tokens = row / group + (row + 8) / group * 256;
  }
  /// Whether any row of this warp sees any of the keys [from, to).
  DEVICE bool sees(int from, int to) const {
    return first_token <= last_token && from <= first_position + last_token &&
           to > first_position + first_token - p.window + 1;
  }
};

/// Looks up where every 16 positions from `begin` on lie.
template <int Threads>
DEVICE void find_key_tiles(const Prefill& work, unsigned* key_tiles) {
  const Step& step = work.p.step;
  const int* blocks = step.block_ids + load_l2(step.block_start + work.tile.seq);
  for (int i = int(threadIdx.x); work.begin + i * kTile < work.end; i += Threads) {
    const KeyTile tile(work.p, work.begin + i * kTile);
    key_tiles[i] = key_tile(work.p, unsigned(load_l2(blocks + tile.block)), work.head, tile.within);
  }
}

/// A warp loads its own 16 rows.
template <int D, class Layout>
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
    cp_async_16(queries + Layout::at(row, chunk), at, valid);
  }
}

/// Loads `Keys` keys from `key_position` on to `keys`, and as many values from `value_position` on to `values`. What lies
/// behind the last position that is seen becomes zero; a position behind it loads nothing.
template <int D, int Rows, int Keys, class Layout>
DEVICE void load_block(const Prefill& work, const unsigned* key_tiles, int key_position, uint32_t keys,
                       int value_position, uint32_t values) {
  constexpr int kTiles = Keys / kTile;
  const int thread = thread_index_again(), warp = thread / 32, lane = thread % 32;
  for (int i = warp; i < 2 * kTiles; i += Rows / 16) {
    const bool is_value = i >= kTiles;
    const int block = is_value ? value_position : key_position;
    if (block >= work.end) continue;
    const int row = i % kTiles * kTile, at = block + row;
    unsigned tile = 0;
    if (at < work.end) tile = key_tiles[(at - work.begin) / kTile] + (is_value ? value_tile_offset(work.p) : 0);
    load_tile<2 * D, Layout>(is_value ? values : keys, row, work.p.kv, tile, lane, 0, work.end - at);
  }
  cp_async_commit();
}

/// A warp's 16 rows. Lane l: rows l / 4 and l / 4 + 8, of which output[4j + 2h + c] is column
/// 8j + 2 (l % 4) + c of row h.
template <int D>
struct RowSums {
  float output[D / 2];
  float sum[2];
  float maximum[2];
};

template <int D>
DEVICE void clear(RowSums<D>& sums) {
#pragma unroll
  for (int j = 0; j < D / 2; j++) sums.output[j] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; i++) sums.sum[i] = 0.0f, sums.maximum[i] = kNoScore;
}

/// Which of a lane's scores count. Scores lie as RowSums' output does.
struct Mask {
  bool masked;      // false: all of the warp's do
  int distance[2];  // from the lane's first column to its rows
  int window;

  /// For the block of keys at `position` and this lane of a warp.
  DEVICE Mask(const Prefill& work, int block, int keys) {
    const int column = thread_index_again() % 4 * 2;
    const int from_first = work.first_position - block;
    const int first = from_first + work.lane_tokens % 256, second = from_first + work.lane_tokens / 256;
    distance[0] = first - column, distance[1] = second - column;
    window = work.p.window;
    masked = __any_sync(~0u, first < keys - 1 || second >= window);
  }
  DEVICE bool sees(int i) const {
    return unsigned(distance[i / 2 % 2] - (i / 4 * 8 + i % 2)) < unsigned(window);
  }
};

/// Scores, with soft-cap the powers they became, to probabilities, relative to the maximum so far if there is no soft-cap: then
/// `factors` is what everything summed before must be multiplied with.
template <int Keys, bool Capped, bool Masked>
DEVICE void exponentiate(float (&s)[Keys / 2], float (&maximum)[2], float (&factors)[2], const Mask& mask,
                         const Attention& p) {
  if (!Capped) {
    float before[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int i = 0; i < Keys / 2; i++) {
      s[i] *= p.score_scale;
      if (!Masked || mask.sees(i)) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], s[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(~0u, maximum[half], 2));
      factors[half] = before[half] == kNoScore ? 0.0f : exp2_approx(before[half] - maximum[half]);
    }
  }
#pragma unroll
  for (int i = 0; i < Keys / 2; i++) {
    if (!Capped) s[i] = exp2_approx(s[i] - maximum[i / 2 % 2]);
    if (Masked && !mask.sees(i)) s[i] = 0.0f;
  }
}
/// Of the block of keys at `block`.
template <int Keys, bool Capped>
DEVICE void exponentiate(float (&s)[Keys / 2], float (&maximum)[2], float (&factors)[2], const Prefill& work, int block) {
  const Attention& p = work.p;
  if (Capped) {
    capped_exponents(s, p);
#pragma unroll
    for (int i = 0; i < Keys / 2; i++) s[i] = rough_exp2_rounded(s[i]);
  }
  // Not before: registers are short.
  const Mask mask(work, block, Keys);
  if (mask.masked) exponentiate<Keys, Capped, true>(s, maximum, factors, mask, p);
  else exponentiate<Keys, Capped, false>(s, maximum, factors, mask, p);
}

/// Probabilities in bf16, as A operands of the product with V, 16 keys each; counts them.
template <int D, int Keys, bool Capped>
DEVICE void pack(uint32_t (&probabilities)[Keys / 16][4], RowSums<D>& sums, const float (&s)[Keys / 2],
                 const float (&factors)[2]) {
  if (!Capped) {
#pragma unroll
    for (int j = 0; j < D / 2; j++) sums.output[j] *= factors[j / 2 % 2];
    sums.sum[0] *= factors[0];
    sums.sum[1] *= factors[1];
  }
#pragma unroll
  for (int i = 0; i < Keys / 2; i += 2) {
    const uint32_t pair = bf16x2_from_floats(s[i], s[i + 1]);
    probabilities[i / 8][i / 2 % 4] = pair;
    // What is divided by is the sum of what is multiplied.
    sums.sum[i / 2 % 2] += low_float(pair) + high_float(pair);
  }
}

/// Leaves the divided result of a warp's rows where its queries were, as it will lie in memory.
template <int D, class Layout>
DEVICE void stage_result(const RowSums<D>& sums, const Prefill& work, uint8_t* rows) {
  const int thread = thread_index_again(), warp = thread / 32, lane = thread % 32;
  const bool fp8 = work.p.out.scheme == kSchemeStatic;
  const Divisor by = divisor(work.p.out.static_scale);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = sums.sum[half] + __shfl_xor_sync(~0u, sums.sum[half], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = work.p.value_scale * (1.0f / sum);
    const int row = warp * 16 + lane / 4 + half * 8;
    // Two columns of each of eight blocks of eight.
#pragma unroll
    for (int first = 0; first < D / 8; first += 8) {
      float x[16];
#pragma unroll
      for (int i = 0; i < 16; i++) x[i] = sums.output[4 * (first + i / 2) + 2 * half + i % 2] * inverse;
      if (fp8) {
        uint32_t codes[4];
        quantize(x, by, codes);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int block = first + i;
          uint8_t* to = rows + Layout::at(row, block / 2) + block % 2 * 8 + lane % 4 * 2;
          *reinterpret_cast<uint16_t*>(to) = uint16_t(codes[i / 2] >> (i % 2 * 16));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          *reinterpret_cast<uint32_t*>(rows + Layout::at(row, first + i) + lane % 4 * 4) =
              bf16x2_from_floats(x[2 * i], x[2 * i + 1]);
        }
      }
    }
  }
}

template <int D, class Layout>
DEVICE void write_rows(const Prefill& work, const uint8_t* rows) {
  const Attention& p = work.p;
  const bool fp8 = p.out.scheme == kSchemeStatic;
  const int size = fp8 ? 1 : 2;
  const int chunks = D * size / 16;
  const int thread = thread_index_again();
  for (int i = thread % 32; i < 16 * chunks; i += 32) {
    const int row = thread / 32 * 16 + i / chunks, chunk = i % chunks;
    const int token = row / work.group;
    if (token >= work.tile.num_rows) return;
    const int head = work.head * work.group + row - token * work.group;
    const int to_row = work.tile.first_row + token;
    const uint4 bytes = *reinterpret_cast<const uint4*>(rows + Layout::at(row, chunk));
    *reinterpret_cast<uint4*>(result_address(p, to_row, head * D + chunk * (16 / size), size, D)) = bytes;
    if (fp8 && head == 0 && chunk == 0) p.out.scales[to_row] = p.out.static_scale;
  }
}

