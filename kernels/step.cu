// Begins a step: spreads its inputs, uploaded by one copy, over the arrays that the other kernels find at fixed addresses.
//
// The packed step is a header of 8 words {num_tokens, num_seqs, num_samples, parity, num_blocks, 0, 0, 0} and then, each
// padded to a multiple of 4 words: token_ids, positions, slots, seq_of_token (num_tokens words each), query_start
// (num_seqs + 1), context_lens (num_seqs), block_start (num_seqs + 1), block_ids (num_blocks), sample_rows (num_samples).
// The arrays it goes to have room for the padding. A token id of -1 - i stands for the token that sample i of the previous
// step chose.
//
// Grid: any. A thread moves 16 bytes at a time; a decode step is one or two of them, so that only latency counts.
#include "common/step.cuh"

constexpr int kStepHeader = 8;
constexpr int kStepSections = 9;
constexpr int kStepThreads = 256;

struct StepParams {
  const int* packed;
  StepCounts* counts;
  const int* sampled_tokens;     // [2][max_samples], by parity
  int* sections[kStepSections];  // token_ids .. sample_rows in the order above
  int max_samples;
  int padding;
};

DEVICE int resolved(int token, const int* previous) { return token >= 0 ? token : previous[-1 - token]; }

KERNEL(step_begin, StepParams, kStepThreads, 1) {
  // It does not let the next kernel start early, which is `embed`, and that lets none start before this one's words are in
  // place.
  wait_for_previous_kernels();
  const int num_tokens = p.packed[0], num_seqs = p.packed[1], num_samples = p.packed[2], parity = p.packed[3];
  const int num_blocks = p.packed[4];
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.counts = {num_tokens, num_seqs, num_samples, parity};
  const int* previous = p.sampled_tokens + (parity == 0 ? p.max_samples : 0);
  const int lengths[kStepSections] = {num_tokens,   num_tokens, num_tokens,   num_tokens, num_seqs + 1,
                                      num_seqs, num_seqs + 1, num_blocks, num_samples};
  int total = 0;
#pragma unroll
  for (int s = 0; s < kStepSections; s++) total += (lengths[s] + 3) / 4;
  for (int i = int(blockIdx.x) * kStepThreads + int(threadIdx.x); i < total; i += int(gridDim.x) * kStepThreads) {
    uint4 words = reinterpret_cast<const uint4*>(p.packed + kStepHeader)[i];
    int first = 0;
#pragma unroll
    for (int s = 0; s < kStepSections; s++) {
      const int count = (lengths[s] + 3) / 4;
      if (i >= first && i < first + count) {
        if (s == 0) {
          words = make_uint4(unsigned(resolved(int(words.x), previous)), unsigned(resolved(int(words.y), previous)),
                             unsigned(resolved(int(words.z), previous)), unsigned(resolved(int(words.w), previous)));
        }
        reinterpret_cast<uint4*>(p.sections[s])[i - first] = words;
      }
      first += count;
    }
  }
}
