// Adds the parts that the chunks of a sequence left, for sequences with one query token and more than one chunk.
//
// A block for each kv head (x) and sequence (y); a thread for four columns. Bound: the latency of reading the parts from L2,
// so several are asked for at a time.
#include "common/attention_chunks.cuh"

namespace {

constexpr int kThreads = 128;
/// Parts on their way.
constexpr int kTogether = 8;

template <int D, bool Capped>
DEVICE Part merged(const AttentionDecode& p, int seq, int head, int chunks, int quad) {
  const int group = p.attention.num_heads / p.attention.num_kv_heads;
  Part total = {{0.0f, 0.0f, 0.0f, 0.0f}, 0.0f, kNoScore};
  for (int first = 0; first < chunks; first += kTogether) {
    Part parts[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (first + i >= chunks) continue;
      const size_t part = part_index(p, seq, first + i, head);
      const float* sums = p.partial_sums + part * (2 * kMaxGroup) + quad * 4 / D;
      parts[i].output = read_partial(p.partial_outputs + part * size_t(group * D) + quad * 4);
      parts[i].sum = load_l2(sums);
      parts[i].maximum = Capped ? 0.0f : load_l2(sums + kMaxGroup);
    }
#pragma unroll
    for (int i = 0; i < kTogether; i++) {
      if (first + i < chunks) add<Capped>(total, parts[i]);
    }
  }
  return total;
}

template <int D, bool Capped>
DEVICE void attention_merge(const AttentionDecode& p) {
  let_next_kernel_start();
  const Step& step = p.attention.step;
  const int head = int(blockIdx.x), seq = int(blockIdx.y);
  // What the step consists of is known since before the kernels ahead.
  const int num_seqs = load_l2(&step.counts->num_seqs), context = load_l2(step.context_lens + seq);
  const int row = load_l2(step.query_start + seq), next_row = load_l2(step.query_start + seq + 1);
  wait_for_previous_kernels();
  if (seq >= num_seqs || next_row - row != 1) return;
  const int chunks = chunks_of(p, context);
  if (chunks == 1) return;
  const int quads = p.attention.num_heads / p.attention.num_kv_heads * D / 4;
  for (int quad = int(threadIdx.x); quad < quads; quad += kThreads) {
    write_result<D>(p.attention, row, head, quad, merged<D, Capped>(p, seq, head, chunks, quad));
  }
}

}  // namespace

#define ATTENTION_MERGE(NAME, D, CAPPED)              \
  KERNEL(NAME##_##D, AttentionDecode, kThreads, 1) {  \
    attention_merge<D, CAPPED>(p);                    \
  }
ATTENTION_MERGE(attention_merge, 64, false)
ATTENTION_MERGE(attention_merge, 128, false)
ATTENTION_MERGE(attention_merge, 256, false)
ATTENTION_MERGE(attention_merge_capped, 64, true)
ATTENTION_MERGE(attention_merge_capped, 128, true)
ATTENTION_MERGE(attention_merge_capped, 256, true)
