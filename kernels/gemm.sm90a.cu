// Matrix product of many tokens, for Hopper: out[m][n] = (sum over k of x[m][k] * w[n][k]) * x_scales[m] * w_scales[n].
//
// Shapes: x [panels][x_stride][128 bytes], w [panels][w_rows][128 bytes] (layout.cuh), e4m3 or bf16; out [m][out_stride]
// bf16, or f32 with the soft-cap of the output projection.
// Work: one block an SM, which takes tile after tile of 128 tokens x `Columns` outputs, in an order that lets a wave share
// few rows of both operands in L2. One warp copies: a tile's rows of one panel are a single contiguous piece, swizzled as
// wgmma wants it. Two warpgroups multiply 64 tokens each; while they store a tile, the copies for the next one run ahead.
// Bound by flops. Per panel and block (128 + Columns) * 128 bytes come from L2, which is why tiles are as wide as the
// registers of two sets of sums allow.
// A sum's order depends on K alone, never on the tile or on other rows: k from 0 up, and for e4m3 a full f32 sum after
// every kPromoteEvery panels.
#include "common/gemm.cuh"

constexpr int kTileRows = 128;
constexpr int kConsumerRows = 64;
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 384;
constexpr int kScaleBuffers = 2;
/// Row tiles that are done together for each column tile.
constexpr int kRowTilesTogether = 16;

struct E4m3 {
  static constexpr bool kPromotes = true;
  template <int N>
  static DEVICE void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    wgmma_e4m3<N>(sums, a, b, accumulate);
  }
};

struct Bf16 {
  static constexpr bool kPromotes = false;
  template <int N>
  static DEVICE void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    wgmma_bf16<N>(sums, a, b, accumulate);
  }
};

template <class Operand_, class Out_, int Columns, int Stages>
struct Tiling {
  using Operand = Operand_;
  using Out = Out_;
  static constexpr int kColumns = Columns;
  static constexpr int kStages = Stages;
  static constexpr int kXBytes = kTileRows * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + Columns * kPanelBytes;
  static constexpr int kScaleFloats = kTileRows + Columns;
};

/// Where things lie in shared memory: stages, then scales, then barriers.
template <class T>
struct Shared {
  uint8_t* memory;

  DEVICE uint32_t x(int stage) const { return shared_address(memory) + stage * T::kStageBytes; }
  DEVICE uint32_t w(int stage) const { return x(stage) + T::kXBytes; }
  DEVICE float* x_scales(int buffer) const {
    return reinterpret_cast<float*>(memory + T::kStages * T::kStageBytes) + buffer * T::kScaleFloats;
  }
  DEVICE float* w_scales(int buffer) const { return x_scales(buffer) + kTileRows; }
  DEVICE uint32_t barrier(int index) const { return shared_address(x_scales(kScaleBuffers)) + index * 8; }
  DEVICE uint32_t full(int stage) const { return barrier(stage); }
  DEVICE uint32_t empty(int stage) const { return barrier(T::kStages + stage); }
  DEVICE uint32_t scales_full(int buffer) const { return barrier(2 * T::kStages + buffer); }
  DEVICE uint32_t scales_empty(int buffer) const { return barrier(2 * T::kStages + kScaleBuffers + buffer); }
};

/// A position in a ring of buffers, and the parity of the barriers' phase there.
template <int Size>
struct Ring {
  int index = 0;
  uint32_t parity = 0;

  DEVICE void advance() {
    if (++index == Size) {
      index = 0;
      parity ^= 1;
    }
  }
};

/// First row and first column of a tile.
struct Tile {
  int row, column;
};

/// The tiles of the product in the order of work.
template <class T>
struct Tiles {
  int row_tiles, column_tiles;

  DEVICE int count() const { return row_tiles * column_tiles; }
  DEVICE Tile at(int index) const {
    const int first = index / (kRowTilesTogether * column_tiles) * kRowTilesTogether;
    const int together = min(kRowTilesTogether, row_tiles - first);
    const int inside = index - first * column_tiles;
    return {(first + inside % together) * kTileRows, inside / together * T::kColumns};
  }
};

/// Copies the scales of a tile, if there are any.
template <class T>
DEVICE void copy_scales(const GemmParams& p, const Shared<T>& shared, Ring<kScaleBuffers>& ring, Tile tile, int columns) {
  mbarrier_wait(shared.scales_empty(ring.index), ring.parity ^ 1);
  const uint32_t full = shared.scales_full(ring.index);
  const uint32_t x_bytes = p.x_scales == nullptr ? 0 : kTileRows * 4;
  const uint32_t w_bytes = p.w_scales == nullptr ? 0 : columns * 4;
  mbarrier_arrive_expect_tx(full, x_bytes + w_bytes);
  if (x_bytes > 0) bulk_copy(shared_address(shared.x_scales(ring.index)), p.x_scales + tile.row, x_bytes, full);
  if (w_bytes > 0) bulk_copy(shared_address(shared.w_scales(ring.index)), p.w_scales + tile.column, w_bytes, full);
  ring.advance();
}

/// One thread: keeps the stages full.
template <class T>
DEVICE void produce(const GemmParams& p, const Shared<T>& shared, const Tiles<T>& tiles) {
  Ring<T::kStages> ring;
  Ring<kScaleBuffers> scales;
  for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.at(index);
    const int columns = min(T::kColumns, p.w_rows - tile.column);
    copy_scales<T>(p, shared, scales, tile, columns);
    const uint8_t* x = p.x + size_t(tile.row) * kPanelBytes;
    const uint8_t* w = p.w + size_t(tile.column) * kPanelBytes;
    for (int panel = 0; panel < p.panels; panel++) {
      mbarrier_wait(shared.empty(ring.index), ring.parity ^ 1);
      const uint32_t full = shared.full(ring.index);
      mbarrier_arrive_expect_tx(full, T::kXBytes + columns * kPanelBytes);
      bulk_copy(shared.x(ring.index), x, T::kXBytes, full);
      bulk_copy(shared.w(ring.index), w, columns * kPanelBytes, full);
      x += size_t(p.x_stride) * kPanelBytes;
      w += size_t(p.w_rows) * kPanelBytes;
      ring.advance();
    }
  }
}

/// One arrival of each warp frees a buffer. What the warp read of it must be done.
DEVICE void release(uint32_t empty) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

/// Starts the products of one stage: `sums` (+)= X[64][128 bytes] * W[Columns][128 bytes]^T.
template <class T>
DEVICE void multiply_stage(const Shared<T>& shared, int stage, int consumer, float (&sums)[T::kColumns / 2], bool fresh) {
  const uint64_t x = operand_descriptor(shared.x(stage) + consumer * kConsumerRows * kPanelBytes);
  const uint64_t w = operand_descriptor(shared.w(stage));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    T::Operand::template multiply<T::kColumns>(sums, x + step * kDescriptorStep, w + step * kDescriptorStep, step > 0 || !fresh);
  }
  wgmma_commit();
}

/// `sums` = the products of the next `panels` stages. A stage is freed when the products of the following one have been
/// started, so that the tensor cores have work meanwhile.
template <class T>
DEVICE void multiply_stages(const Shared<T>& shared, Ring<T::kStages>& ring, int panels, int consumer, float (&sums)[T::kColumns / 2]) {
  uint32_t held = 0;
  for (int panel = 0; panel < panels; panel++) {
    mbarrier_wait(shared.full(ring.index), ring.parity);
    multiply_stage<T>(shared, ring.index, consumer, sums, panel == 0);
    wgmma_wait<1>();
    if (panel > 0) release(held);
    held = shared.empty(ring.index);
    ring.advance();
  }
  wgmma_wait<0>();
  pin_registers(sums);
  release(held);
}

/// The sums of one tile.
template <class T>
DEVICE void multiply_tile(const Shared<T>& shared, Ring<T::kStages>& ring, int panels, int consumer, float (&sums)[T::kColumns / 2]) {
  if constexpr (T::Operand::kPromotes) {
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; i++) sums[i] = 0.0f;
    for (int left = panels; left > 0; left -= kPromoteEvery) {
      float part[T::kColumns / 2];
      multiply_stages<T>(shared, ring, min(left, kPromoteEvery), consumer, part);
#pragma unroll
      for (int i = 0; i < T::kColumns / 2; i++) sums[i] += part[i];
    }
  } else {
    multiply_stages<T>(shared, ring, panels, consumer, sums);
  }
}

/// The same pace without products, for 64 rows beyond the last token.
template <class T>
DEVICE void skip_tile(const Shared<T>& shared, Ring<T::kStages>& ring, int panels) {
  for (int panel = 0; panel < panels; panel++) {
    mbarrier_wait(shared.full(ring.index), ring.parity);
    __syncwarp();
    release(shared.empty(ring.index));
    ring.advance();
  }
}

/// A warpgroup: multiplies and stores its 64 rows of every tile.
template <class T>
DEVICE void consume(const GemmParams& p, const Shared<T>& shared, const Tiles<T>& tiles, int num_rows) {
  // The shuffle tells the compiler that all lanes agree: wgmma must not stand in code that looks divergent.
  const int consumer = __shfl_sync(~0u, int(threadIdx.x) / 128 - 1, 0), warp = threadIdx.x % 128 / 32;
  Ring<T::kStages> ring;
  Ring<kScaleBuffers> scales;
  for (int index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.at(index);
    const bool live = tile.row + consumer * kConsumerRows < num_rows;
    float sums[T::kColumns / 2];
    if (live) multiply_tile<T>(shared, ring, p.panels, consumer, sums);
    else skip_tile<T>(shared, ring, p.panels);
    mbarrier_wait(shared.scales_full(scales.index), scales.parity);
    if (live) {
      const int inside = consumer * kConsumerRows + warp * 16;
      const SumsTarget to{tile.row + inside, tile.column, num_rows,
                          p.x_scales == nullptr ? nullptr : shared.x_scales(scales.index) + inside,
                          p.w_scales == nullptr ? nullptr : shared.w_scales(scales.index)};
      store_warp_sums<typename T::Out, T::kColumns>(p, to, sums);
    }
    __syncwarp();
    release(shared.scales_empty(scales.index));
    scales.advance();
  }
}

template <class T>
DEVICE void start_barriers(const Shared<T>& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; stage++) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), kConsumerWarps);
    }
    for (int buffer = 0; buffer < kScaleBuffers; buffer++) {
      mbarrier_init(shared.scales_full(buffer), 1);
      mbarrier_init(shared.scales_empty(buffer), kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
}

template <class T>
DEVICE void gemm(const GemmParams& p, uint8_t* memory) {
  let_next_kernel_start();
  const Shared<T> shared{memory};
  start_barriers<T>(shared);
  wait_for_previous_kernels();
  const int num_rows = *p.num_rows;
  const Tiles<T> tiles{(num_rows + kTileRows - 1) / kTileRows, (p.columns + T::kColumns - 1) / T::kColumns};
  if (threadIdx.x < 128) {
    decrease_registers<24>();
    if (threadIdx.x == 0) produce<T>(p, shared, tiles);
  } else {
    increase_registers<240>();
    consume<T>(p, shared, tiles, num_rows);
  }
}

#define GEMM(name, Operand, Out, Columns, Stages)          \
  KERNEL(name, GemmParams, kThreads, 1) {                  \
    DYNAMIC_SHARED(memory);                                \
    gemm<Tiling<Operand, Out, Columns, Stages>>(p, memory); \
  }

GEMM(gemm_e4m3_n64, E4m3, bf16, 64, 8)
GEMM(gemm_e4m3_n96, E4m3, bf16, 96, 7)
GEMM(gemm_e4m3_n112, E4m3, bf16, 112, 7)
GEMM(gemm_e4m3_n128, E4m3, bf16, 128, 6)
GEMM(gemm_e4m3_n160, E4m3, bf16, 160, 6)
GEMM(gemm_e4m3_n192, E4m3, bf16, 192, 5)
GEMM(gemm_e4m3_f32_n128, E4m3, float, 128, 6)
GEMM(gemm_e4m3_f32_n192, E4m3, float, 192, 5)
GEMM(gemm_bf16_n64, Bf16, bf16, 64, 8)
GEMM(gemm_bf16_n128, Bf16, bf16, 128, 6)
GEMM(gemm_bf16_n192, Bf16, bf16, 192, 5)
GEMM(gemm_bf16_n256, Bf16, bf16, 256, 4)
GEMM(gemm_bf16_f32_n128, Bf16, float, 128, 6)
GEMM(gemm_bf16_f32_n256, Bf16, float, 256, 4)
