// Number formats, and reductions whose order never depends on the batch.
#pragma once

#include "ptx.cuh"

/// A bfloat16 in memory.
struct bf16 {
  uint16_t bits;
};

DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(float x) { return x; }
DEVICE float low_float(uint32_t bf16x2) { return __uint_as_float(bf16x2 << 16); }
DEVICE float high_float(uint32_t bf16x2) { return __uint_as_float(bf16x2 & 0xffff0000u); }
DEVICE bf16 bf16_from_float(float x) { return {uint16_t(bf16x2_from_floats(x, 0.0f))}; }

/// Four e4m3 codes, the first in the lowest byte.
DEVICE uint32_t e4m3x4_from_floats(float a, float b, float c, float d) {
  return uint32_t(e4m3x2_from_floats(a, b)) | uint32_t(e4m3x2_from_floats(c, d)) << 16;
}

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

constexpr float kLog2E = 1.4426950408889634f;
/// Largest finite e4m3 value.
constexpr float kFp8Max = 448.0f;
/// Smallest scale of a token's quantisation: `FP8_MIN_TOKEN_SCALE` of the model crate.
constexpr float kFp8MinTokenScale = 1.0f / (448.0f * 512.0f);

/// How the input of a linear layer is quantised, as the checkpoint says.
enum ActivationScheme : int {
  kSchemeNone = 0,    // bf16
  kSchemeStatic = 1,  // e4m3 with one scale from the file
  kSchemeToken = 2,   // e4m3 with a scale for each row
};

/// Input of a linear layer: `[K panels][row_stride][128 bytes]` (layout.cuh) and one scale a row.
struct Activation {
  uint8_t* panels;
  float* scales;  // [row_stride]; written for both e4m3 schemes
  int row_stride;
  int scheme;
  float static_scale;
  int padding;
};

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}
