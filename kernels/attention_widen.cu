// Blocks of an e4m3 KV cache as blocks of bf16, which holds e4m3 exactly: prefill attention reads those. What a step's prompts
// read is widened once for each layer, a few percent of what their attention takes.
//
// Block x of the grid widens one block of the cache, `[2: K, V][num_kv_heads][block_size][head_dim]`; threads of all y take 16
// values each: a chunk of the one, two of the other, both permuted as attention.cuh says. Bound by memory, or L2 where the
// step itself wrote them.
#include "common/attention.cuh"

struct WidenParams {
  const uint8_t* from;
  uint8_t* to;
  const int* blocks;  // [gridDim.x][2]: which of `from`, and as which of `to`, or -1; complete before the step begins
  int block_rows;      // 2 * num_kv_heads * block_size
  int head_dim;
};

constexpr int kWidenThreads = 256;

/// Four codes as bf16.
DEVICE uint2 widened(uint32_t codes) {
  uint32_t low, high;
  f16x2_from_e4m3x4(codes, low, high);
  return make_uint2(bf16x2_from_floats(low_half(low), high_half(low)), bf16x2_from_floats(low_half(high), high_half(high)));
}

KERNEL(attention_widen, WidenParams, kWidenThreads, 1) {
  let_next_kernel_start();
  const int* pair = p.blocks + 2 * blockIdx.x;
  const int from_block = load_l2(pair), to_block = load_l2(pair + 1);
  wait_for_previous_kernels();
  if (from_block < 0) return;
  const int chunks = p.head_dim / 16, chunks_of_block = p.block_rows * chunks;
  const uint4* from = reinterpret_cast<const uint4*>(p.from) + size_t(from_block) * size_t(chunks_of_block);
  uint4* to = reinterpret_cast<uint4*>(p.to) + size_t(to_block) * size_t(2 * chunks_of_block);
  for (int i = int(blockIdx.y) * kWidenThreads + int(threadIdx.x); i < chunks_of_block; i += int(gridDim.y) * kWidenThreads) {
    const int row = i / chunks, stored_chunk = i % chunks;
    const int chunk = stored_chunk ^ (p.head_dim < 128 ? row_swizzle<64>(row) : row_swizzle<128>(row));
    const uint4 codes = load_l2(from + i);
    const uint2 a = widened(codes.x), b = widened(codes.y), c = widened(codes.z), d = widened(codes.w);
    uint4* line = to + size_t(row) * size_t(2 * chunks);
    line[(2 * chunk) ^ row_swizzle<128>(row)] = make_uint4(a.x, a.y, b.x, b.y);
    line[(2 * chunk + 1) ^ row_swizzle<128>(row)] = make_uint4(c.x, c.y, d.x, d.y);
  }
}
