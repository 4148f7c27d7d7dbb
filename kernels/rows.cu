// Operations on one row at a time: embedding, norms with their residual, the gated activation, and the quantisation
// that ends each.
//
// A row (one token, or one sampled row) belongs to one block, whose size depends on the row's length and on nothing else.
// Its sums are taken in three steps that depend on neither: 8 columns in a thread, a butterfly over 256 in a warp, and those in
// order. What a row gets is the same to the bit in any batch, and on the CPU backend (crates/cpu/src/hopper.rs). Threads own groups of 8 columns, read as 16 bytes, and keep them in registers from the only
// read to the only write. Of a step of one token these kernels are latency: a read from L2 (the weights of a norm are read
// while the kernel before still runs), two reductions, a write. Of a long step they are bound by memory: 11 bytes a column
// in add_norm, whose blocks then stay and walk rows, so that reads go on while they reduce; 5 in geglu.
#include "common/gated.cuh"
#include "common/quantize.cuh"
#include "common/step.cuh"

// ---- groups of 8 columns

// Rows are a multiple of 8 long (16 for a thread's 16 columns), or kernels named `any` take them, one column at a time:
// `Whole` says which.

DEVICE void unpack8(const uint4& packed, float (&out)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) out[2 * i] = low_float(words[i]), out[2 * i + 1] = high_float(words[i]);
}
DEVICE void load_whole8(const float* from, float (&out)[8]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
  out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
DEVICE void load_whole8(const bf16* from, float (&out)[8]) { unpack8(*reinterpret_cast<const uint4*>(from), out); }
/// Columns `col..col + 8` of a row of `cols`, zeros beyond its end.
template <bool Whole, class T>
DEVICE void load8(const T* row, int col, int cols, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = 0.0f;
  if constexpr (Whole) {
    if (col < cols) load_whole8(row + col, out);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (col + i < cols) out[i] = to_float(row[col + i]);
    }
  }
}
DEVICE void store_whole8(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
DEVICE void store_whole8(bf16* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(bf16x2_from_floats(x[0], x[1]), bf16x2_from_floats(x[2], x[3]),
                                             bf16x2_from_floats(x[4], x[5]), bf16x2_from_floats(x[6], x[7]));
}
DEVICE void store1(float* to, float x) { *to = x; }
DEVICE void store1(bf16* to, float x) { *to = bf16_from_float(x); }
template <bool Whole, class T>
DEVICE void store8(T* row, int col, int cols, const float (&x)[8]) {
  if constexpr (Whole) {
    if (col < cols) store_whole8(row + col, x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (col + i < cols) store1(row + col + i, x[i]);
    }
  }
}

// ---- rows in registers

/// What a thread holds of a row: columns `(Threads * i + thread) * 8` onwards, for i = 0..Groups.
template <int Threads, int Groups, bool Whole>
struct Row {
  static constexpr int kWarps = Threads / 32;
  /// Pieces of 256 columns, each a warp's.
  static constexpr int kPieces = Groups * kWarps;
  /// Floats of shared memory that sums and largest values need.
  static constexpr int kScratch = (kPieces + kWarps + 3) / 4 * 4;
  float x[Groups][8];

  static DEVICE int column(int group) { return (Threads * group + int(threadIdx.x)) * 8; }

  template <class T>
  DEVICE void load(const T* row, int cols) {
#pragma unroll
    for (int g = 0; g < Groups; g++) load8<Whole>(row, column(g), cols, x[g]);
  }
  template <class T>
  DEVICE void store(T* row, int cols) const {
#pragma unroll
    for (int g = 0; g < Groups; g++) store8<Whole>(row, column(g), cols, x[g]);
  }

  /// The largest `max` of all threads. Needs kScratch floats that nobody else uses.
  static DEVICE float largest(float max, float* scratch) {
    put_largest(max, scratch);
    __syncthreads();
    return largest_of_warps(scratch);
  }
  /// Needs kScratch floats that nobody else uses.
  DEVICE float sum_of_squares(int cols, float* scratch) const {
    put_squares(cols, scratch);
    __syncthreads();
    return sum_of_pieces(scratch);
  }

  // Both at once: what is put before a __syncthreads can be read behind it.
  DEVICE void put_squares(int cols, float* scratch) const {
#pragma unroll
    for (int g = 0; g < Groups; g++) {
      float sum = 0.0f;
      // The whole block agrees.
      if (g == 0 || Threads * 8 * g < cols) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum = __fmaf_rn(x[g][i], x[g][i], sum);
        sum = warp_sum(sum);
      }
      if (threadIdx.x % 32 == 0) scratch[kWarps * g + int(threadIdx.x) / 32] = sum;
    }
  }
  static DEVICE void put_largest(float max, float* scratch) {
    max = warp_max(max);
    if (threadIdx.x % 32 == 0) scratch[kPieces + int(threadIdx.x) / 32] = max;
  }
  static DEVICE float sum_of_pieces(const float* scratch) {
    float sums[4] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++) sums[piece % 4] += scratch[piece];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  static DEVICE float largest_of_warps(const float* scratch) {
    float maxima[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; w++) maxima[w % 4] = fmaxf(maxima[w % 4], scratch[kPieces + w]);
    return fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3]));
  }
};

/// What a norm is besides its weights.
struct RmsNorm {
  float eps;
  float inverse_cols;
};
DEVICE float inverse_rms(float sum_of_squares, const RmsNorm& norm) {
  return inverse_sqrt_rounded(__fmaf_rn(sum_of_squares, norm.inverse_cols, norm.eps));
}

/// Writes `x * factor` quantised. `amax` is the largest magnitude of `x`: a product with a positive number keeps order,
/// rounded or not, so the scale of the row needs no other reduction.
template <int Threads, int Groups, bool Whole>
DEVICE void write_row(const Activation& out, int row, int cols, Row<Threads, Groups, Whole>& x, float factor, float amax) {
  float scale = out.static_scale;
  if (out.scheme == kSchemeToken) scale = token_scale(amax * factor);
  if (out.scheme != kSchemeNone && threadIdx.x == 0) out.scales[row] = scale;
  const Divisor by = divisor(scale);
#pragma unroll
  for (int g = 0; g < Groups; g++) {
#pragma unroll
    for (int i = 0; i < 8; i++) x.x[g][i] *= factor;
    if (x.column(g) < cols) write_activation<Whole>(out, row, x.column(g), cols, x.x[g], by);
  }
}

/// Writes `norm(x)` quantised; `weights` hold 1 + w.
template <int Threads, int Groups, bool Whole>
DEVICE void write_normed(const Activation& out, int row, int cols, Row<Threads, Groups, Whole>& x,
                         const Row<Threads, Groups, Whole>& weights, const RmsNorm& norm, float* scratch) {
  float amax = 0.0f;
  x.put_squares(cols, scratch);
#pragma unroll
  for (int g = 0; g < Groups; g++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x.x[g][i] *= weights.x[g][i];
      amax = fmaxf(amax, fabsf(x.x[g][i]));
    }
  }
  x.put_largest(amax, scratch);
  __syncthreads();
  const float factor = inverse_rms(x.sum_of_pieces(scratch), norm);
  write_row(out, row, cols, x, factor, x.largest_of_warps(scratch));
}

/// `residual += norm(x)`, given x's inverse_rms.
template <int Threads, int Groups, bool Whole>
DEVICE void add_normed(Row<Threads, Groups, Whole>& residual, const Row<Threads, Groups, Whole>& x,
                       const Row<Threads, Groups, Whole>& weights, float factor) {
#pragma unroll
  for (int g = 0; g < Groups; g++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      residual.x[g][i] = __fmaf_rn(__fmul_rn(x.x[g][i], factor), weights.x[g][i], residual.x[g][i]);
    }
  }
}

// ---- kernels: grid = rows, no more than there are in memory; shared memory = 2 * Row::kScratch floats at most.
// Reading a row that is not asked for is cheaper than waiting for the count before reading.

struct EmbedParams {
  Step step;
  const uint8_t* table;  // bf16 panels [K panels][table_rows][128 bytes]
  void* out;             // [tokens][cols]
  int table_rows;
  int cols;
  float scale;
  int padding;
};

/// out[t] = table[token_ids[t]] * scale. Grid y cuts a row into pieces of 128 groups.
template <class T>
DEVICE void embed(const EmbedParams& p) {
  // In this order, unlike any other kernel: what step_begin wrote is in place before any that follows can start, however
  // many of them start early.
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int row = int(blockIdx.x), col = int(blockIdx.y * blockDim.x + threadIdx.x) * 8;
  const int token = p.step.token_ids[row];
  if (row >= p.step.counts->num_tokens || col >= p.cols) return;
  const uint8_t* group = p.table + panel_offset(token, 2 * col, p.table_rows);
  float x[8];
  unpack8(__ldg(reinterpret_cast<const uint4*>(group)), x);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] *= p.scale;
  T* out = static_cast<T*>(p.out) + size_t(row) * p.cols;
  if (p.cols % 8 == 0) store8<true>(out, col, p.cols, x);
  else store8<false>(out, col, p.cols, x);
}

struct NormParams {
  const int* num_rows;
  const void* x;         // [rows][cols]
  const float* weights;  // [cols], 1 + w
  Activation out;
  RmsNorm norm;
  int cols;
  int padding;
};

/// out = quantise(norm(x))
template <class T, int Threads, int Groups, bool Whole>
DEVICE void norm(const NormParams& p) {
  DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int row = int(blockIdx.x), cols = p.cols;
  Row<Threads, Groups, Whole> x, weights;
  x.load(static_cast<const T*>(p.x) + size_t(row) * cols, cols);
  if (row >= *p.num_rows) return;
  weights.load(p.weights, cols);
  write_normed(p.out, row, cols, x, weights, p.norm, scratch);
}

/// out = quantise(x)
template <int Threads, int Groups, bool Whole>
DEVICE void quantize_rows(const NormParams& p) {
  DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int row = int(blockIdx.x), cols = p.cols;
  Row<Threads, Groups, Whole> x;
  x.load(static_cast<const bf16*>(p.x) + size_t(row) * cols, cols);
  if (row >= *p.num_rows) return;
  float amax = 0.0f;
#pragma unroll
  for (int g = 0; g < Groups; g++) {
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(x.x[g][i]));
  }
  if (p.out.scheme == kSchemeToken) amax = x.largest(amax, scratch);
  write_row(p.out, row, cols, x, 1.0f, amax);
}

struct AddNormParams {
  const int* num_rows;
  const bf16* x;              // [tokens][cols]
  const float* post_weights;  // [cols], 1 + w
  const float* pre_weights;   // [cols], 1 + w
  float* residual;            // [tokens][cols]
  const int* rows;            // last_norm: which row each output row is made of
  Activation out;
  RmsNorm norm;
  int cols;
  int padding;
};

/// residual += norm_post(x), out = quantise(norm_pre(residual))
template <int Threads, int Groups, bool Whole>
DEVICE void add_norm(const AddNormParams& p) {
  using Values = Row<Threads, Groups, Whole>;
  DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  // Weights that fit in registers are read before the kernel that makes x is done.
  constexpr bool kEarly = Groups == 1;
  let_next_kernel_start();
  const int row = int(blockIdx.x), cols = p.cols;
  const size_t offset = size_t(row) * cols;
  Values post, pre, x, residual;
  if (kEarly) post.load(p.post_weights, cols), pre.load(p.pre_weights, cols);
  wait_for_previous_kernels();
  x.load(p.x + offset, cols);
  residual.load(p.residual + offset, cols);
  if (row >= *p.num_rows) return;
  const float factor = inverse_rms(x.sum_of_squares(cols, scratch), p.norm);
  if (!kEarly) post.load(p.post_weights, cols);
  add_normed(residual, x, post, factor);
  residual.store(p.residual + offset, cols);
  if (!kEarly) pre.load(p.pre_weights, cols);
  write_normed(p.out, row, cols, residual, pre, p.norm, scratch + Values::kScratch);
}

/// Rows of x and of the residual on their way through shared memory. A warp copies what its own lanes own and nothing else,
/// so that it waits for no other warp. A lane owns 8 columns, 32 bytes of the residual, but copies and stores 16 bytes next
/// to its neighbours': accesses 32 bytes apart would move every sector of the residual twice.
template <int Threads, int Stages>
struct RowRing {
  static constexpr int kXBytes = Threads * 16;
  static constexpr int kStageBytes = kXBytes + Threads * 32;
  static constexpr int kWarpResidualBytes = 32 * 32;
  uint8_t* memory;

  static DEVICE int warp() { return int(threadIdx.x) / 32; }
  static DEVICE int lane() { return int(threadIdx.x) % 32; }
  static DEVICE int column() { return int(threadIdx.x) * 8; }
  /// The first column of the i-th chunk that the lane copies and stores, i = 0, 1.
  static DEVICE int shared_column(int i) { return warp() * 256 + (32 * i + lane()) * 4; }

  DEVICE uint8_t* x(int stage) const { return memory + stage * kStageBytes + int(threadIdx.x) * 16; }
  /// Chunk of 16 bytes of the warp's residual. Chunks trade places: be they one or two apart, 8 lanes meet in no bank.
  DEVICE float4* chunk(int stage, int index) const {
    uint8_t* const first = memory + stage * kStageBytes + kXBytes + warp() * kWarpResidualBytes;
    return reinterpret_cast<float4*>(first) + (index ^ (index >> 3 & 1));
  }
  DEVICE float4* own_chunk(int stage, int i) const { return chunk(stage, 2 * lane() + i); }
  DEVICE float4* shared_chunk(int stage, int i) const { return chunk(stage, 32 * i + lane()); }

  DEVICE void start_copy(int stage, const bf16* x_row, const float* residual_row, int cols) const {
    if (column() < cols) cp_async_16(shared_address(x(stage)), x_row + column(), true);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (shared_column(i) >= cols) continue;
      cp_async_16(shared_address(shared_chunk(stage, i)), residual_row + shared_column(i), true);
    }
  }

  DEVICE void load(int stage, int cols, float (&x_out)[8], float (&residual_out)[8]) const {
    const bool exists = column() < cols;
    const uint4 packed = exists ? *reinterpret_cast<const uint4*>(x(stage)) : make_uint4(0, 0, 0, 0);
    unpack8(packed, x_out);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = exists ? *own_chunk(stage, i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      residual_out[4 * i] = four.x, residual_out[4 * i + 1] = four.y;
      residual_out[4 * i + 2] = four.z, residual_out[4 * i + 3] = four.w;
    }
  }

  /// Stores a row of the residual by way of its place in the stage, which may be filled again afterwards.
  DEVICE void store(int stage, float* residual_row, int cols, const float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      *own_chunk(stage, i) = make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (shared_column(i) >= cols) continue;
      *reinterpret_cast<float4*>(residual_row + shared_column(i)) = *shared_chunk(stage, i);
    }
  }
};

/// A norm's weights of the columns that the thread owns, in shared memory: no other thread reads them. 8 lanes meet in no bank.
template <int Threads>
struct OwnWeights {
  static constexpr int kBytes = Threads * 32;
  uint8_t* memory;

  DEVICE float4& half(int i) const { return reinterpret_cast<float4*>(memory)[i * Threads + int(threadIdx.x)]; }
  DEVICE void keep(const float* weights, int cols) const {
    float x[8];
    load8<true>(weights, int(threadIdx.x) * 8, cols, x);
    half(0) = make_float4(x[0], x[1], x[2], x[3]);
    half(1) = make_float4(x[4], x[5], x[6], x[7]);
  }
  DEVICE void load(float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = half(i);
      out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
    }
  }
};

/// As add_norm, to the bit, for more rows than blocks run at once: a block takes every gridDim.x-th row and has the next ones
/// on their way while it reduces one. Shared memory: `Stages` rows, both weights, and the scratch.
template <int Threads, int Stages>
DEVICE void add_norm_many(const AddNormParams& p) {
  using Values = Row<Threads, 1, true>;
  using Ring = RowRing<Threads, Stages>;
  DYNAMIC_SHARED(shared);
  const Ring ring{shared};
  const OwnWeights<Threads> post_weights{shared + Stages * Ring::kStageBytes};
  const OwnWeights<Threads> pre_weights{post_weights.memory + post_weights.kBytes};
  float* const scratch = reinterpret_cast<float*>(pre_weights.memory + pre_weights.kBytes);
  let_next_kernel_start();
  const int cols = p.cols, first = int(blockIdx.x), step = int(gridDim.x);
  post_weights.keep(p.post_weights, cols), pre_weights.keep(p.pre_weights, cols);
  wait_for_previous_kernels();
  const int num_rows = *p.num_rows;
  const auto start_copy = [&](int stage, int row) {
    const size_t offset = size_t(row) * cols;
    if (row < num_rows) ring.start_copy(stage, p.x + offset, p.residual + offset, cols);
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < Stages - 1; i++) start_copy(i, first + i * step);
  int stage = 0, free_stage = Stages - 1;
  for (int row = first; row < num_rows; row += step) {
    start_copy(free_stage, row + (Stages - 1) * step);
    cp_async_wait<Stages - 1>();
    __syncwarp();
    Values x, residual, post, pre;
    ring.load(stage, cols, x.x[0], residual.x[0]);
    post_weights.load(post.x[0]);
    add_normed(residual, x, post, inverse_rms(x.sum_of_squares(cols, scratch), p.norm));
    ring.store(stage, p.residual + size_t(row) * cols, cols, residual.x[0]);
    pre_weights.load(pre.x[0]);
    write_normed(p.out, row, cols, residual, pre, p.norm, scratch + Values::kScratch);
    free_stage = stage;
    if (++stage == Stages) stage = 0;
  }
}

/// out[s] = quantise(norm_pre(residual[rows[s]] + norm_post(x[rows[s]]))); the residual stays as it is.
template <int Threads, int Groups, bool Whole>
DEVICE void last_norm(const AddNormParams& p) {
  using Values = Row<Threads, Groups, Whole>;
  DYNAMIC_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int index = int(blockIdx.x), cols = p.cols;
  if (index >= *p.num_rows) return;
  const size_t offset = size_t(p.rows[index]) * cols;
  Values weights, x, residual;
  x.load(p.x + offset, cols);
  residual.load(p.residual + offset, cols);
  const float factor = inverse_rms(x.sum_of_squares(cols, scratch), p.norm);
  weights.load(p.post_weights, cols);
  add_normed(residual, x, weights, factor);
  weights.load(p.pre_weights, cols);
  write_normed(p.out, index, cols, residual, weights, p.norm, scratch + Values::kScratch);
}

struct GegluParams {
  const int* num_rows;
  const bf16* gate_up;  // [tokens][2 * cols], as gated.cuh says
  Activation out;
  int cols;
  int padding;
};

/// Columns `col..col + 8`, of which those from `end` on do not exist.
template <bool Whole>
DEVICE void load_gated(const GegluParams& p, int row, int col, int end, float (&out)[8]) {
  const bf16* const pairs = p.gate_up + size_t(row) * 2 * p.cols;
  const int count = Whole ? 8 : min(8, end - col), gate = 2 * col, up = gate + count;
  float ups[8];
  load8<Whole>(pairs, gate, Whole ? 2 * end : gate + count, out);
  load8<Whole>(pairs, up, Whole ? 2 * end : up + count, ups);
#pragma unroll
  for (int i = 0; i < 8; i++) out[i] = gated(out[i], ups[i]);
}

constexpr int kGegluThreads = 128;

/// Schemes without a reduction: grid y cuts a row into pieces of two groups of 8 columns a thread.
template <bool Whole>
DEVICE void geglu_piece(const GegluParams& p) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int row = int(blockIdx.x);
  const int first = int(blockIdx.y * (2 * kGegluThreads) + threadIdx.x) * 8, second = first + kGegluThreads * 8;
  float x[2][8];
  load_gated<Whole>(p, row, first, p.cols, x[0]);
  load_gated<Whole>(p, row, second, p.cols, x[1]);
  if (row >= *p.num_rows) return;
  if (p.out.scheme == kSchemeStatic && first == 0) p.out.scales[row] = p.out.static_scale;
  const Divisor by = divisor(p.out.static_scale);
  if (first < p.cols) write_activation<Whole>(p.out, row, first, p.cols, x[0], by);
  if (second < p.cols) write_activation<Whole>(p.out, row, second, p.cols, x[1], by);
}

/// A scale for each token: one block a row. What does not fit in registers is computed again after the reduction.
template <int Threads, int Groups, bool Whole>
DEVICE void geglu_row(const GegluParams& p) {
  using Values = Row<Threads, Groups, Whole>;
  DYNAMIC_SHARED(shared);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int row = int(blockIdx.x), cols = p.cols;
  if (row >= *p.num_rows) return;
  Values x;
  float amax = 0.0f;
  auto add = [&](const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(values[i]));
  };
#pragma unroll
  for (int g = 0; g < Groups; g++) {
    load_gated<Whole>(p, row, x.column(g), cols, x.x[g]);
    add(x.x[g]);
  }
  for (int col = x.column(Groups); col < cols; col += Threads * 8) {
    float more[8];
    load_gated<Whole>(p, row, col, cols, more);
    add(more);
  }
  amax = x.largest(amax, reinterpret_cast<float*>(shared));
  const Divisor by = divisor(token_scale(amax));
  if (threadIdx.x == 0) p.out.scales[row] = by.value;
#pragma unroll
  for (int g = 0; g < Groups; g++) {
    if (x.column(g) < cols) write_activation<Whole>(p.out, row, x.column(g), cols, x.x[g], by);
  }
  for (int col = x.column(Groups); col < cols; col += Threads * 8) {
    float more[8];
    load_gated<Whole>(p, row, col, cols, more);
    write_activation<Whole>(p.out, row, col, cols, more, by);
  }
}

KERNEL(embed_f32, EmbedParams, 128, 8) { embed<float>(p); }
KERNEL(embed_bf16, EmbedParams, 128, 8) { embed<bf16>(p); }

// Named after the longest row they take; `any` takes rows of up to 8192.
KERNEL(norm_f32_16384, NormParams, 512, 1) { norm<float, 512, 4, true>(p); }
KERNEL(norm_f32_any, NormParams, 512, 1) { norm<float, 512, 2, false>(p); }
KERNEL(norm_bf16_16384, NormParams, 512, 1) { norm<bf16, 512, 4, true>(p); }
KERNEL(norm_bf16_any, NormParams, 512, 1) { norm<bf16, 512, 2, false>(p); }
KERNEL(quantize_4096, NormParams, 512, 2) { quantize_rows<512, 1, true>(p); }
KERNEL(quantize_16384, NormParams, 512, 1) { quantize_rows<512, 4, true>(p); }
KERNEL(quantize_any, NormParams, 512, 1) { quantize_rows<512, 2, false>(p); }
KERNEL(add_norm_2560, AddNormParams, 320, 3) { add_norm<320, 1, true>(p); }
KERNEL(add_norm_3584, AddNormParams, 448, 2) { add_norm<448, 1, true>(p); }
KERNEL(add_norm_4608, AddNormParams, 576, 2) { add_norm<576, 1, true>(p); }
KERNEL(add_norm_16384, AddNormParams, 512, 1) { add_norm<512, 4, true>(p); }
KERNEL(add_norm_many_2560, AddNormParams, 320, 3) { add_norm_many<320, 3>(p); }
KERNEL(add_norm_many_3584, AddNormParams, 448, 2) { add_norm_many<448, 3>(p); }
KERNEL(add_norm_many_4608, AddNormParams, 576, 2) { add_norm_many<576, 2>(p); }
KERNEL(add_norm_any, AddNormParams, 512, 1) { add_norm<512, 2, false>(p); }
KERNEL(last_norm_16384, AddNormParams, 512, 1) { last_norm<512, 4, true>(p); }
KERNEL(last_norm_any, AddNormParams, 512, 1) { last_norm<512, 2, false>(p); }
KERNEL(geglu, GegluParams, kGegluThreads, 8) { geglu_piece<true>(p); }
KERNEL(geglu_any, GegluParams, kGegluThreads, 8) { geglu_piece<false>(p); }
KERNEL(geglu_token, GegluParams, 512, 1) { geglu_row<512, 4, true>(p); }
KERNEL(geglu_token_any, GegluParams, 512, 1) { geglu_row<512, 2, false>(p); }
