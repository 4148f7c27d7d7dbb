// Attention of sequences with several query tokens on Hopper: what attention_prefill.cu computes, by wgmma. Only with
// soft-cap: the running maximum would need more registers than there are.
//
// Work: as there: a tile of query tokens for one kv head, rows are (token, head of the group) pairs, blocks of 64 keys
// aligned to absolute position, taken in order; a block that a row sees nothing of adds nothing to it. A warpgroup has 64
// rows. Q, K and V lie in panels of 64 columns, 128 bytes a row, swizzled, where cp.async puts them from plain rows.
//
// In the manner of FlashAttention-3: the scores of one block and the product of the block before with its values are under
// way together, and while the latter is, the scores become probabilities. K is a block ahead of V, both in two buffers.
//
// Bound: tensor cores; the three special functions of a logit take 3/4 of their time, beside them.
#include "common/attention_prefill.cuh"

/// Panels of 64 columns of `Rows` rows.
template <int Rows>
struct PanelRows {
  static constexpr uint32_t kPanel = Rows * kPanelBytes;
  static DEVICE uint32_t at(int row, int chunk) {
    return uint32_t(chunk / 8) * kPanel + uint32_t(row * kPanelBytes + ((chunk % 8) ^ (row & 7)) * 16);
  }
};

/// Starts S = Q K^T of a warpgroup's 64 rows.
template <int D, int Rows, int Keys>
DEVICE void start_scores(float (&s)[Keys / 2], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
    const uint64_t a = operand_descriptor(queries + j / 4 * PanelRows<Rows>::kPanel) + j % 4 * kDescriptorStep;
    const uint64_t b = operand_descriptor(keys + j / 4 * PanelRows<Keys>::kPanel) + j % 4 * kDescriptorStep;
    wgmma_bf16<Keys>(s, a, b, j > 0);
  }
  wgmma_commit();
}

/// Starts O += P V.
template <int D, int Keys>
DEVICE void start_output(RowSums<D>& sums, const uint32_t (&probabilities)[Keys / 16][4], uint32_t values) {
#pragma unroll
  for (int n = 0; n < Keys / 16; n++) {
    const uint32_t rows = values + uint32_t(n * 16 * kPanelBytes);
    wgmma_bf16_transposed<D>(sums.output, probabilities[n],
                             transposed_operand_descriptor(rows, PanelRows<Keys>::kPanel));
  }
  wgmma_commit();
}

/// Shared memory: queries, in the end the result; two buffers of keys, two of values; where the keys lie.
template <int D, int Rows, int Keys>
DEVICE void attention_prefill(const AttentionPrefill& params, uint8_t* memory) {
  using Queries = PanelRows<Rows>;
  constexpr uint32_t kPlaneBytes = Keys * 2 * D;
  const uint32_t queries = shared_address(memory), keys = queries + Rows * 2 * D, values = keys + 2 * kPlaneBytes;
  unsigned* const key_tiles = reinterpret_cast<unsigned*>(memory + Rows * 2 * D + 4 * kPlaneBytes);
  let_next_kernel_start();
  const Prefill work(params, Keys);
  find_key_tiles<2 * Rows>(work, key_tiles);
  __syncthreads();
  wait_for_previous_kernels();
  if (work.tile.num_rows == 0) return;
  load_queries<D, Queries>(work, queries);
  uint32_t here = 0;  // the current block's buffer
  // Waits for what is on its way, the block's keys among it; then the other buffer of keys is free, and this one of values.
  auto advance = [&](int position) {
    cp_async_wait<0>();
    fence_proxy_async();
    __syncthreads();
    load_block<D, Rows, Keys, PanelRows<Keys>>(work, key_tiles, position + Keys, keys + (here ^ kPlaneBytes), position,
                                               values + here);
    wgmma_fence();
  };
  load_block<D, Rows, Keys, PanelRows<Keys>>(work, key_tiles, work.begin, keys, work.end, values);
  const uint32_t rows = queries + uint32_t(work.warp / 4 * 64 * kPanelBytes);
  RowSums<D> sums;
  clear<D>(sums);
  float s[Keys / 2], factors[2];
  uint32_t probabilities[Keys / 16][4];
  advance(work.begin);
  start_scores<D, Rows, Keys>(s, rows, keys);
  wgmma_wait<0>();
  pin_registers(s);
  exponentiate<Keys, true>(s, sums.maximum, factors, work, work.begin);
  pack<D, Keys, true>(probabilities, sums, s, factors);
  for (int position = work.begin + Keys; position < work.end; position += Keys) {
    here ^= kPlaneBytes;
    advance(position);
    start_scores<D, Rows, Keys>(s, rows, keys + here);
    start_output<D, Keys>(sums, probabilities, values + (here ^ kPlaneBytes));
    wgmma_wait<1>();
    pin_registers(s);
    exponentiate<Keys, true>(s, sums.maximum, factors, work, position);
    wgmma_wait<0>();
    pin_registers(sums.output);
    pack<D, Keys, true>(probabilities, sums, s, factors);
  }
  advance(work.end);
  start_output<D, Keys>(sums, probabilities, values + here);
  wgmma_wait<0>();
  pin_registers(sums.output);
  // All warps are done with the queries.
  __syncthreads();
  stage_result<D, Queries>(sums, work, memory);
  __syncwarp();
  write_rows<D, Queries>(work, memory);
}

#define ATTENTION_PREFILL(D, ROWS, KEYS)                                                          \
  KERNEL(attention_prefill_wgmma_capped_##D##_##ROWS##x##KEYS, AttentionPrefill, 2 * ROWS, 1) {    \
    DYNAMIC_SHARED(memory);                                                                       \
    attention_prefill<D, ROWS, KEYS>(p, memory);                                                  \
  }

// 64 rows are for steps with few tokens.
ATTENTION_PREFILL(64, 64, 64)
ATTENTION_PREFILL(64, 128, 64)
ATTENTION_PREFILL(128, 64, 64)
ATTENTION_PREFILL(128, 128, 64)
ATTENTION_PREFILL(256, 64, 64)
ATTENTION_PREFILL(256, 128, 64)
