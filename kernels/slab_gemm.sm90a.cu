// Matrix products of few tokens: out[m][n] = sum_k x[m][k] * w[n][k] for up to 64 tokens m, bound by the bytes of w.
//
// x: panels `[k_panels][x_rows][128 bytes]`, w: panels `[k_panels][w_rows][128 bytes]` (layout.cuh), both e4m3 or both
// bf16. out: `[m][out_stride]`, bf16 or f32, times x_scales[m] and w_scales[n] where given, soft-capped where asked.
//
// Block b of the grid owns a slab of rows of w, as even as whole rows allow, with all of K: nothing is summed across
// blocks, so the result of a token depends on nothing but the token and w. The weights are operand A of wgmma (64 rows a
// tile), the tokens are operand B: 8 tokens cost no more than 1. A slab is walked in passes of at most `Tiles` tiles, and
// a pass panel by panel: the rows of a pass are one contiguous piece of each panel, brought by one bulk copy.
//
// One warp streams weights through a ring of stages, another the tokens through a second ring, and a warpgroup
// multiplies. The weights' ring fills before the kernels ahead have finished, since nothing on the device writes weights;
// with at most half the shared memory and registers of an SM a block, it does so beside the previous kernel's block.
// DRAM is busy as long as the ring holds latency times bandwidth, 32 to 64 KB an SM.
#include "common/gemm.cuh"

struct SlabGemmParams {
  const uint8_t* x;
  const float* x_scales;  // [m], or null
  const uint8_t* w;
  const float* w_scales;  // [n], or null
  void* out;
  const int* num_rows;  // tokens of the whole batch
  int first_row;        // token of the batch that x, x_scales and out begin with
  int x_rows;
  int w_rows;
  int k_panels;
  int out_stride;
  int out_is_f32;
  float softcap;   // 0: none
  int slab_rows;   // rows of w of a block
  int long_slabs;  // so many blocks, the first, have one row more
  int pass_rows;   // rows of w a pass takes, a multiple of 8
  int panel_rows;  // rows a panel of a stage has room for, a multiple of 8
  int w_stages;
  int x_stages;
  int prefetched_panels;  // brought to L2 when the ring of weights has been filled for the first time
};

namespace {

constexpr int kTileRows = 64;
constexpr int kGroupThreads = 128;
constexpr int kGroupWarps = kGroupThreads / 32;
/// Two warps copy, `groups` warpgroups multiply.
constexpr int threads_of(int groups) { return groups * kGroupThreads + 64; }
/// Shared memory begins with the barriers of both rings and the tokens' scales.
constexpr int kScalesOffset = 768;
constexpr int kRingsOffset = 1024;
/// What a descriptor counts in.
constexpr int kDescriptorUnit = 16;

struct Fp8 {
  static constexpr bool kPromotes = true;
  template <int N>
  static DEVICE void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    wgmma_e4m3<N>(d, a, b, accumulate);
  }
};
struct Bf16 {
  static constexpr bool kPromotes = false;
  template <int N>
  static DEVICE void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    wgmma_bf16<N>(d, a, b, accumulate);
  }
};

/// Stages that a warp fills and the consumers empty, in turn. Every user has its own copy, at its own place.
struct Ring {
  uint32_t slots;
  uint32_t barriers;  // of full stages, then of empty ones
  int panel_bytes;
  int stage_bytes;
  int stages;
  int stage;
  uint32_t parity;

  DEVICE uint32_t full() const { return barriers + uint32_t(8 * stage); }
  DEVICE uint32_t empty() const { return barriers + uint32_t(8 * (stages + stage)); }
  DEVICE uint32_t slot() const { return slots + uint32_t(stage * stage_bytes); }
  DEVICE uint32_t end() const { return slots + uint32_t(stages * stage_bytes); }
  DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  DEVICE void init(int i, int consumer_warps) const {
    if (i >= stages) return;
    mbarrier_init(barriers + uint32_t(8 * i), 1);
    mbarrier_init(barriers + uint32_t(8 * (stages + i)), uint32_t(consumer_warps));
  }
  DEVICE void wait_full() const { mbarrier_wait(full(), parity); }
  DEVICE void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }
};

template <int Panels>
DEVICE Ring weight_ring(const SlabGemmParams& p, uint32_t shared) {
  const int panel_bytes = p.panel_rows * kPanelBytes;
  return {shared + kRingsOffset, shared, panel_bytes, Panels * panel_bytes, p.w_stages, 0, 0};
}
template <int Panels, int N>
DEVICE Ring token_ring(const SlabGemmParams& p, const Ring& weights) {
  const uint32_t barriers = weights.barriers + uint32_t(16 * weights.stages);
  return {weights.end(), barriers, N * kPanelBytes, Panels * N * kPanelBytes, p.x_stages, 0, 0};
}

/// Rows [begin, end) of w.
struct Rows {
  int begin, end;
};
DEVICE Rows slab(const SlabGemmParams& p) {
  const int block = int(blockIdx.x);
  const int begin = block * p.slab_rows + min(block, p.long_slabs);
  return {begin, begin + p.slab_rows + (block < p.long_slabs)};
}

/// Panels of the next stage, with `left` to go: the last ones come one by one.
template <int Panels>
DEVICE int stage_panels(int left) {
  return left >= Panels ? Panels : 1;
}

DEVICE void prefetch(const SlabGemmParams& p, const uint8_t* from, uint32_t bytes, int panels) {
  for (int i = 0; i < panels; i++) prefetch_l2(from + size_t(i) * size_t(p.w_rows) * kPanelBytes, bytes);
}

template <int Panels>
DEVICE void stream_weights(const SlabGemmParams& p, Ring ring) {
  const Rows rows = slab(p);
  int stages_to_fill = ring.stages;
  for (int begin = rows.begin; begin < rows.end; begin += p.pass_rows) {
    const uint32_t bytes = uint32_t(min(p.pass_rows, rows.end - begin) * kPanelBytes);
    // The swizzle goes by the address: a row keeps its place among 8.
    const uint32_t shift = uint32_t(begin % 8 * kPanelBytes);
    const uint8_t* from = p.w + size_t(begin) * kPanelBytes;
    for (int panel = 0; panel < p.k_panels;) {
      const int panels = stage_panels<Panels>(p.k_panels - panel);
      ring.wait_empty();
      mbarrier_arrive_expect_tx(ring.full(), bytes * uint32_t(panels));
      for (int i = 0; i < panels; i++) {
        bulk_copy_evict_first(ring.slot() + shift + uint32_t(i * ring.panel_bytes), from, bytes, ring.full());
        from += size_t(p.w_rows) * kPanelBytes;
      }
      ring.advance();
      panel += panels;
      // DRAM works on, into L2, if the kernels ahead take longer than the ring to fill.
      if (--stages_to_fill == 0) prefetch(p, from, bytes, min(p.prefetched_panels, p.k_panels - panel));
    }
  }
}

/// All of x, once for each pass.
template <int Panels>
DEVICE void stream_tokens(const SlabGemmParams& p, Ring ring) {
  const Rows rows = slab(p);
  for (int begin = rows.begin; begin < rows.end; begin += p.pass_rows) {
    const uint8_t* from = p.x;
    for (int panel = 0; panel < p.k_panels;) {
      const int panels = stage_panels<Panels>(p.k_panels - panel);
      ring.wait_empty();
      mbarrier_arrive_expect_tx(ring.full(), uint32_t(ring.panel_bytes * panels));
      for (int i = 0; i < panels; i++) {
        bulk_copy(ring.slot() + uint32_t(i * ring.panel_bytes), from, uint32_t(ring.panel_bytes), ring.full());
        from += size_t(p.x_rows) * kPanelBytes;
      }
      ring.advance();
      panel += panels;
    }
  }
}

/// A descriptor `units` of 16 bytes on. Addresses in shared memory do not carry out of the low word.
DEVICE uint64_t further(uint64_t descriptor, uint32_t units) {
  return (descriptor & 0xffffffff00000000u) | (uint32_t(descriptor) + units);
}

/// Of `offset` bytes into a ring's stage. The exchange tells the compiler that a warp has one: the arithmetic on it becomes
/// scalar.
DEVICE uint64_t slot_descriptor(const Ring& ring, uint32_t offset) {
  return operand_descriptor(__shfl_sync(~0u, ring.slot() + offset, 0));
}

/// The products of a stage of `Panels` panels. `accumulate` 0 begins a new sum. One straight piece of code from fence to wait:
/// the compiler would serialise wgmma in a loop that leaves sums in flight.
template <class Format, int N, int Tiles, int Panels>
DEVICE void multiply_panels(float (&d)[Tiles][N / 2], uint64_t a, uint64_t b, uint32_t a_panel, int accumulate) {
  constexpr uint32_t b_panel = N * kPanelBytes / kDescriptorUnit;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4 * Panels; k++) {
    const uint32_t panel = uint32_t(k / 4), step = uint32_t(k % 4) * uint32_t(kDescriptorStep);
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
      const uint32_t tile = uint32_t(t * kTileRows * kPanelBytes / kDescriptorUnit);
      Format::template multiply<N>(d[t], further(a, panel * a_panel + tile + step), further(b, panel * b_panel + step),
                                   k == 0 ? accumulate : 1);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int t = 0; t < Tiles; t++) pin_registers(d[t]);
}

/// The warpgroup of a computing thread.
DEVICE int group_of_thread() { return int(threadIdx.x / kGroupThreads); }

/// Sums over all of K for a warpgroup's rows of a pass. The sums of e4m3 products are kept with too few bits by the tensor core to go
/// on for long: every kPromoteEvery panels they are added to true f32.
template <class Format, int N, int Tiles, int Panels>
DEVICE void multiply_pass(float (&sum)[Tiles][N / 2], int k_panels, Ring& w, Ring& x) {
  float part[Tiles][N / 2] = {};
  auto& d = Format::kPromotes ? part : sum;
  const uint32_t a_panel = uint32_t(w.panel_bytes / kDescriptorUnit);
  const uint32_t first_tile = uint32_t(group_of_thread() * Tiles * kTileRows * kPanelBytes);
  for (int panel = 0; panel < k_panels;) {
    const int panels = stage_panels<Panels>(k_panels - panel);
    const int accumulate = Format::kPromotes ? panel % kPromoteEvery : panel;
    const uint64_t a = slot_descriptor(w, first_tile), b = slot_descriptor(x, 0);
    w.wait_full();
    x.wait_full();
    if (panels == Panels) multiply_panels<Format, N, Tiles, Panels>(d, a, b, a_panel, accumulate);
    else multiply_panels<Format, N, Tiles, 1>(d, a, b, a_panel, accumulate);
    if (threadIdx.x % 32 == 0) {
      mbarrier_arrive(w.empty());
      mbarrier_arrive(x.empty());
    }
    w.advance();
    x.advance();
    panel += panels;
    if (Format::kPromotes && (panel == k_panels || panel % kPromoteEvery == 0)) {
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[t][i] += part[t][i];
      }
    }
  }
}

/// The row of a pass that half 0 of the thread's first tile belongs to; half 1 is 8 rows on, the next tile kTileRows.
template <int Tiles>
DEVICE int row_in_pass() {
  return group_of_thread() * Tiles * kTileRows + int(threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4);
}
/// The token that value `i` of a half belongs to.
DEVICE int token_of(int i) { return i / 2 * 8 + int(threadIdx.x % 4) * 2 + i % 2; }

DEVICE void put(float* to, float value) { *to = value; }
DEVICE void put(bf16* to, float value) { *to = bf16_from_float(value); }

template <class Out, int N, int Tiles>
DEVICE void store_pass(const SlabGemmParams& p, Rows rows, int num_rows, const float (&sum)[Tiles][N / 2]) {
  const int first = rows.begin / 8 * 8 + row_in_pass<Tiles>();
#pragma unroll
  for (int t = 0; t < Tiles; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int n = first + t * kTileRows + half * 8;
      if (n < rows.begin || n >= rows.end) continue;
      Out* const column = static_cast<Out*>(p.out) + n;
#pragma unroll
      for (int i = 0; i < N / 4; i++) {
        const int m = token_of(i);
        if (m < num_rows) put(column + size_t(m) * size_t(p.out_stride), sum[t][i / 2 * 4 + half * 2 + i % 2]);
      }
    }
  }
}

template <int N, int Tiles>
DEVICE void scale_pass(float (&sum)[Tiles][N / 2], const float* x_scales, const float (&w_scales)[Tiles][2]) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    const float x_scale = x_scales[token_of(i)];
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float& value = sum[t][i / 2 * 4 + half * 2 + i % 2];
        value = scaled_sum(value, x_scale, w_scales[t][half]);
      }
    }
  }
}

template <int N, int Tiles>
DEVICE void cap_pass(float (&sum)[Tiles][N / 2], float softcap) {
#pragma unroll
  for (int t = 0; t < Tiles; t++) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[t][i] = soft_capped(sum[t][i], softcap);
  }
}

template <class Format, int N, int Tiles, int Panels, int Groups>
DEVICE void consume(const SlabGemmParams& p, Ring w, Ring x, float* x_scales) {
  const Rows rows = slab(p);
  int num_rows = 0;
  for (int begin = rows.begin; begin < rows.end; begin += p.pass_rows) {
    const Rows pass = {begin, min(begin + p.pass_rows, rows.end)};
    // Asked for now, needed when the sums are done.
    float w_scales[Tiles][2];
#pragma unroll
    for (int i = 0; i < 2 * Tiles; i++) {
      const int n = begin / 8 * 8 + row_in_pass<Tiles>() + i / 2 * kTileRows + i % 2 * 8;
      w_scales[i / 2][i % 2] = p.w_scales != nullptr && n < pass.end ? p.w_scales[n] : 1.0f;
    }
    if (begin == rows.begin) {
      wait_for_previous_kernels();
      num_rows = *p.num_rows - p.first_row;
      const int m = int(threadIdx.x);
      if (m < N) x_scales[m] = p.x_scales != nullptr && m < num_rows ? p.x_scales[m] : 1.0f;
      named_barrier_sync(1, Groups * kGroupThreads);
    }
    float sum[Tiles][N / 2] = {};
    multiply_pass<Format, N, Tiles, Panels>(sum, p.k_panels, w, x);
    scale_pass<N, Tiles>(sum, x_scales, w_scales);
    if (p.softcap != 0.0f) cap_pass<N, Tiles>(sum, p.softcap);
    if (p.out_is_f32 != 0) store_pass<float, N, Tiles>(p, pass, num_rows, sum);
    else store_pass<bf16, N, Tiles>(p, pass, num_rows, sum);
  }
}

/// Each of the `Groups` warpgroups that multiply takes `Tiles` tiles of a pass.
template <class Format, int N, int Tiles, int Panels, int Groups>
DEVICE void slab_gemm(const SlabGemmParams& p, uint8_t* shared) {
  let_next_kernel_start();
  const Ring w = weight_ring<Panels>(p, shared_address(shared)), x = token_ring<Panels, N>(p, w);
  const int warp = int(threadIdx.x / 32);
  if (warp == 0) {
    w.init(int(threadIdx.x), Groups * kGroupWarps);
    x.init(int(threadIdx.x), Groups * kGroupWarps);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < Groups * kGroupWarps) {
    consume<Format, N, Tiles, Panels, Groups>(p, w, x, reinterpret_cast<float*>(shared + kScalesOffset));
  } else if (threadIdx.x % 32 == 0) {
    if (warp == Groups * kGroupWarps) {
      stream_weights<Panels>(p, w);
    } else {
      wait_for_previous_kernels();
      stream_tokens<Panels>(p, x);
    }
  }
}

}  // namespace

#define SLAB_GEMM(Format, format, N, Tiles, Panels)                                      \
  KERNEL(slab_gemm_##format##_n##N##_t##Tiles##_p##Panels, SlabGemmParams, threads_of(1), 2) { \
    DYNAMIC_SHARED(shared);                                                              \
    slab_gemm<Format, N, Tiles, Panels, 1>(p, shared);                                   \
  }
/// Two warpgroups, each of half the tiles: the way to wide passes of many tokens, at the price of all of an SM's registers.
#define SLAB_GEMM_OF_TWO(Format, format, N, Tiles, Panels)                                        \
  KERNEL(slab_gemm_##format##_n##N##_t##Tiles##_p##Panels##_g2, SlabGemmParams, threads_of(2), 1) { \
    DYNAMIC_SHARED(shared);                                                                       \
    slab_gemm<Format, N, Tiles / 2, Panels, 2>(p, shared);                                        \
  }
#define SLAB_GEMM_ANY_TOKENS(Format, format, Tiles, Panels) \
  SLAB_GEMM(Format, format, 8, Tiles, Panels)               \
  SLAB_GEMM(Format, format, 16, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 24, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 32, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 40, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 48, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 56, Tiles, Panels)              \
  SLAB_GEMM(Format, format, 64, Tiles, Panels)

SLAB_GEMM_ANY_TOKENS(Fp8, e4m3, 1, 4)
SLAB_GEMM_ANY_TOKENS(Fp8, e4m3, 1, 2)
SLAB_GEMM_ANY_TOKENS(Fp8, e4m3, 2, 1)
SLAB_GEMM_ANY_TOKENS(Bf16, bf16, 1, 4)
SLAB_GEMM_ANY_TOKENS(Bf16, bf16, 1, 2)
SLAB_GEMM_ANY_TOKENS(Bf16, bf16, 2, 1)
// Wider passes, for where the tokens are much of what a block reads. From 48 tokens on their sums are more than one warpgroup
// has registers for.
SLAB_GEMM(Bf16, bf16, 32, 4, 1)
SLAB_GEMM_OF_TWO(Bf16, bf16, 48, 4, 1)
SLAB_GEMM_OF_TWO(Bf16, bf16, 64, 4, 1)
SLAB_GEMM(Fp8, e4m3, 32, 4, 1)
SLAB_GEMM_OF_TWO(Fp8, e4m3, 48, 4, 1)
SLAB_GEMM_OF_TWO(Fp8, e4m3, 64, 4, 1)
