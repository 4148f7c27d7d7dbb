// What the matrix products have in common: parameters, and how a tile of sums becomes output.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

/// out[m][n] = (sum over k of x[m][k] * w[n][k]) * x_scales[m] * w_scales[n], for m < *num_rows and n < `columns`.
struct GemmParams {
  const uint8_t* x;       // [panels][x_stride][128 bytes], layout.cuh
  const float* x_scales;  // [x_stride], or null: all 1
  const uint8_t* w;       // [panels][w_rows][128 bytes]
  const float* w_scales;  // [w_rows], or null: all 1
  void* out;              // [rows][out_stride]; for bf16 both are multiples of 8 and `out` is aligned
  const int* num_rows;
  int x_stride;  // a multiple of 128
  int w_rows;    // `columns` rounded up to a multiple of 64
  int columns;
  int panels;
  int out_stride;  // in elements
  float soft_cap;  // f32 output only: cap * tanh(x / cap); 0 for none
  // Hopper only, and only about speed:
  int row_tiles_together;  // that are done for each column tile
  int lead_panels;         // how far the first warpgroup begins a tile ahead of the second; 0 where `panels` are few
};

/// The order of these products is part of the contract: every kernel gives the same bits.
DEVICE float scaled_sum(float sum, float x_scale, float w_scale) { return sum * x_scale * w_scale; }

/// cap * tanh(x / cap) to about 1e-6 of the cap: cap - 2 cap / (1 + e^(2x / cap)). Saturates without overflow.
DEVICE float soft_capped(float x, float cap) {
  if (cap <= 0.0f) return x;
  const float e = exp2_approx(fminf(x * (2.0f * kLog2E / cap), 126.0f));
  return __fmaf_rn(-2.0f * cap, reciprocal_approx(1.0f + e), cap);
}

/// Two f32 values of one row.
DEVICE void store_two(float* row, int column, int columns, float a, float b) {
  if (column + 2 <= columns && reinterpret_cast<size_t>(row + column) % 8 == 0) {
    *reinterpret_cast<float2*>(row + column) = make_float2(a, b);
    return;
  }
  if (column < columns) row[column] = a;
  if (column + 1 < columns) row[column + 1] = b;
}

/// Where a warp's 16 x Columns sums go, and their scales.
struct SumsTarget {
  int row, column;        // of the warp's first sum
  int num_rows;           // rows from here on are not stored
  const float* x_scales;  // of the 16 rows
  const float* w_scales;  // of the columns
};

/// The two scaled values that the calling lane holds of row `half` (of two) in the eight columns from `8 * block`.
template <int Columns>
DEVICE float2 scaled_pair(const float (&sums)[Columns / 2], int block, int half, float x_scale, float2 w_scale) {
  return make_float2(scaled_sum(sums[block * 4 + half * 2], x_scale, w_scale.x),
                     scaled_sum(sums[block * 4 + half * 2 + 1], x_scale, w_scale.y));
}

/// Stores sums in the layout of wgmma and mma.sync accumulators (wgmma.cuh) as bf16. Neighbouring lanes exchange halves of
/// two blocks of eight columns, so that four lanes store 32 bytes of a row, a whole sector.
template <int Columns>
DEVICE void store_sums(const GemmParams& p, const SumsTarget& to, const float (&sums)[Columns / 2], const float (&x_scale)[2],
                       bf16*) {
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const bool odd = lane & 1;
  // Of two blocks, odd lanes store four columns of the second.
  const int column = to.column + (odd ? 8 : 0) + quad / 2 * 4, end = min(p.columns, to.column + Columns);
  bf16* const out = static_cast<bf16*>(p.out) + size_t(to.row + lane / 4) * p.out_stride + column;
#pragma unroll
  for (int block = 0; block < Columns / 8; block += 2) {
    uint32_t words[2][2] = {};
#pragma unroll
    for (int i = 0; i < 2 && block + i < Columns / 8; i++) {
      const float2 w_scale = *reinterpret_cast<const float2*>(to.w_scales + (block + i) * 8 + quad * 2);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 pair = scaled_pair<Columns>(sums, block + i, half, x_scale[half], w_scale);
        words[half][i] = bf16x2_from_floats(pair.x, pair.y);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t first = words[half][0], second = words[half][1];
      const uint32_t other = __shfl_xor_sync(~0u, odd ? first : second, 1);
      const uint2 four = odd ? make_uint2(other, second) : make_uint2(first, other);
      if (to.row + lane / 4 + half * 8 < to.num_rows && column + block * 8 < end) {
        *reinterpret_cast<uint2*>(out + size_t(half) * 8 * p.out_stride + block * 8) = four;
      }
    }
  }
}

/// The same for f32, 32 bytes of a row at a time.
template <int Columns>
DEVICE void store_sums(const GemmParams& p, const SumsTarget& to, const float (&sums)[Columns / 2], const float (&x_scale)[2],
                       float*) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < Columns / 8; block++) {
    const int column = block * 8 + lane % 4 * 2;
    const float2 w_scale = *reinterpret_cast<const float2*>(to.w_scales + column);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = to.row + lane / 4 + half * 8;
      if (row >= to.num_rows) continue;
      const float2 pair = scaled_pair<Columns>(sums, block, half, x_scale[half], w_scale);
      store_two(static_cast<float*>(p.out) + size_t(row) * p.out_stride, to.column + column, p.columns,
                soft_capped(pair.x, p.soft_cap), soft_capped(pair.y, p.soft_cap));
    }
  }
}

/// Scales a warp's sums and stores them as `Out` (bf16 or float; Gated with its own parameters).
template <class Out, int Columns, class Params>
DEVICE void store_warp_sums(const Params& p, const SumsTarget& to, const float (&sums)[Columns / 2]) {
  const int row = threadIdx.x % 32 / 4;
  const float x_scale[2] = {to.x_scales[row], to.x_scales[row + 8]};
  store_sums<Columns>(p, to, sums, x_scale, static_cast<Out*>(nullptr));
}
