// How the KV cache keeps values, and the two products of decode attention over a 16-position tile of them in shared memory:
//   S^T [16 keys][heads] = K Q^T   K is the A operand; Q the B operand, kept in registers;
//   O^T [D][heads] += V^T P^T      V is the A operand (transposed by ldmatrix), P^T the B operand.
// A lane points ldmatrix at one row and chunk (`key_offset`, `value_offset`); the chunk's other bits are flipped in.
#pragma once

#include "attention.cuh"

/// Operands on their way from shared memory: a warp has nobody to hide that latency behind.
constexpr int kAhead = 4;

/// bf16: tiles are operands as they are.
struct Bf16Cache {
  static constexpr int kBytes = 2;
  /// Probabilities are bf16, which holds any: exp of a capped logit, too.
  static constexpr bool kNeedsMaximum = false;

  static DEVICE uint32_t pair(float low, float high) { return bf16x2_from_floats(low, high); }
  static DEVICE float low(uint32_t pair) { return low_float(pair); }
  static DEVICE float high(uint32_t pair) { return high_float(pair); }

  template <int D>
  static DEVICE uint32_t key_offset(int lane) {
    return swizzled<2 * D>(lane % 16, lane / 16);
  }
  template <int D>
  static DEVICE uint32_t value_offset(int lane) {
    return swizzled<2 * D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  /// Q as B operands: register j holds elements 8j + 2 (l % 4) + {0, 1} of head l / 4; heads beyond the group repeat the
  /// last, and no one looks at what becomes of them.
  template <int D>
  static DEVICE void read_queries(uint32_t (&q)[D / 8], uint32_t queries, int group, int lane) {
    const uint32_t from = queries + uint32_t(min(lane % 8, group - 1) * 2 * D + lane / 8 * 16);
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
      uint32_t four[4];
      ldmatrix_x4(four, from + uint32_t(64 * j));
#pragma unroll
      for (int i = 0; i < 4; i++) q[4 * j + i] = four[i];
    }
  }
  /// Scores of 16 keys: lane l gets those of keys l / 4 (values 0 and 1) and l / 4 + 8, with heads 2 (l % 4) + {0, 1}.
  template <int D>
  static DEVICE void score(float (&s)[4], const uint32_t (&q)[D / 8], uint32_t keys) {
    constexpr int kSteps = D / 16;
    float sums[2][4] = {};  // steps alternate: shorter chains
    uint32_t k[kAhead][4];
#pragma unroll
    for (int j = 0; j < kAhead && j < kSteps; j++) ldmatrix_x4(k[j], keys ^ uint32_t(32 * j));
#pragma unroll
    for (int j = 0; j < kSteps; j++) {
      mma_m16n8k16_bf16(sums[j % 2], k[j % kAhead], {q[2 * j], q[2 * j + 1]}, sums[j % 2]);
      if (j + kAhead < kSteps) ldmatrix_x4(k[j % kAhead], keys ^ uint32_t(32 * (j + kAhead)));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = sums[0][i] + sums[1][i];
  }
  /// Lane l gets elements l / 4 + 8 h of block j of 16, in `output[j][2h + {0, 1}]`, of heads 2 (l % 4) + {0, 1}.
  template <int D>
  static DEVICE void accumulate(float (&output)[D / 16][4], const uint32_t (&probabilities)[2], uint32_t values) {
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t v[4];
      ldmatrix_x4_transposed(v, values ^ uint32_t(32 * j));
      mma_m16n8k16_bf16(output[j], v, probabilities, output[j]);
    }
  }
  /// Stores both elements of a block for one of the heads; `to` is where the block lies.
  static DEVICE void store(float* to, float first, float second, int lane) {
    to[lane / 4] = first;
    to[lane / 4 + 8] = second;
  }
};

/// e4m3: widened to f16 between ldmatrix and the products. f16 holds e4m3 and bf16 queries exactly (of queries what is neither
/// above 65504 nor below 2^-24), and probabilities relative to a maximum.
///
/// ldmatrix gives a lane four neighbouring bytes where an operand wants two and two 8 columns on: elements of a head meet in
/// another order, the same in both operands.
struct E4m3Cache {
  static constexpr int kBytes = 1;
  static constexpr bool kNeedsMaximum = true;

  static DEVICE uint32_t pair(float low, float high) { return f16x2_from_floats(low, high); }
  static DEVICE float low(uint32_t pair) { return low_half(pair); }
  static DEVICE float high(uint32_t pair) { return high_half(pair); }

  template <int D>
  static DEVICE uint32_t key_offset(int lane) {
    return swizzled<D>(lane % 16, lane / 16);
  }
  template <int D>
  static DEVICE uint32_t value_offset(int lane) {
    return key_offset<D>(lane);
  }

  /// Registers 2j and 2j + 1 hold elements 16j + 4 (l % 4) + {0, 1} and {2, 3} of head l / 4, or of the last.
  template <int D>
  static DEVICE void read_queries(uint32_t (&q)[D / 8], uint32_t queries, int group, int lane) {
    const uint32_t from = queries + uint32_t(min(lane / 4, group - 1) * 2 * D + lane % 4 * 8);
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      const uint2 four = load_shared_8(from + uint32_t(32 * j));
      q[2 * j] = f16x2_from_floats(low_float(four.x), high_float(four.x));
      q[2 * j + 1] = f16x2_from_floats(low_float(four.y), high_float(four.y));
    }
  }
  /// As of bf16. A load is 32 columns of 16 keys: registers 0 and 1 are keys l / 4 and l / 4 + 8 of the first 16 columns.
  template <int D>
  static DEVICE void score(float (&s)[4], const uint32_t (&q)[D / 8], uint32_t keys) {
    constexpr int kLoads = D / 32, kLoadsAhead = kAhead / 2;
    float sums[2][4] = {};
    uint32_t k[kLoadsAhead][4];
#pragma unroll
    for (int j = 0; j < kLoadsAhead && j < kLoads; j++) ldmatrix_x4(k[j], keys ^ uint32_t(32 * j));
#pragma unroll
    for (int j = 0; j < kLoads; j++) {
      const uint32_t(&codes)[4] = k[j % kLoadsAhead];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t a[4];
        f16x2_from_e4m3x4(codes[2 * half], a[0], a[2]);
        f16x2_from_e4m3x4(codes[2 * half + 1], a[1], a[3]);
        mma_m16n8k16_f16(sums[half], a, {q[4 * j + 2 * half], q[4 * j + 2 * half + 1]}, sums[half]);
      }
      if (j + kLoadsAhead < kLoads) ldmatrix_x4(k[j % kLoadsAhead], keys ^ uint32_t(32 * (j + kLoadsAhead)));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = sums[0][i] + sums[1][i];
  }
  /// Lane l gets elements 2 (l / 4) + h of block j of 16, in `output[j][2h + {0, 1}]`, of heads 2 (l % 4) + {0, 1}: what
  /// ldmatrix exchanges are pairs of bytes, of two neighbouring elements.
  template <int D>
  static DEVICE void accumulate(float (&output)[D / 16][4], const uint32_t (&probabilities)[2], uint32_t values) {
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
      uint32_t codes[4];
      ldmatrix_x4_transposed(codes, values ^ uint32_t(32 * j));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t a[4];
        f16x2_from_e4m3x4(odd_bytes_last(codes[2 * half]), a[0], a[1]);
        f16x2_from_e4m3x4(odd_bytes_last(codes[2 * half + 1]), a[2], a[3]);
        mma_m16n8k16_f16(output[2 * j + half], a, probabilities, output[2 * j + half]);
      }
    }
  }
  static DEVICE void store(float* to, float first, float second, int lane) {
    *reinterpret_cast<float2*>(to + lane / 4 * 2) = make_float2(first, second);
  }
};
