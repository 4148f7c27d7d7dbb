// What both attention kernels share: their inputs, where keys and values lie, scores to probabilities, the output.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"
#include "step.cuh"

/// Inputs and output of one layer's attention. Token i of a sequence sees token j if `0 <= i - j < window`.
struct Attention {
  Step step;
  /// `[num_tokens][(num_heads + 2 * num_kv_heads) * D]`; the q heads are rotated and not scaled.
  const bf16* qkv;
  /// `[num_blocks][K, V][num_kv_heads][block_size][D]`, bf16 or e4m3; of a row's chunks of 16 bytes, chunk i is where chunk
  /// i ^ `row_swizzle` would be.
  const uint8_t* kv;
  /// The o projection's input, unless its scheme is `kSchemeToken`.
  Activation out;
  /// `[num_tokens][num_heads * D]`: the result if the scheme is `kSchemeToken`, for a row kernel to quantise.
  bf16* rows;
  int num_heads;
  int num_kv_heads;
  /// A multiple of 16.
  int block_size;
  int window;
  /// With soft-cap c and logit scale s, which keys' own is part of: 2 s log2(e) / c. Without: s log2(e).
  float score_scale;
  /// c log2(e); unused without soft-cap.
  float cap;
  /// With soft-cap: the polynomial of `near_capped_exponent`, for products up to `near_limit`.
  float near[4];
  float near_limit;
  /// What stored values are to be multiplied by.
  float value_scale;
};

/// A tile of K or V is this many positions: a multiple lies within one block.
constexpr int kTile = 16;

/// c tanh(s q.k / c) in units of log2, of a product up to `near_limit`: scores up to a third of the cap, nearly all of a
/// trained model's. To 2e-7 of it: tanh(x) / x is a polynomial in x^2, found by Remez's algorithm. No special function, and no
/// difference of numbers near 1, which leaves an error of 4e-6 however small the score.
DEVICE float near_capped_exponent(float dot, const Attention& p) {
  const float square = __fmul_rn(dot, dot);
  float ratio = __fmaf_rn(p.near[3], square, p.near[2]);
  ratio = __fmaf_rn(ratio, square, p.near[1]);
  ratio = __fmaf_rn(ratio, square, p.near[0]);
  return __fmul_rn(dot, ratio);
}
/// The same for any score: c (1 - 2 / (1 + e^2x)), which is the cap from 2^64 on.
DEVICE float far_capped_exponent(float dot, const Attention& p) {
  const float e = exp2_rounded(fminf(fmaxf(__fmul_rn(dot, p.score_scale), -64.0f), 64.0f));
  return __fmul_rn(__fmaf_rn(-2.0f, reciprocal_rounded(__fadd_rn(1.0f, e)), 1.0f), p.cap);
}

/// Products q.k of a warp to c tanh(s q.k / c) in units of log2: exponents of probabilities. They need no maximum subtracted:
/// exp(50) and its sums are far from f32's limits. A result depends on its own product alone.
template <int N>
DEVICE void capped_exponents(float (&s)[N], const Attention& p) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < N; i++) largest = fmaxf(largest, fabsf(s[i]));
  if (__any_sync(~0u, largest > p.near_limit)) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      s[i] = fabsf(s[i]) > p.near_limit ? far_capped_exponent(s[i], p) : near_capped_exponent(s[i], p);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = near_capped_exponent(s[i], p);
  }
}

/// Where the 16 keys from `position` on (a multiple of 16) lie: in which of the sequence's blocks, and in which tile of it.
struct KeyTile {
  unsigned block;
  unsigned within;

  DEVICE KeyTile(const Attention& p, int position) : block(unsigned(position) / unsigned(p.block_size)) {
    within = (unsigned(position) - block * unsigned(p.block_size)) / kTile;
  }
};
/// A tile of block `id` as an index of 16-row tiles of `kv`.
DEVICE unsigned key_tile(const Attention& p, unsigned id, int head, unsigned within) {
  return (id * 2u * unsigned(p.num_kv_heads) + unsigned(head)) * (unsigned(p.block_size) / kTile) + within;
}
/// From a tile of keys to the tile of their values.
DEVICE unsigned value_tile_offset(const Attention& p) {
  return unsigned(p.num_kv_heads) * (unsigned(p.block_size) / kTile);
}

/// How the 16-byte chunks of a row are permuted so that ldmatrix meets no bank conflict: 8 rows fill all banks with a chunk each.
template <int RowBytes>
DEVICE int row_swizzle(int row) {
  return RowBytes < 128 ? row / 2 & 3 : row & 7;
}
/// Where a row's chunk `chunk` stands in shared memory. The cache is permuted alike.
template <int RowBytes>
DEVICE uint32_t swizzled(int row, int chunk) {
  return uint32_t(row * RowBytes + (chunk ^ row_swizzle<RowBytes>(row)) * 16);
}
/// The same as a way to lay out a tile.
template <int RowBytes>
struct PlainRows {
  static DEVICE uint32_t at(int row, int chunk) { return swizzled<RowBytes>(row, chunk); }
};

/// Loads 16 rows with one warp; rows outside [first, end) become zeros, whatever memory holds there. They are rows
/// `to_row`, ... of what is at `to`.
template <int RowBytes, class Layout>
DEVICE void load_tile(uint32_t to, int to_row, const uint8_t* kv, unsigned tile, int lane, int first, int end) {
  constexpr int kChunks = RowBytes / 16;
  constexpr int kRowsPerStep = 32 / kChunks;
  const int row = lane / kChunks, chunk = lane % kChunks;
  const uint8_t* from = kv + size_t(tile) * (kTile * RowBytes) + lane * 16;
#pragma unroll
  for (int step = 0; step < kTile / kRowsPerStep; step++) {
    const int r = step * kRowsPerStep + row;
    cp_async_16(to + Layout::at(to_row + r, chunk ^ row_swizzle<RowBytes>(r)), from + step * 512, r >= first && r < end);
  }
}

/// Where columns `col`, ... of a result row are written, with `size` bytes to a value.
DEVICE uint8_t* result_address(const Attention& p, int row, int col, int size, int head_dim) {
  if (p.out.scheme != kSchemeToken) return p.out.panels + panel_offset(row, col * size, p.out.row_stride);
  return reinterpret_cast<uint8_t*>(p.rows + size_t(row) * size_t(p.num_heads * head_dim) + col);
}
