// One step's inputs in device memory, at addresses that never change: a captured graph reads them anew each time.
#pragma once

#include "ptx.cuh"

/// Counts of the step, `StepCounts` of the Rust side.
struct StepCounts {
  int num_tokens;
  int num_seqs;
  int num_samples;
  /// 1 in the first, 0 in the second of two alternating steps: which of the sampled-token buffers this step writes.
  int parity;
};

/// Pointers into the step's device buffers; every kernel that looks at the batch takes them in its parameters. What they
/// point to is complete before any kernel behind `embed` can start: it may be read there, past L1, before
/// wait_for_previous_kernels().
struct Step {
  const StepCounts* counts;
  const int* token_ids;     // [num_tokens], with the previous step's tokens in place
  const int* positions;     // [num_tokens]
  const int* slots;         // [num_tokens] block * block_size + offset
  const int* query_start;   // [num_seqs + 1]
  const int* context_lens;  // [num_seqs] KV length after this step
  const int* block_start;   // [num_seqs + 1]
  const int* block_ids;     // block tables one after another
  const int* sample_rows;   // [num_samples]
  const int* seq_of_token;  // [num_tokens] which sequence a row belongs to
};
