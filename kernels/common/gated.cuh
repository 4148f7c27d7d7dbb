// The gated activation, and in which order its two inputs lie.
//
// Gate and up are one product, the weights of which are packed so that its columns take turns: 8 of gate, the 8 of up that
// belong to them, 8 of gate, and so on; of n < 8 last columns, n and n. A thread that holds sums of a product of tensor cores
// then has gate and up of the same columns.
#pragma once

#include "gemm.cuh"
#include "quantize.cuh"

/// gelu_tanh(gate) * up. With u = sqrt(2 / pi) * (g + 0.044715 g^3), gelu is g * e^2u / (1 + e^2u), which keeps its relative
/// precision for negative g. From 2^32 on the quotient is 1.
DEVICE float gated(float gate, float up) {
  constexpr float kLinear = 2.0f * 0.7978846f * kLog2E, kCubic = kLinear * 0.044715f;
  const float exponent = __fmul_rn(gate, __fmaf_rn(kCubic, __fmul_rn(gate, gate), kLinear));
  const float e = exp2_rounded(fminf(fmaxf(exponent, -126.0f), 32.0f));
  return __fmul_rn(__fmul_rn(gate, __fmul_rn(e, reciprocal_rounded(__fadd_rn(1.0f, e)))), up);
}

/// A product whose columns are gate and up: what is stored is gelu_tanh(gate) * up by a static scale. `out` is not used.
struct GatedGemmParams : GemmParams {
  Activation gated;  // [rows][columns / 2]; columns / 2 is a multiple of 8
};
struct Gated {};

/// The four values of block `pair` of gated columns that the calling lane has: two columns of one row, then of the other.
/// Gate is block 2 * `pair` of the sums and up the next; both are rounded to bf16 as if they had been stored.
template <int Columns>
DEVICE void gate_four(const float (&sums)[Columns / 2], int pair, const float (&x_scale)[2], const float* w_scales,
                      float* four) {
  const float2 gate_scale = *reinterpret_cast<const float2*>(w_scales);
  const float2 up_scale = *reinterpret_cast<const float2*>(w_scales + 8);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float2 gates = scaled_pair<Columns>(sums, 2 * pair, half, x_scale[half], gate_scale);
    const float2 ups = scaled_pair<Columns>(sums, 2 * pair + 1, half, x_scale[half], up_scale);
    const uint32_t gate = bf16x2_from_floats(gates.x, gates.y), up = bf16x2_from_floats(ups.x, ups.y);
    four[2 * half] = gated(low_float(gate), low_float(up));
    four[2 * half + 1] = gated(high_float(gate), high_float(up));
  }
}

DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

/// Gathers `codes` of four pairs of blocks, of which each of four lanes has two columns of two rows: lane q gets all eight
/// columns of pair q, of both rows.
DEVICE void gather_codes(const uint32_t (&codes)[4], uint2 (&rows)[2]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  uint32_t words[2][2];  // four columns of pair odd and of pair 2 + odd, by row
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t own = odd ? codes[2 * i + 1] : codes[2 * i];
    const uint32_t other = __shfl_xor_sync(~0u, odd ? codes[2 * i] : codes[2 * i + 1], 1);
    const uint32_t first = odd ? other : own, second = odd ? own : other;
    words[i][0] = low_halves(first, second);
    words[i][1] = high_halves(first, second);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t own = upper ? words[1][half] : words[0][half];
    const uint32_t other = __shfl_xor_sync(~0u, upper ? words[0][half] : words[1][half], 2);
    rows[half] = upper ? make_uint2(other, own) : make_uint2(own, other);
  }
}

/// Stores gated values: four lanes 32 bytes of a row, a whole sector.
template <int Columns>
DEVICE void store_sums(const GatedGemmParams& p, const SumsTarget& to, const float (&sums)[Columns / 2],
                       const float (&x_scale)[2], Gated*) {
  constexpr int kPairs = Columns / 16;
  const int quad = threadIdx.x % 4, row = to.row + threadIdx.x % 32 / 4;
  const Divisor by = divisor(p.gated.static_scale);
#pragma unroll
  for (int pair = 0; pair < kPairs; pair += 4) {
    float x[16] = {};
#pragma unroll
    for (int i = 0; i < 4 && pair + i < kPairs; i++) {
      gate_four<Columns>(sums, pair + i, x_scale, to.w_scales + (pair + i) * 16 + quad * 2, x + 4 * i);
    }
    uint32_t codes[4];
    quantize(x, by, codes);
    uint2 eight[2];
    gather_codes(codes, eight);
    const int column = to.column / 2 + (pair + quad) * 8;
    if (pair + quad >= kPairs || column >= p.columns / 2) continue;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (row + half * 8 >= to.num_rows) continue;
      uint8_t* const out = p.gated.panels + panel_offset(row + half * 8, column, p.gated.row_stride);
      *reinterpret_cast<uint2*>(out) = eight[half];
    }
  }
  if (to.column != 0 || quad != 0) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (row + half * 8 < to.num_rows) p.gated.scales[row + half * 8] = p.gated.static_scale;
  }
}
