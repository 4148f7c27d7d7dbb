// Rotates queries and keys by their positions and appends keys and values to the cache.
//
// qkv holds, for each token, query heads, key heads, value heads; a layer of the cache is
// [num_blocks][2: K, V][num_kv_heads][block_size][head_dim]; all bf16, but that the cache may be e4m3. In the cache the chunks
// of 16 bytes of a row are permuted by the row's lowest bits as ldmatrix wants them, if a head is a multiple of 64 elements.
// Element i of a head turns with element i + head_dim / 2 (neox style). Queries are rotated in place; keys and values go to
// the token's slot, as e4m3 divided by the scales of the layer.
//
// A thread owns 8 elements of a head's lower half and the 8 that turn with them: two reads and two writes of 16 bytes.
// Grid: (tokens, pieces of a token), enough blocks that a step of one token uses several SMs. Bound by latency for few
// tokens and by memory for many: 4 bytes an element and the table, which stays in L2.
#include "common/attention.cuh"
#include "common/quantize.cuh"

struct RopeParams {
  Step step;
  bf16* qkv;              // [tokens][(num_heads + 2 * num_kv_heads) * head_dim]
  const float* table;     // [positions][2: cos, sin][head_dim / 2]
  uint8_t* kv;            // the layer
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int block_size;
  int kv_is_e4m3;
  float key_scale;
  float value_scale;
  int padding;
};

constexpr int kRopeThreads = 128;

/// 8 values, of which those from `count` on do not exist. Whole ones are aligned to 16 bytes if `is_aligned`.
struct Eight {
  float x[8];
};
DEVICE Eight load_eight(const bf16* from, int count, bool is_aligned) {
  Eight out;
  if (is_aligned) {
    const uint4 packed = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out.x[2 * i] = low_float(words[i]), out.x[2 * i + 1] = high_float(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out.x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
  return out;
}
DEVICE void store_eight(bf16* to, const Eight& v, int count, bool is_aligned) {
  if (is_aligned) {
    *reinterpret_cast<uint4*>(to) = make_uint4(bf16x2_from_floats(v.x[0], v.x[1]), bf16x2_from_floats(v.x[2], v.x[3]),
                                               bf16x2_from_floats(v.x[4], v.x[5]), bf16x2_from_floats(v.x[6], v.x[7]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < count) to[i] = bf16_from_float(v.x[i]);
    }
  }
}
DEVICE void store_eight(uint8_t* to, const Eight& v, const Divisor& by, int count, bool is_aligned) {
  uint32_t codes[2];
  quantize(v.x, by, codes);
  if (is_aligned) {
    *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < count) to[i] = uint8_t(codes[i / 4] >> (8 * (i % 4)));
    }
  }
}
DEVICE Eight load_table(const float* from, int count, bool is_aligned) {
  Eight out;
  if (is_aligned) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from)), b = __ldg(reinterpret_cast<const float4*>(from) + 1);
    out.x[0] = a.x, out.x[1] = a.y, out.x[2] = a.z, out.x[3] = a.w;
    out.x[4] = b.x, out.x[5] = b.y, out.x[6] = b.z, out.x[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) out.x[i] = i < count ? __ldg(from + i) : 0.0f;
  }
  return out;
}

KERNEL(rope_append, RopeParams, kRopeThreads, 8) {
  let_next_kernel_start();
  // What the step consists of is known since before the kernels ahead, and so is how far its tokens turn.
  const int token = int(blockIdx.x), half = p.head_dim / 2, per_head = (half + 7) / 8;
  const int index = int(blockIdx.y) * kRopeThreads + int(threadIdx.x);
  const int head = index / per_head, first = index % per_head * 8;
  const int num_heads = p.num_heads + 2 * p.num_kv_heads;
  const bool exists = head < num_heads && token < load_l2(&p.step.counts->num_tokens);
  const bool is_value = head >= p.num_heads + p.num_kv_heads;
  const bool is_aligned = half % 8 == 0;
  const int count = min(8, half - first);
  const int slot = exists ? load_l2(p.step.slots + token) : 0;
  Eight cosine = {}, sine = {};
  if (exists && !is_value) {
    const float* turn = p.table + size_t(load_l2(p.step.positions + token)) * p.head_dim + first;
    cosine = load_table(turn, count, is_aligned), sine = load_table(turn + half, count, is_aligned);
  }
  wait_for_previous_kernels();
  if (!exists) return;
  bf16* from = p.qkv + (size_t(token) * num_heads + head) * p.head_dim + first;
  Eight low = load_eight(from, count, is_aligned), high = load_eight(from + half, count, is_aligned);
  if (!is_value) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float a = low.x[i], b = high.x[i];
      low.x[i] = __fmaf_rn(a, cosine.x[i], -__fmul_rn(b, sine.x[i]));
      high.x[i] = __fmaf_rn(b, cosine.x[i], __fmul_rn(a, sine.x[i]));
    }
  }
  if (head < p.num_heads) {
    store_eight(from, low, count, is_aligned);
    store_eight(from + half, high, count, is_aligned);
    return;
  }
  const int kv_head = (head - p.num_heads) % p.num_kv_heads, row = slot % p.block_size;
  const size_t line = (size_t(slot / p.block_size) * 2 + is_value) * p.num_kv_heads + kv_head;
  const size_t first_of_line = (line * p.block_size + row) * p.head_dim;
  const bool is_permuted = p.head_dim % 64 == 0;
  if (p.kv_is_e4m3 != 0) {
    const int turn = !is_permuted ? 0 : 16 * (p.head_dim < 128 ? row_swizzle<64>(row) : row_swizzle<128>(row));
    const Divisor by = divisor(is_value ? p.value_scale : p.key_scale);
    uint8_t* to = p.kv + first_of_line;
    store_eight(to + (first ^ turn), low, by, count, is_aligned);
    store_eight(to + ((half + first) ^ turn), high, by, count, is_aligned);
  } else {
    const int turn = is_permuted ? 8 * row_swizzle<128>(row) : 0;
    bf16* to = reinterpret_cast<bf16*>(p.kv) + first_of_line;
    store_eight(to + (first ^ turn), low, count, is_aligned);
    store_eight(to + ((half + first) ^ turn), high, count, is_aligned);
  }
}
