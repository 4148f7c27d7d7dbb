// Attention of sequences with several query tokens (a prompt or a part of one) over the paged KV cache, whose positions
// up to the last query token are already in place: causal, window, soft-cap or running maximum, GQA.
//
// Work: one block computes a tile of query tokens for one kv head. The tile's rows are (token, head of the group) pairs,
// so that one load of K and V serves the whole group; a warp has 16 rows. Blocks of keys are aligned to absolute position
// and taken in order; where a row sees nothing of a block, the block adds nothing to it: a row's result does not depend
// on which rows share its tile, hence not on how its prompt was cut into steps.
//
// In the manner of FlashAttention-2: the block of K and V after the current one is on its way (cp.async, two buffers)
// while S = Q K^T and O += P V run on tensor cores; O and P stay in registers, Q is read from shared memory each time.
//
// Bound: tensor cores in principle; in practice shared memory, which every warp reads all of K and V from for 16 rows.
#include "common/attention_prefill.cuh"

/// Four neighbouring sums.
DEVICE float (&quad(float* sums))[4] { return *reinterpret_cast<float(*)[4]>(sums); }

/// S = Q K^T for a block of keys. `queries` and `keys` are where this lane points ldmatrix at for the first columns.
template <int D, int Keys>
DEVICE void score(float (&s)[Keys / 2], uint32_t queries, uint32_t keys) {
#pragma unroll
  for (int i = 0; i < Keys / 2; i++) s[i] = 0.0f;
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
    uint32_t q[4];
    ldmatrix_x4(q, queries ^ uint32_t(32 * j));
#pragma unroll
    for (int n = 0; n < Keys / 16; n++) {
      uint32_t k[4];
      ldmatrix_x4(k, (keys ^ uint32_t(32 * j)) + uint32_t(n * 16 * 2 * D));
      mma_m16n8k16_bf16(quad(s + 8 * n), q, {k[0], k[1]}, quad(s + 8 * n));
      mma_m16n8k16_bf16(quad(s + 8 * n + 4), q, {k[2], k[3]}, quad(s + 8 * n + 4));
    }
  }
}

template <int D, int Keys>
DEVICE void accumulate(RowSums<D>& sums, const uint32_t (&probabilities)[Keys / 16][4], uint32_t values) {
#pragma unroll
  for (int n = 0; n < Keys / 16; n++) {
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      uint32_t v[4];
      ldmatrix_x4_transposed(v, (values ^ uint32_t(32 * j)) + uint32_t(n * 16 * 2 * D));
      float* to = sums.output + 8 * j;
      mma_m16n8k16_bf16(quad(to), probabilities[n], {v[0], v[1]}, quad(to));
      mma_m16n8k16_bf16(quad(to + 4), probabilities[n], {v[2], v[3]}, quad(to + 4));
    }
  }
}

/// One block of keys for one warp.
template <int D, int Keys, bool Capped>
DEVICE void attend(RowSums<D>& sums, const Prefill& work, int position, uint32_t queries, uint32_t stage) {
  const int lane = work.lane;
  float s[Keys / 2], factors[2];
  uint32_t probabilities[Keys / 16][4];
  score<D, Keys>(s, queries + swizzled<2 * D>(work.warp * 16 + lane % 16, lane / 16),
                 stage + swizzled<2 * D>(lane % 8 + lane / 16 * 8, lane / 8 % 2));
  exponentiate<Keys, Capped>(s, sums.maximum, factors, work, position);
  pack<D, Keys, Capped>(probabilities, sums, s, factors);
  accumulate<D, Keys>(sums, probabilities, stage + Keys * 2 * D + swizzled<2 * D>(lane % 16, lane / 16));
}

/// Shared memory: queries [Rows][D], in the end the result; [2][K, V][Keys][D]; where the keys lie.
template <int D, int Rows, int Keys, bool Capped>
DEVICE void attention_prefill(const AttentionPrefill& params, uint8_t* memory) {
  using Layout = PlainRows<2 * D>;
  constexpr uint32_t kPlaneBytes = Keys * 2 * D;
  const uint32_t queries = shared_address(memory), stages = queries + Rows * 2 * D;
  unsigned* const key_tiles = reinterpret_cast<unsigned*>(memory + Rows * 2 * D + 4 * kPlaneBytes);
  let_next_kernel_start();
  const Prefill work(params, Keys);
  find_key_tiles<2 * Rows>(work, key_tiles);
  wait_for_previous_kernels();
  if (work.tile.num_rows == 0) return;
  load_queries<D, Layout>(work, queries);
  __syncthreads();
  auto load = [&](int position, uint32_t stage) {
    load_block<D, Rows, Keys, Layout>(work, key_tiles, position, stage, position, stage + kPlaneBytes);
  };
  load(work.begin, stages);
  RowSums<D> sums;
  clear<D>(sums);
  uint32_t here = 0;
  for (int position = work.begin; position < work.end; position += Keys) {
    cp_async_wait<0>();
    __syncthreads();
    load(position + Keys, stages + (here ^ (2 * kPlaneBytes)));
    if (work.sees(position, position + Keys)) attend<D, Keys, Capped>(sums, work, position, queries, stages + here);
    here ^= 2 * kPlaneBytes;
  }
  // All lanes are done with the warp's queries.
  __syncwarp();
  stage_result<D, Layout>(sums, work, memory);
  __syncwarp();
  write_rows<D, Layout>(work, memory);
}

#define ATTENTION_PREFILL(D, ROWS, KEYS)                                                    \
  KERNEL(attention_prefill_##D##_##ROWS##x##KEYS, AttentionPrefill, 2 * ROWS, 1) {           \
    DYNAMIC_SHARED(memory);                                                                 \
    attention_prefill<D, ROWS, KEYS, false>(p, memory);                                     \
  }                                                                                         \
  KERNEL(attention_prefill_capped_##D##_##ROWS##x##KEYS, AttentionPrefill, 2 * ROWS, 1) {    \
    DYNAMIC_SHARED(memory);                                                                 \
    attention_prefill<D, ROWS, KEYS, true>(p, memory);                                      \
  }

// What fits a block's shared memory: 227 KB or 99 KB. Of the larger tiles, 64 rows are for steps with few tokens.
#if defined(LAPIDARY_EMULATOR) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000)
ATTENTION_PREFILL(64, 64, 64)
ATTENTION_PREFILL(64, 128, 64)
ATTENTION_PREFILL(128, 64, 64)
ATTENTION_PREFILL(128, 128, 64)
ATTENTION_PREFILL(256, 64, 64)
ATTENTION_PREFILL(256, 128, 64)
#endif
#if defined(LAPIDARY_EMULATOR) || __CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1000
ATTENTION_PREFILL(64, 64, 32)
ATTENTION_PREFILL(128, 64, 32)
ATTENTION_PREFILL(256, 64, 32)
#endif
