// Writing the input of a linear layer: quantisation to e4m3 by an exact division, and the panels it goes to.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

/// A divisor of many numbers, with reciprocals that bracket the quotient.
struct Divisor {
  float value;
  float low, high;
};

/// `low` and `high` are 2^-21, eight roundings, below and above 1 / value. The reciprocal takes two of them, the factor and
/// a product one each, and so does the quotient that must lie between. Where reciprocals might overflow the bracket says
/// nothing.
DEVICE Divisor divisor(float value) {
  const float inverse = reciprocal_approx(value);
  const bool is_safe = value > 1e-30f && value < 1e30f;
  return {value, is_safe ? inverse * (1.0f - 0x1p-21f) : 0.0f, is_safe ? inverse * (1.0f + 0x1p-21f) : infinity()};
}

/// e4m3 codes of four quotients, one after another: what is rare must not take registers or code from what is not.
DEVICE uint32_t divided(float a, float b, float c, float d, float by) {
  uint32_t codes = 0;
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    codes = codes >> 8 | uint32_t(e4m3x2_from_floats(0.0f, __fdiv_rn(a, by))) << 16;
    a = b, b = c, c = d;
  }
  return codes;
}

/// e4m3 codes of `x / by`, each quotient rounded to f32 and then to e4m3, as a division would have it. Rounding is
/// monotonic, so where both ends of the bracket agree they agree with the quotient; else, about once in 100 000 values,
/// it is divided for real.
template <int N>
DEVICE void quantize(const float (&x)[N], const Divisor& by, uint32_t (&codes)[N / 4]) {
  uint32_t differ = 0;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const uint32_t low = e4m3x4_from_floats(x[i] * by.low, x[i + 1] * by.low, x[i + 2] * by.low, x[i + 3] * by.low);
    codes[i / 4] =
        e4m3x4_from_floats(x[i] * by.high, x[i + 1] * by.high, x[i + 2] * by.high, x[i + 3] * by.high);
    differ |= low ^ codes[i / 4];
  }
  if (__builtin_expect(differ == 0, true)) return;
#pragma unroll
  for (int i = 0; i < N; i += 4) codes[i / 4] = divided(x[i], x[i + 1], x[i + 2], x[i + 3], by.value);
}

/// Scale of a row whose largest magnitude is `amax`. For this divisor one correction of the product gives the rounded
/// quotient, as trying all mantissas shows.
DEVICE float token_scale(float amax) {
  constexpr float kInverse = 1.0f / kFp8Max;
  const float product = __fmul_rn(amax, kInverse);
  const float quotient = __fmaf_rn(__fmaf_rn(-product, kFp8Max, amax), kInverse, product);
  return fmaxf(quotient, kFp8MinTokenScale);
}

/// Writes the N values, 8 or 16, at column `col` (a multiple of N) of a row with `cols` columns; `Whole`: all of them are
/// columns. Padding is left alone.
template <bool Whole, int N>
DEVICE void write_activation(const Activation& to, int row, int col, int cols, const float (&x)[N], const Divisor& by) {
  if (to.scheme == kSchemeNone) {
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      if (!Whole && col + i >= cols) return;
      uint8_t* out = to.panels + panel_offset(row, 2 * (col + i), to.row_stride);
      if constexpr (Whole) {
        *reinterpret_cast<uint4*>(out) =
            make_uint4(bf16x2_from_floats(x[i], x[i + 1]), bf16x2_from_floats(x[i + 2], x[i + 3]),
                       bf16x2_from_floats(x[i + 4], x[i + 5]), bf16x2_from_floats(x[i + 6], x[i + 7]));
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (col + i + j < cols) reinterpret_cast<bf16*>(out)[j] = bf16_from_float(x[i + j]);
        }
      }
    }
    return;
  }
  uint32_t codes[N / 4];
  quantize(x, by, codes);
  uint8_t* out = to.panels + panel_offset(row, col, to.row_stride);
  if constexpr (!Whole) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (col + i < cols) out[i] = uint8_t(codes[i / 4] >> (8 * (i % 4)));
    }
  } else if constexpr (N == 16) {
    *reinterpret_cast<uint4*>(out) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
  } else {
    *reinterpret_cast<uint2*>(out) = make_uint2(codes[0], codes[1]);
  }
}
