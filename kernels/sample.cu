// Chooses a token for each sampled row from f32 logits [rows][vocab], and reports log-probabilities.
//
// Kernels of a step, in this order; a row takes part in those that its parameters ask for:
//   sample_adjust    biases, bans and penalties: a row's list of tokens, whose raw logits are kept aside
//   sample_scan      the largest logit, of equals the lowest id; greedy rows are done
//   sample_weigh     weights e^((logit - max) / temperature) as exact integer masses; rows without top_k and top_p draw,
//                    walking tokens in the order of their ids; others count weights in bins and find the bin in which
//                    what top_k and top_p keep must end
//   sample_gather    collects what is that likely and draws, walking from the likeliest token down
//   sample_restore   puts the raw logits back
//   sample_logprobs  log-sum-exp, rank and best alternatives of the raw logits, also of rows whose token was given
//
// All but the first and the fifth run a grid of (blocks, rows): a block looks at one or more slices of 4096 logits, and the
// last block of a row to arrive ends the row's work, so that one row of 256000 logits keeps 63 SMs busy for a few
// microseconds and 256 rows are bound by memory: 4 bytes a logit and kernel. Masses are integers and keys of (value, token) are all different:
// results do not depend on the order in which blocks or atomics happen, on the row, or on its neighbours.
#include "common/sampling.cuh"

// ---- adjusting

/// In the order of the model crate's contract, each step rounded as there.
DEVICE float adjusted(const SampleRow& row, float logit, float bias, int used) {
  logit += bias;
  if (used >= 0) logit = logit > 0.0f ? __fdiv_rn(logit, row.repetition) : __fmul_rn(logit, row.repetition);
  if (used > 0) logit = __fadd_rn(__fadd_rn(logit, -__fmul_rn(row.frequency, float(used))), -row.presence);
  return logit;
}

/// Grid: rows.
KERNEL(sample_adjust, SampleParams, kSampleThreads, 1) {
  DYNAMIC_SHARED(memory);
  int& is_listed = *reinterpret_cast<int*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.x);
  if (index >= p.step.counts->num_samples) return;
  const SampleRow& row = sample_row(p, index);
  if (row.num_entries == 0) return;
  SampleEntry* entries = reinterpret_cast<SampleEntry*>(p.packed + row.entries);
  float* logits = logits_of(p, index);
  const int input = row.counts_input != 0 ? p.step.token_ids[p.step.sample_rows[index]] : -1;
  if (threadIdx.x == 0) is_listed = 0;
  __syncthreads();
  for (int i = int(threadIdx.x); i < row.num_entries - row.counts_input; i += kSampleThreads) {
    const SampleEntry entry = entries[i];
    if (entry.token >= p.vocab) continue;
    int used = entry.used;
    if (entry.token == input) used = max(used, 0) + 1, is_listed = 1;
    const float raw = logits[entry.token];
    entries[i].raw = raw;
    logits[entry.token] = adjusted(row, raw, entry.bias, used);
  }
  __syncthreads();
  if (row.counts_input != 0 && is_listed == 0 && threadIdx.x == 0) {
    const float raw = logits[input];
    entries[row.num_entries - 1] = {input, 0.0f, 0, raw};
    logits[input] = adjusted(row, raw, 0.0f, 1);
  }
}

/// Grid: rows.
KERNEL(sample_restore, SampleParams, kSampleThreads, 1) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.x);
  if (index >= p.step.counts->num_samples) return;
  const SampleRow& row = sample_row(p, index);
  const SampleEntry* entries = reinterpret_cast<const SampleEntry*>(p.packed + row.entries);
  for (int i = int(threadIdx.x); i < row.num_entries; i += kSampleThreads) {
    const SampleEntry entry = entries[i];
    if (entry.token >= 0 && entry.token < p.vocab) logits_of(p, index)[entry.token] = entry.raw;
  }
}

// ---- the largest logit

/// Whether a row whose largest logit has this key is drawn: else it is greedy, or has nothing to weigh.
DEVICE bool is_drawn(const SampleRow& row, u64 best) {
  const unsigned order = unsigned(best >> 32);
  return row.given < 0 && row.temperature > 0.0f && order > kOrderedMinusInfinity && order < kOrderedInfinity;
}

KERNEL(sample_scan, SampleParams, kSampleThreads, 4) {
  DYNAMIC_SHARED(memory);
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.y);
  const SliceRange range = slices_of_block(p);
  // Reading a row that is not asked for is cheaper than waiting for the count before reading.
  float x[kSliceEach];
  load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, range.first, x);
  const SampleRow& row = sample_row(p, index);
  const int given = row.given;
  if (index >= p.step.counts->num_samples) return;
  if (given >= 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) write_token(p, index, given);
    return;
  }
  u64 best = 0;
  for (int slice = range.first; slice < range.end; slice++) {
    if (slice > range.first) load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
    mask_slice<Deal::kInTurn>(p, row, slice, x);
    unsigned top = ordered(x[0]);
    int at = 0;
#pragma unroll
    for (int i = 1; i < kSliceEach; i++) {
      const unsigned order = ordered(x[i]);
      if (order > top) top = order, at = i;
    }
    best = max(best, key_of(top, slice_token<Deal::kInTurn>(slice, at)));
  }
  best = block_max(best, shared);
  u64* keys = p.block_keys + size_t(index) * p.slices;
  if (threadIdx.x == 0) keys[blockIdx.x] = best;
  if (!arrive_last(p, index, shared)) return;
  if (gridDim.x > 1) {
    const unsigned block = threadIdx.x;
    best = block_max(block < gridDim.x ? load_l2(keys + block) : 0, shared);
  }
  if (threadIdx.x == 0) {
    p.states[index].best = best;
    if (!is_drawn(row, best)) write_token(p, index, token_of(best));
  }
}

// ---- drawing

/// What a row is drawn from.
struct Distribution {
  float max, scale;
  float min_weight;
  bool is_ranked;  // top_k or top_p cuts it
};

DEVICE Distribution distribution(const SampleRow& row, u64 best) {
  return {from_ordered(unsigned(best >> 32)), weight_scale(row.temperature), fmaxf(fminf(row.min_p, 1.0f), kMinWeight),
          row.top_k > 0 || row.top_p < 1.0f};
}

/// The weights of a slice; 0 for what is cut off, has no mass or is no number.
template <Deal How>
DEVICE void weigh_slice(const SampleParams& p, const SampleRow& row, const Distribution& from, int slice,
                        float (&x)[kSliceEach]) {
  mask_slice<How>(p, row, slice, x);
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) {
    const float weight = weight_of(x[i], from.max, from.scale);
    x[i] = weight >= from.min_weight ? weight : 0.0f;
  }
}

/// Adds to a 64-bit sum in two halves, which shared memory adds faster.
DEVICE void add_mass(SampleShared& shared, int bin, u64 mass) {
  const unsigned low = unsigned(mass);
  const unsigned carry = atomicAdd(&shared.low[bin], low) + low < low ? 1 : 0;
  const unsigned high = unsigned(mass >> 32) + carry;
  if (high != 0) atomicAdd(&shared.high[bin], high);
}
DEVICE u64 bin_mass(const SampleShared& shared, int bin) { return u64(shared.high[bin]) << 32 | shared.low[bin]; }
DEVICE void clear_bins(SampleShared& shared) {
  for (int bin = int(threadIdx.x); bin < kBins; bin += kSampleThreads) {
    shared.counts[bin] = 0, shared.low[bin] = 0, shared.high[bin] = 0;
  }
}

/// Where a draw ended.
struct Drawn {
  int slice;
  u64 rest;  // mass from the slice's beginning
};

/// The slice that a row's draw ends in.
DEVICE Drawn draw_slice(const SampleParams& p, const SampleRow& row, int index, SampleShared& shared) {
  const int each = (p.slices + kSampleThreads - 1) / kSampleThreads, first = int(threadIdx.x) * each;
  const u64* masses = p.slice_masses + size_t(index) * p.slices;
  u64 mine = 0, total;
  for (int s = first; s < min(first + each, p.slices); s++) mine += load_l2(masses + s);
  u64 before = block_scan(mine, total, shared);
  const u64 target = drawn(row, total);
  if (before <= target && target < before + mine) {
    int s = first;
    for (u64 mass = load_l2(masses + s); before + mass <= target; mass = load_l2(masses + ++s)) before += mass;
    shared.picked[0] = u64(s), shared.picked[1] = target - before;
  }
  __syncthreads();
  return {int(shared.picked[0]), shared.picked[1]};
}

/// By the last block of a row that nothing cuts, which has mass `total` if it is one slice: draws in the order of ids.
DEVICE void draw_in_order(const SampleParams& p, const SampleRow& row, const Distribution& from, int index, u64 total,
                          SampleShared& shared) {
  const Drawn end = p.slices == 1 ? Drawn{0, drawn(row, total)} : draw_slice(p, row, index, shared);
  float x[kSliceEach];
  load_slice<Deal::kNeighbours>(logits_of(p, index), p.vocab, end.slice, x);
  weigh_slice<Deal::kNeighbours>(p, row, from, end.slice, x);
  u64 mine = 0;
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) mine += mass_of(x[i]);
  u64 before = block_scan(mine, total, shared);
  if (before <= end.rest && end.rest < before + mine) {
    int chosen = -1;
#pragma unroll
    for (int i = 0; i < kSliceEach; i++) {
      before += mass_of(x[i]);
      if (chosen < 0 && end.rest < before) chosen = slice_token<Deal::kNeighbours>(end.slice, i);
    }
    write_token(p, index, chosen);
  }
}

/// Smallest number of masses' units that is a share of a total: between 1 and the total.
DEVICE u64 share_of(u64 total, float top_p) {
  const double wanted = double(top_p) * double(total);
  u64 units = wanted > 0.0 ? u64(wanted) : 0;
  if (double(units) < wanted) units++;
  return min(max(units, u64(1)), total);
}

/// By the last block of a row that top_k or top_p cuts: the bin in which what they keep ends. Leaves the bins zero.
DEVICE void find_last_bin(const SampleParams& p, const SampleRow& row, int index, SampleShared& shared) {
  constexpr int kEach = (kBins + kSampleThreads - 1) / kSampleThreads;
  unsigned* counts = p.bin_counts + size_t(index) * kBins;
  u64* masses = p.bin_masses + size_t(index) * kBins;
  u64 count[kEach], mass[kEach], count_sum = 0, mass_sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const int bin = int(threadIdx.x) * kEach + i;
    count[i] = bin < kBins ? load_l2(counts + bin) : 0;
    mass[i] = bin < kBins ? load_l2(masses + bin) : 0;
    if (bin < kBins) counts[bin] = 0, masses[bin] = 0;
    count_sum += count[i], mass_sum += mass[i];
  }
  u64 num_massive, total;
  const u64 count_before = block_scan(count_sum, num_massive, shared);
  const u64 mass_before = block_scan(mass_sum, total, shared);
  // What top_p keeps is a share of what top_k keeps, which is not known before that is collected.
  const bool by_count = row.top_k > 0 && u64(row.top_k) < num_massive;
  const u64 last = (by_count ? u64(row.top_k) : row.top_p < 1.0f ? share_of(total, row.top_p) : total) - 1;
  u64 counted = count_before, weighed = mass_before;
#pragma unroll
  for (int i = 0; i < kEach; i++) {
    const u64 here = by_count ? counted : weighed;
    const bool is_here = here <= last && last < here + (by_count ? count[i] : mass[i]);
    counted += count[i], weighed += mass[i];
    if (is_here) {
      SampleState& state = p.states[index];
      state.total = total;
      state.num_massive = unsigned(num_massive);
      state.last_bin = counted <= kMaxCandidates ? int(threadIdx.x) * kEach + i : -1;
    }
  }
}

KERNEL(sample_weigh, SampleParams, kSampleThreads, 4) {
  DYNAMIC_SHARED(memory);
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.y);
  const SliceRange range = slices_of_block(p);
  const SampleRow& row = sample_row(p, index);
  const u64 best = p.states[index].best;
  const bool is_wanted = is_drawn(row, best);
  if (index >= p.step.counts->num_samples || !is_wanted) return;
  const Distribution from = distribution(row, best);
  float x[kSliceEach];
  if (!from.is_ranked) {
    u64 total = 0;
    for (int slice = range.first; slice < range.end; slice++) {
      load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
      weigh_slice<Deal::kInTurn>(p, row, from, slice, x);
      u64 mass = 0;
#pragma unroll
      for (int i = 0; i < kSliceEach; i++) mass += mass_of(x[i]);
      block_scan(mass, total, shared);
      if (threadIdx.x == 0) p.slice_masses[size_t(index) * p.slices + slice] = total;
    }
    if (arrive_last(p, index, shared)) draw_in_order(p, row, from, index, total, shared);
    return;
  }
  clear_bins(shared);
  __syncthreads();
  for (int slice = range.first; slice < range.end; slice++) {
    load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
    weigh_slice<Deal::kInTurn>(p, row, from, slice, x);
#pragma unroll
    for (int i = 0; i < kSliceEach; i++) {
      if (x[i] == 0.0f) continue;
      atomicAdd(&shared.counts[bin_of(x[i])], 1u);
      add_mass(shared, bin_of(x[i]), mass_of(x[i]));
    }
  }
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kSampleThreads) {
    if (shared.counts[bin] == 0) continue;
    atomicAdd(p.bin_counts + size_t(index) * kBins + bin, shared.counts[bin]);
    atomicAdd(p.bin_masses + size_t(index) * kBins + bin, bin_mass(shared, bin));
  }
  if (arrive_last(p, index, shared)) find_last_bin(p, row, index, shared);
}

/// Calls `visit(key)` for every token with mass that may be drawn; keys are of (weight, token).
template <class Visit>
DEVICE void for_candidates(const SampleParams& p, const SampleRow& row, const Distribution& from, int index, Visit visit) {
  const SampleState& state = p.states[index];
  if (state.last_bin >= 0) {
    const int count = int(load_l2(&state.num_candidates));
    for (int i = int(threadIdx.x); i < count; i += kSampleThreads) {
      visit(load_l2(p.candidates + size_t(index) * kMaxCandidates + i));
    }
    return;
  }
  for (int slice = 0; slice < p.slices; slice++) {
    float x[kSliceEach];
    load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
    weigh_slice<Deal::kInTurn>(p, row, from, slice, x);
#pragma unroll
    for (int i = 0; i < kSliceEach; i++) {
      if (x[i] != 0.0f) visit(key_of(__float_as_uint(x[i]), slice_token<Deal::kInTurn>(slice, i)));
    }
  }
}
DEVICE u64 mass_of_key(u64 key) { return mass_of(__uint_as_float(unsigned(key >> 32))); }

/// An entry of the list of candidates from the largest key down.
struct Ranked {
  u64 key;
  u64 reached;  // mass down to it and its own
};

/// The candidate in which the running count or mass exceeds `target`: 8 bits of its key after the other.
DEVICE Ranked find_ranked(const SampleParams& p, const SampleRow& row, const Distribution& from, int index,
                          bool by_count, u64 target, SampleShared& shared) {
  u64 prefix = 0, count_before = 0, mass_before = 0;
  for (int shift = 56;; shift -= 8) {
    __syncthreads();
    clear_bins(shared);
    __syncthreads();
    for_candidates(p, row, from, index, [&](u64 key) {
      if (key >> shift >> 8 != prefix) return;
      const int bin = 255 - int(key >> shift & 255);
      atomicAdd(&shared.counts[bin], 1u);
      add_mass(shared, bin, mass_of_key(key));
      atomicExch(&shared.keys[bin], key);  // any of them: it is looked at where there is one
    });
    __syncthreads();
    const int bin = int(threadIdx.x);
    const u64 count = shared.counts[bin], mass = bin_mass(shared, bin);
    u64 total;
    const u64 mass_here = mass_before + block_scan(mass, total, shared);
    const u64 count_here = by_count ? count_before + block_scan(count, total, shared) : 0;
    const u64 here = by_count ? count_here : mass_here;
    if (here <= target && target < here + (by_count ? count : mass)) {
      shared.picked[0] = u64(bin), shared.picked[1] = count_here, shared.picked[2] = mass_here;
    }
    __syncthreads();
    const int chosen = int(shared.picked[0]);
    count_before = shared.picked[1], mass_before = shared.picked[2];
    if (shared.counts[chosen] == 1) {
      const u64 key = shared.keys[chosen];
      return {key, mass_before + mass_of_key(key)};
    }
    prefix = prefix << 8 | u64(255 - chosen);
  }
}

/// Whether top_k leaves something out.
DEVICE bool cuts_by_count(const SampleRow& row, const SampleState& state) {
  return row.top_k > 0 && unsigned(row.top_k) < state.num_massive;
}

/// As draw_ranked, for no more candidates than threads: each counts and weighs those before its own.
DEVICE void draw_among_few(const SampleParams& p, const SampleRow& row, int index, int count, SampleShared& shared) {
  const int thread = int(threadIdx.x);
  const u64 key = thread < count ? load_l2(p.candidates + size_t(index) * kMaxCandidates + thread) : 0;
  const u64 mass = mass_of_key(key);
  shared.keys[thread] = key, shared.masses[thread] = mass;
  __syncthreads();
  unsigned rank = 0;
  u64 before = 0;
  for (int i = 0; i < count; i++) {
    if (shared.keys[i] > key) rank++, before += shared.masses[i];
  }
  auto is_at = [&](u64 target) { return before <= target && target < before + mass; };
  u64 kept = p.states[index].total;
  if (cuts_by_count(row, p.states[index])) {
    if (thread < count && rank == unsigned(row.top_k) - 1) shared.picked[0] = before + mass;
    __syncthreads();
    kept = shared.picked[0];
  }
  if (row.top_p < 1.0f) {
    if (is_at(share_of(kept, row.top_p) - 1)) shared.picked[1] = before + mass;
    __syncthreads();
    kept = shared.picked[1];
  }
  if (is_at(drawn(row, kept))) write_token(p, index, token_of(key));
}

/// By the last block of a row: cuts by top_k, then by top_p, and draws from what is left.
DEVICE void draw_ranked(const SampleParams& p, const SampleRow& row, const Distribution& from, int index,
                        SampleShared& shared) {
  enum Turn { kByCount, kByShare, kDraw };
  u64 kept = p.states[index].total;
#pragma unroll 1
  for (int turn = kByCount; turn <= kDraw; turn++) {
    if (turn == kByCount && !cuts_by_count(row, p.states[index])) continue;
    if (turn == kByShare && !(row.top_p < 1.0f)) continue;
    u64 target = u64(row.top_k) - 1;
    if (turn == kByShare) target = share_of(kept, row.top_p) - 1;
    if (turn == kDraw) target = drawn(row, kept);
    const Ranked found = find_ranked(p, row, from, index, turn == kByCount, target, shared);
    kept = found.reached;
    if (turn == kDraw && threadIdx.x == 0) write_token(p, index, token_of(found.key));
  }
}

/// Appends a slice's tokens in bins up to `last_bin` to the row's candidates.
DEVICE void gather_slice(const SampleParams& p, int index, int slice, int last_bin, const float (&weights)[kSliceEach]) {
  auto is_candidate = [&](float weight) { return weight != 0.0f && bin_of(weight) <= last_bin; };
  unsigned count = 0;
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) count += is_candidate(weights[i]);
  if (count == 0) return;
  u64* to = p.candidates + size_t(index) * kMaxCandidates + atomicAdd(&p.states[index].num_candidates, count);
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) {
    if (is_candidate(weights[i])) *to++ = key_of(__float_as_uint(weights[i]), slice_token<Deal::kInTurn>(slice, i));
  }
}

KERNEL(sample_gather, SampleParams, kSampleThreads, 2) {
  DYNAMIC_SHARED(memory);
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.y);
  const SampleRow& row = sample_row(p, index);
  SampleState& state = p.states[index];
  const bool is_wanted = is_drawn(row, state.best);
  const Distribution from = distribution(row, state.best);
  if (index >= p.step.counts->num_samples || !is_wanted || !from.is_ranked) return;
  const SliceRange range = slices_of_block(p);
  const int last_bin = state.last_bin;
  for (int slice = range.first; slice < range.end && last_bin >= 0; slice++) {
    float x[kSliceEach];
    load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
    weigh_slice<Deal::kInTurn>(p, row, from, slice, x);
    gather_slice(p, index, slice, last_bin, x);
  }
  if (!arrive_last(p, index, shared)) return;
  const int count = int(load_l2(&state.num_candidates));
  if (count > 0 && count <= kSampleThreads) draw_among_few(p, row, index, count, shared);
  else draw_ranked(p, row, from, index, shared);
  __syncthreads();
  if (threadIdx.x == 0) state.num_candidates = 0;
}

// ---- log-probabilities

/// Writes the keys of the `count` largest of the block's values to `to`, largest first.
DEVICE void write_largest(const float (&x)[kSliceEach], int slice, int count, u64* to, SampleShared& shared) {
  unsigned taken = 0;
  auto largest = [&] {
    u64 best = 0;
#pragma unroll
    for (int i = 0; i < kSliceEach; i++) {
      if ((taken >> i & 1) == 0) best = max(best, key_of(ordered(x[i]), slice_token<Deal::kInTurn>(slice, i)));
    }
    return best;
  };
  u64 mine = largest();
  for (int n = 0; n < count; n++) {
    const u64 best = block_max(mine, shared);
    if (threadIdx.x == 0) to[n] = best;
    if (mine == best) {
#pragma unroll
      for (int i = 0; i < kSliceEach; i++) {
        if (slice_token<Deal::kInTurn>(slice, i) == token_of(best)) taken |= 1u << i;
      }
      mine = largest();
    }
  }
}

/// By the last block of a row: puts its slices together.
DEVICE void write_logprobs(const SampleParams& p, const SampleRow& row, int index, float chosen, SampleShared& shared) {
  const SliceScore* scores = p.slice_scores + size_t(index) * p.slices;
  u64 best = 0, ahead = 0, total_ahead;
  for (int s = int(threadIdx.x); s < p.slices; s += kSampleThreads) {
    best = max(best, u64(ordered(load_l2(&scores[s].max))));
    ahead += unsigned(load_l2(&scores[s].ahead));
  }
  const float largest = from_ordered(unsigned(block_max(best, shared)));
  block_scan(ahead, total_ahead, shared);
  float sum = 0.0f;
  for (int s = int(threadIdx.x); s < p.slices; s += kSampleThreads) {
    sum += load_l2(&scores[s].sum) * exp2_approx((load_l2(&scores[s].max) - largest) * kLog2E);
  }
  const float log_total = log2_approx(block_sum(sum, shared)) * 0.6931471805599453f;
  SampleResult& result = p.results[index];
  const int count = min(row.num_top, p.vocab);
  if (threadIdx.x == 0) {
    result.logprob = (chosen - largest) - log_total;
    result.rank = 1 + int(total_ahead);
    result.num_top = count;
  }
  // A slice's list falls: its next entry is its largest.
  const int slice = int(threadIdx.x);
  const u64* tops = p.slice_tops + (size_t(index) * p.slices + slice) * kMaxTop;
  int next = 0;
  u64 mine = slice < p.slices && count > 0 ? load_l2(tops) : 0;
  for (int n = 0; n < count; n++) {
    const u64 top = block_max(mine, shared);
    if (threadIdx.x == 0) {
      result.top_tokens[n] = token_of(top);
      result.top_logprobs[n] = (from_ordered(unsigned(top >> 32)) - largest) - log_total;
    }
    if (mine == top) mine = ++next < count ? load_l2(tops + next) : 0;
  }
}

/// What a slice adds to a row's log-probabilities.
DEVICE void score_slice(const SampleParams& p, const SampleRow& row, int index, int slice, int token, float chosen,
                        SampleShared& shared) {
  float x[kSliceEach];
  load_slice<Deal::kInTurn>(logits_of(p, index), p.vocab, slice, x);
  unsigned top = 0;
  u64 ahead = 0, total_ahead;
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) {
    top = max(top, ordered(x[i]));
    ahead += x[i] > chosen || (x[i] == chosen && slice_token<Deal::kInTurn>(slice, i) < token);
  }
  const float largest = from_ordered(unsigned(block_max(top, shared)));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSliceEach; i++) {
    // False for numbers that are none, and where a slice has nothing else.
    if (x[i] > -infinity()) sum += exp2_approx((x[i] - largest) * kLog2E);
  }
  sum = block_sum(sum, shared);
  block_scan(ahead, total_ahead, shared);
  const size_t at = size_t(index) * p.slices + slice;
  if (threadIdx.x == 0) p.slice_scores[at] = {largest, sum, int(total_ahead), 0};
  write_largest(x, slice, min(row.num_top, p.vocab), p.slice_tops + at * kMaxTop, shared);
}

KERNEL(sample_logprobs, SampleParams, kSampleThreads, 3) {
  DYNAMIC_SHARED(memory);
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.y);
  if (index >= p.step.counts->num_samples) return;
  const SampleRow& row = sample_row(p, index);
  if (row.num_top < 0) return;
  const int token = p.results[index].token;
  const float chosen = logits_of(p, index)[token];
  const SliceRange range = slices_of_block(p);
  for (int slice = range.first; slice < range.end; slice++) score_slice(p, row, index, slice, token, chosen, shared);
  if (arrive_last(p, index, shared)) write_logprobs(p, row, index, chosen, shared);
}
