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

// ---- elementary functions of what is rounded to FP8 next, by operations that round as IEEE 754 says: the CPU backend repeats
// them to the bit (crates/cpu/src/hopper.rs). Of a value that differs in its last place one rounding in a million would differ,
// and with it all that a model makes of it.

/// An integer and what `x` is off it, at most a half. No special function, of which there are few units.
struct ExponentParts {
  uint32_t integer;  // in the bits that are left when it becomes an exponent
  float rest;

  DEVICE explicit ExponentParts(float x) {
    constexpr float kRounder = 12582912.0f;  // adding it rounds to an integer, which is then in the lowest bits
    const float shifted = __fadd_rn(x, kRounder);
    integer = __float_as_uint(shifted);
    rest = __fadd_rn(x, -__fadd_rn(shifted, -kRounder));
  }
  /// `x` times 2 to the power of the integer.
  DEVICE float scale(float x) const { return __uint_as_float(__float_as_uint(x) + (integer << 23)); }
};
/// 2^x to 3e-7, for -126 <= x <= 127, by a polynomial that Remez's algorithm found.
DEVICE float exp2_rounded(float x) {
  const ExponentParts parts(x);
  float p = __fmaf_rn(0.0013276472f, parts.rest, 0.009675541f);
  p = __fmaf_rn(p, parts.rest, 0.05550713f);
  p = __fmaf_rn(p, parts.rest, 0.2402212f);
  p = __fmaf_rn(p, parts.rest, 0.69314694f);
  return parts.scale(__fmaf_rn(p, parts.rest, 1.0000001f));
}
/// The same to 8e-5, a 25th of what rounding to bf16 errs, to which it goes next.
DEVICE float rough_exp2_rounded(float x) {
  const ExponentParts parts(x);
  float p = __fmaf_rn(0.055171672f, parts.rest, 0.24261113f);
  p = __fmaf_rn(p, parts.rest, 0.69326097f);
  return parts.scale(__fmaf_rn(p, parts.rest, 0.99992806f));
}
/// 1 / x, for 1 <= x < 2^126, rounded to nearest but for some 30 of 2^23 mantissas at worst (as trying all shows, with an
/// approximation that is two units off).
DEVICE float reciprocal_rounded(float x) {
  const float y = reciprocal_approx(x);
  return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
}
/// 1 / sqrt(x), for normal x, rounded to nearest but for a mantissa in millions: a Newton step from the residual in two parts.
DEVICE float inverse_sqrt_rounded(float x) {
  const float y = rsqrtf(x), root = __fmul_rn(x, y), rest = __fmaf_rn(x, y, -root);
  const float residual = __fmaf_rn(-rest, y, __fmaf_rn(-root, y, 1.0f));
  return __fmaf_rn(__fmul_rn(0.5f, y), residual, y);
}

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
