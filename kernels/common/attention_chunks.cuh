// Attention of one query token in chunks of keys: what is left of each chunk, and how that becomes the result.
//
// A chunk is a fixed number of positions aligned to absolute position, so that what a sequence gets never depends on the
// batch. `attention_decode` leaves a part of the result for each, and `attention_merge` adds them in their order. (Whichever
// block was the last of a sequence's could add them at once. But a block that is late is the last, has that to do as well, and
// is late ever after: at 32 chunks that took twice the time of reading the keys.)
#pragma once

#include "attention.cuh"
#include "quantize.cuh"

struct AttentionDecode {
  Attention attention;
  float* partial_outputs;  // [max_seqs][max_chunks][num_kv_heads][group][D]
  float* partial_sums;     // [max_seqs][max_chunks][num_kv_heads][2][8]: sum of probabilities, maximum score
  int max_seqs;
  int max_chunks;
  /// Positions of a chunk are 1 << chunk_shift: 64, 128, 256 or 512.
  int chunk_shift;
  /// Tiles of K and of V a warp has under way: 1 to 8.
  int stages;
};

/// Query heads a kv head may have.
constexpr int kMaxGroup = 8;
constexpr float kNoScore = -INFINITY;

/// Number of the chunk that the window of a sequence's last token starts in.
DEVICE int first_chunk(const AttentionDecode& p, int context) {
  return max(0, context - p.attention.window) >> p.chunk_shift;
}
DEVICE int chunks_of(const AttentionDecode& p, int context) {
  return ((context - 1) >> p.chunk_shift) - first_chunk(p, context) + 1;
}
/// Where the parts of a sequence's chunk lie, the first being that of its window.
DEVICE size_t part_index(const AttentionDecode& p, int seq, int chunk, int head) {
  return (size_t(seq) * size_t(p.max_chunks) + size_t(chunk)) * size_t(p.attention.num_kv_heads) + size_t(head);
}

/// Four neighbouring values of a head's sum, its divisor and the maximum both are relative to.
struct Part {
  float4 output;
  float sum;
  float maximum;
};

template <bool Capped>
DEVICE void add(Part& to, const Part& part) {
  float old_factor = 1.0f, factor = 1.0f;
  if (!Capped) {
    const float maximum = fmaxf(to.maximum, part.maximum);
    old_factor = to.maximum == kNoScore ? 0.0f : exp2_approx(to.maximum - maximum);
    factor = part.maximum == kNoScore ? 0.0f : exp2_approx(part.maximum - maximum);
    to.maximum = maximum;
  }
  to.output.x = to.output.x * old_factor + part.output.x * factor;
  to.output.y = to.output.y * old_factor + part.output.y * factor;
  to.output.z = to.output.z * old_factor + part.output.z * factor;
  to.output.w = to.output.w * old_factor + part.output.w * factor;
  to.sum = to.sum * old_factor + part.sum * factor;
}

/// Columns `4 * quad`, ... of the kv head's group for query row `row`, divided and in the form the o projection reads.
template <int D>
DEVICE void write_result(const Attention& p, int row, int head, int quad, const Part& part) {
  const int col = head * (p.num_heads / p.num_kv_heads) * D + quad * 4;
  const float inverse = p.value_scale * (1.0f / part.sum);
  const float x[4] = {part.output.x * inverse, part.output.y * inverse, part.output.z * inverse, part.output.w * inverse};
  if (p.out.scheme == kSchemeStatic) {
    uint32_t codes[1];
    quantize(x, divisor(p.out.static_scale), codes);
    *reinterpret_cast<uint32_t*>(result_address(p, row, col, 1, D)) = codes[0];
    if (col == 0) p.out.scales[row] = p.out.static_scale;
  } else {
    const uint2 pairs = make_uint2(bf16x2_from_floats(x[0], x[1]), bf16x2_from_floats(x[2], x[3]));
    *reinterpret_cast<uint2*>(result_address(p, row, col, 2, D)) = pairs;
  }
}

DEVICE float4 read_partial(const float* from) {
  const uint4 bits = load_l2(reinterpret_cast<const uint4*>(from));
  return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z), __uint_as_float(bits.w)};
}
