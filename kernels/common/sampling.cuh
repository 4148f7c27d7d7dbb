// What choosing tokens works on: the packed parameters of a step, a row's logits cut into slices, and keys that order tokens.
#pragma once

#include "numbers.cuh"
#include "step.cuh"

using u64 = unsigned long long;

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / 32;
/// Logits of a slice, the part of a row that a block looks at: 16 a thread.
constexpr int kSliceLogits = 4096;
constexpr int kSliceEach = kSliceLogits / kSampleThreads;
/// Alternatives reported with log-probabilities.
constexpr int kMaxTop = 20;
/// Candidates that a row may have; with more, one block looks at the whole row.
constexpr int kMaxCandidates = 16384;
/// Classes of weights: 8 for each power of two from 1 down to where masses are zero.
constexpr int kBins = 352;

/// How to choose one token, 16 words.
struct SampleRow {
  u64 seed;
  float temperature;  // 0 is greedy
  float min_p;
  float top_p;
  int top_k;  // 0 keeps all
  int position;
  int given;          // the token to report on, which nothing chooses; -1: choose
  int num_top;        // alternatives; -1: no log-probabilities
  int mask;           // word of the packed step where allowed tokens are, 32 to a word; 0: all are
  int entries;        // word of the packed step
  int num_entries;
  float repetition;
  float frequency;
  float presence;
  int counts_input;  // the row's input counts as output: the last entry is free for it
};
static_assert(sizeof(SampleRow) == 64, "the host writes 16 words");

/// A token whose logit is not the model's alone.
struct SampleEntry {
  int token;   // -1: none
  float bias;    // -inf bans
  int used;    // how often it was generated; 0: it is in the prompt alone; -1: nowhere
  float raw;   // where the model's logit is kept meanwhile
};

/// What is reported of a row.
struct SampleResult {
  int token;
  float logprob;
  int rank;
  int num_top;
  int top_tokens[kMaxTop];
  float top_logprobs[kMaxTop];
};

/// Of a row between its kernels. Counters and `num_candidates` are zero between steps.
struct SampleState {
  u64 best;   // key of the largest logit
  u64 total;  // mass of all tokens
  unsigned num_massive;     // tokens whose mass is not 0
  unsigned num_candidates;  // collected so far
  int last_bin;             // of candidates; -1: they are too many to collect
  unsigned arrived;         // blocks of the row that are done with the kernel that runs
};

/// Of a slice's raw logits.
struct SliceScore {
  float max;
  float sum;  // of e^(logit - max)
  int ahead;  // tokens before the chosen one
  int padding;
};

struct SampleParams {
  Step step;
  float* logits;            // [max_samples][vocab]
  int* packed;              // 8 words, [num_samples] SampleRow, entries and masks
  int* sampled_tokens;      // [2][max_samples], by parity
  SampleResult* results;    // [max_samples]
  SampleState* states;      // [max_samples]
  u64* block_keys;          // [max_samples][blocks] the largest logit
  u64* slice_masses;        // [max_samples][slices]
  unsigned* bin_counts;     // [max_samples][kBins], zero between steps
  u64* bin_masses;          // [max_samples][kBins], zero between steps
  u64* candidates;          // [max_samples][kMaxCandidates] keys of weights
  SliceScore* slice_scores;  // [max_samples][slices]
  u64* slice_tops;          // [max_samples][slices][kMaxTop] keys of the largest raw logits
  int vocab;
  int slices;
  int slices_each;  // that a block looks at
  int max_samples;
};

DEVICE const SampleRow& sample_row(const SampleParams& p, int row) {
  return reinterpret_cast<const SampleRow*>(p.packed + 8)[row];
}
/// The slices of this block.
struct SliceRange {
  int first, end;
};
DEVICE SliceRange slices_of_block(const SampleParams& p) {
  const int first = int(blockIdx.x) * p.slices_each;
  return {first, min(first + p.slices_each, p.slices)};
}
DEVICE float* logits_of(const SampleParams& p, int row) { return p.logits + size_t(row) * p.vocab; }

// ---- keys: larger is better, of equals the lower token

/// Order of floats as unsigned integers; numbers that are none come first, and zeros are equal.
DEVICE unsigned ordered(float x) {
  if (x != x) return 0;
  const unsigned bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
DEVICE float from_ordered(unsigned order) {
  return __uint_as_float(order >> 31 != 0 ? order & 0x7fffffffu : ~order);
}
DEVICE u64 key_of(unsigned order, int token) { return u64(order) << 32 | unsigned(~token); }
DEVICE int token_of(u64 key) { return int(~unsigned(key)); }
constexpr unsigned kOrderedMinusInfinity = 0x007fffffu;
constexpr unsigned kOrderedInfinity = 0xff800000u;

// ---- weights and masses

/// e^((logit - max) / temperature) where `scale` is log2(e) / temperature.
DEVICE float weight_of(float logit, float max, float scale) { return exp2_approx((logit - max) * scale); }
DEVICE float weight_scale(float temperature) { return fminf(__fdiv_rn(kLog2E, temperature), 3e38f); }
/// A weight as a multiple of 2^-42: sums are exact, so that no order of adding matters. What is smaller has no mass.
DEVICE u64 mass_of(float weight) { return u64(weight * 0x1p42f); }
constexpr float kMinWeight = 0x1p-42f;
/// 0 for weight 1, then 8 bins for each power of two.
DEVICE int bin_of(float weight) { return int((127u << 3) - (__float_as_uint(weight) >> 20)); }

/// In 0..1 in steps of 2^-64, from the seed and the position alone (two rounds of splitmix64): times a total, the point
/// to draw.
DEVICE u64 mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
DEVICE u64 drawn(const SampleRow& row, u64 total) {
  const u64 uniform = mix(mix(row.seed) + u64(unsigned(row.position)));
  return multiply_high(uniform >> 11 << 11, total);
}

// ---- slices

/// How the logits of a slice are dealt out, 4 neighbours at a time: to threads in turn, which reads well, or 16 neighbours
/// to each, which keeps the order of tokens.
enum class Deal { kInTurn, kNeighbours };

template <Deal How>
DEVICE int slice_token(int slice, int index) {
  const int within = How == Deal::kInTurn ? index / 4 * (kSampleThreads * 4) + int(threadIdx.x) * 4 + index % 4
                                          : int(threadIdx.x) * kSliceEach + index;
  return slice * kSliceLogits + within;
}

/// Logits beyond the row's end are no numbers.
template <Deal How>
DEVICE void load_slice(const float* logits, int vocab, int slice, float (&x)[kSliceEach]) {
  const float none = __uint_as_float(0x7fc00000u);
#pragma unroll
  for (int i = 0; i < kSliceEach; i += 4) {
    const int first = slice_token<How>(slice, i);
    if (vocab % 4 == 0) {
      float4 four = make_float4(none, none, none, none);
      if (first < vocab) four = *reinterpret_cast<const float4*>(logits + first);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) x[i + j] = first + j < vocab ? logits[first + j] : none;
    }
  }
}

/// Tokens that are not allowed become -inf.
template <Deal How>
DEVICE void mask_slice(const SampleParams& p, const SampleRow& row, int slice, float (&x)[kSliceEach]) {
  if (row.mask == 0) return;
  const unsigned* words = reinterpret_cast<const unsigned*>(p.packed + row.mask);
#pragma unroll
  for (int i = 0; i < kSliceEach; i += 4) {
    const int first = slice_token<How>(slice, i);
    if (first >= p.vocab) continue;
    const unsigned bits = words[first / 32] >> (first % 32);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (first + j < p.vocab && (bits >> j & 1) == 0) x[i + j] = -infinity();
    }
  }
}

// ---- blocks

/// Shared memory of the kernels that choose.
struct SampleShared {
  u64 scratch[2 * kSampleWarps];
  u64 picked[4];
  u64 keys[kSampleThreads];  // one of each bin, or all
  u64 masses[kSampleThreads];
  unsigned counts[kBins];
  unsigned low[kBins];
  unsigned high[kBins];
  int flag;
};

static_assert(sizeof(SampleShared) <= 9 * 1024, "what the host reserves");
static_assert(sizeof(SampleState) == 32 && sizeof(SampleResult) == 176 && sizeof(SliceScore) == 16, "as the host has it");

DEVICE u64 block_max(u64 x, SampleShared& shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = max(x, __shfl_xor_sync(~0u, x, mask));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.scratch[threadIdx.x / 32] = x;
  __syncthreads();
  u64 result = shared.scratch[0];
#pragma unroll
  for (int w = 1; w < kSampleWarps; w++) result = max(result, shared.scratch[w]);
  return result;
}

/// Sum of `x` over the threads before this one; `total` over all.
DEVICE u64 block_scan(u64 x, u64& total, SampleShared& shared) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  u64 sum = x;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const u64 other = __shfl_up_sync(~0u, sum, delta);
    if (lane >= delta) sum += other;
  }
  __syncthreads();
  if (lane == 31) shared.scratch[warp] = sum;
  __syncthreads();
  u64 before = sum - x;
  total = 0;
#pragma unroll
  for (int w = 0; w < kSampleWarps; w++) {
    if (w < warp) before += shared.scratch[w];
    total += shared.scratch[w];
  }
  return before;
}

DEVICE float block_sum(float x, SampleShared& shared) {
  float* scratch = reinterpret_cast<float*>(shared.scratch);
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float result = 0.0f;
#pragma unroll
  for (int w = 0; w < kSampleWarps; w++) result += scratch[w];
  return result;
}

/// True in the last of a row's blocks: what the others wrote before is in L2.
DEVICE bool arrive_last(const SampleParams& p, int row, SampleShared& shared) {
  __syncthreads();
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    unsigned* arrived = &p.states[row].arrived;
    shared.flag = atomic_add_acq_rel(arrived, 1) == gridDim.x - 1;
    if (shared.flag != 0) *arrived = 0;
  }
  __syncthreads();
  return shared.flag != 0;
}

DEVICE void write_token(const SampleParams& p, int row, int token) {
  const int first = p.step.counts->parity == 0 ? 0 : p.max_samples;
  p.sampled_tokens[first + row] = token;
  p.results[row].token = token;
}
