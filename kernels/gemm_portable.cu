// Matrix product for parts without wgmma (8.9, 12.0), and for any number of tokens:
// out[m][n] = (sum over k of x[m][k] * w[n][k]) * x_scales[m] * w_scales[n].
//
// Shapes: x [panels][x_stride][128 bytes], w [panels][w_rows][128 bytes] (layout.cuh), e4m3 or bf16; out [m][out_stride]
// bf16, or f32 with the soft-cap of the output projection.
// Work: a block a tile of Rows x Columns, row tiles next to each other in the grid so that they share weights in L2; blocks
// beyond the last token leave at once. cp.async fills a ring of panels, ldmatrix reads them (the panels' swizzle makes both
// free of bank conflicts), mma.sync multiplies.
// Bound by flops for many tokens; for few by the weights' bytes: the tile of 16 rows keeps its columns few, so that all SMs
// have some, and its ring deep.
// A sum's order depends on K alone, never on the tile or on other rows: k from 0 up, and for e4m3 a full f32 sum after
// every kPromoteEvery panels. 99 KB of shared memory suffice.
#include "common/gemm.cuh"

namespace {

struct E4m3 {
  static constexpr bool kPromotes = true;
  static DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k32_e4m3(sums, a, b, sums);
  }
};

struct Bf16 {
  static constexpr bool kPromotes = false;
  static DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(sums, a, b, sums);
  }
};

/// Hopper has no e4m3 in mma.sync: the compiler widens the operands, which takes registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kStepsAtOnce = 1;
#else
constexpr int kStepsAtOnce = 4;
#endif

/// A block of RowWarps x ColumnWarps warps, each with WarpRows x WarpColumns sums.
template <class Operand_, class Out_, int RowWarps, int ColumnWarps, int WarpRows, int WarpColumns, int Stages>
struct Tiling {
  using Operand = Operand_;
  using Out = Out_;
  static constexpr int kColumnWarps = ColumnWarps;
  static constexpr int kWarpRows = WarpRows;
  static constexpr int kWarpColumns = WarpColumns;
  static constexpr int kRows = RowWarps * WarpRows;
  static constexpr int kColumns = ColumnWarps * WarpColumns;
  static constexpr int kThreads = RowWarps * ColumnWarps * 32;
  static constexpr int kStages = Stages;
  static constexpr int kXBytes = kRows * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + kColumns * kPanelBytes;
  static_assert(kStages * kStageBytes <= 99 << 10, "what a block has on 8.9 and 12.0");
};

/// A warp's sums: those of 16 rows in the layout of accumulators (wgmma.cuh), for each 16 rows.
template <class T>
struct Sums {
  float at[T::kWarpRows / 16][T::kWarpColumns / 2];

  DEVICE void clear() {
#pragma unroll
    for (auto& rows : at) {
#pragma unroll
      for (float& sum : rows) sum = 0.0f;
    }
  }
  DEVICE void add(const Sums& other) {
#pragma unroll
    for (int i = 0; i < T::kWarpRows / 16; i++) {
#pragma unroll
      for (int j = 0; j < T::kWarpColumns / 2; j++) at[i][j] += other.at[i][j];
    }
  }
};

/// Starts copies of `rows` rows of a panel, of which `valid` exist; the others become zero.
template <int Threads>
DEVICE void copy_rows(uint32_t to, const uint8_t* from, int rows, int valid) {
  for (int chunk = threadIdx.x; chunk < rows * 8; chunk += Threads) {
    const bool exists = chunk / 8 < valid;
    cp_async_16(to + chunk * 16, exists ? from + size_t(chunk) * 16 : from, exists);
  }
}

/// The tile that a block computes.
struct Tile {
  int row, column, num_rows;
};

template <class T>
DEVICE void copy_panel(const GemmParams& p, const Tile& tile, int panel, uint32_t stage) {
  const uint8_t* x = p.x + (size_t(panel) * p.x_stride + tile.row) * kPanelBytes;
  const uint8_t* w = p.w + (size_t(panel) * p.w_rows + tile.column) * kPanelBytes;
  copy_rows<T::kThreads>(stage, x, T::kRows, tile.num_rows - tile.row);
  copy_rows<T::kThreads>(stage + T::kXBytes, w, T::kColumns, p.w_rows - tile.column);
}

/// Shared address of 16-byte chunk `chunk` of row `row`.
DEVICE uint32_t chunk_address(uint32_t rows, int row, int chunk) { return rows + row * kPanelBytes + ((chunk ^ (row & 7)) << 4); }

/// 32 bytes of K of 8 columns, or of 16 at once.
template <class T>
DEVICE void load_columns(uint32_t w, int step, uint32_t (&b)[T::kWarpColumns / 8][2]) {
  const int lane = threadIdx.x % 32;
  if constexpr (T::kWarpColumns == 8) {
    ldmatrix_x2(b[0], chunk_address(w, lane % 8, step * 2 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int j = 0; j < T::kWarpColumns / 8; j += 2) {
      uint32_t pair[4];
      ldmatrix_x4(pair, chunk_address(w, j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
      b[j][0] = pair[0], b[j][1] = pair[1];
      b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
    }
  }
}

/// sums += X[WarpRows][128 bytes] * W[WarpColumns][128 bytes]^T; `x` and `w` are where the warp's rows begin.
template <class T>
DEVICE void multiply_panel(uint32_t x, uint32_t w, Sums<T>& sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll kStepsAtOnce
  for (int step = 0; step < 4; step++) {
    uint32_t b[T::kWarpColumns / 8][2];
    load_columns<T>(w, step, b);
#pragma unroll
    for (int i = 0; i < T::kWarpRows / 16; i++) {
      uint32_t a[4];
      ldmatrix_x4(a, chunk_address(x, i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < T::kWarpColumns / 8; j++) {
        float* block = &sums.at[i][j * 4];
        float d[4] = {block[0], block[1], block[2], block[3]};
        T::Operand::multiply(d, a, b[j]);
        block[0] = d[0], block[1] = d[1], block[2] = d[2], block[3] = d[3];
      }
    }
  }
}

/// The sums of the calling warp, over all of K.
template <class T>
DEVICE void multiply_tile(const GemmParams& p, const Tile& tile, uint32_t memory, Sums<T>& sums) {
  const int warp = threadIdx.x / 32;
  const uint32_t x_offset = warp / T::kColumnWarps * T::kWarpRows * kPanelBytes;
  const uint32_t w_offset = T::kXBytes + warp % T::kColumnWarps * T::kWarpColumns * kPanelBytes;
  for (int panel = 0; panel < T::kStages - 1; panel++) {
    if (panel < p.panels) copy_panel<T>(p, tile, panel, memory + panel * T::kStageBytes);
    cp_async_commit();
  }
  Sums<T> part;
  part.clear();
  sums.clear();
  int stage = 0, next_stage = T::kStages - 1;
  for (int panel = 0; panel < p.panels; panel++) {
    cp_async_wait<T::kStages - 2>();
    __syncthreads();  // the panel is there for all, and all are done with the stage that is filled next
    const int next = panel + T::kStages - 1;
    if (next < p.panels) copy_panel<T>(p, tile, next, memory + next_stage * T::kStageBytes);
    cp_async_commit();
    const uint32_t here = memory + stage * T::kStageBytes;
    if constexpr (T::Operand::kPromotes) {
      multiply_panel<T>(here + x_offset, here + w_offset, part);
      if (panel % kPromoteEvery == kPromoteEvery - 1 || panel == p.panels - 1) {
        sums.add(part);
        part.clear();
      }
    } else {
      multiply_panel<T>(here + x_offset, here + w_offset, sums);
    }
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == T::kStages ? 0 : next_stage + 1;
  }
}

/// Stores the tile. Where there are no scales, ones take their place, in shared memory that is no longer needed.
template <class T>
DEVICE void store_tile(const GemmParams& p, const Tile& tile, uint8_t* memory, const Sums<T>& sums) {
  float* const ones = reinterpret_cast<float*>(memory);
  if (p.x_scales == nullptr || p.w_scales == nullptr) {
    __syncthreads();
    for (int i = threadIdx.x; i < 128; i += T::kThreads) ones[i] = 1.0f;
    __syncthreads();
  }
  const int warp = threadIdx.x / 32;
  const int column = tile.column + warp % T::kColumnWarps * T::kWarpColumns;
  if (column >= p.columns) return;
#pragma unroll
  for (int i = 0; i < T::kWarpRows / 16; i++) {
    const int row = tile.row + warp / T::kColumnWarps * T::kWarpRows + i * 16;
    const SumsTarget to{row, column, tile.num_rows, p.x_scales == nullptr ? ones : p.x_scales + row,
                        p.w_scales == nullptr ? ones : p.w_scales + column};
    store_warp_sums<typename T::Out, T::kWarpColumns>(p, to, sums.at[i]);
  }
}

template <class T>
DEVICE void gemm(const GemmParams& p, uint8_t* memory) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const Tile tile{int(blockIdx.x) * T::kRows, int(blockIdx.y) * T::kColumns, *p.num_rows};
  if (tile.row >= tile.num_rows) return;
  Sums<T> sums;
  multiply_tile<T>(p, tile, shared_address(memory), sums);
  store_tile<T>(p, tile, memory, sums);
}

}  // namespace

#define GEMM(name, Operand, Out, RowWarps, ColumnWarps, WarpRows, WarpColumns, Stages)                   \
  KERNEL(name, GemmParams, (RowWarps) * (ColumnWarps) * 32, 1) {                                         \
    DYNAMIC_SHARED(memory);                                                                              \
    gemm<Tiling<Operand, Out, RowWarps, ColumnWarps, WarpRows, WarpColumns, Stages>>(p, memory);         \
  }

GEMM(gemm_portable_e4m3_m16, E4m3, bf16, 1, 4, 16, 8, 8)
GEMM(gemm_portable_e4m3_m64, E4m3, bf16, 2, 2, 32, 32, 4)
GEMM(gemm_portable_e4m3_m128, E4m3, bf16, 2, 4, 64, 32, 3)
GEMM(gemm_portable_e4m3_f32_m16, E4m3, float, 1, 4, 16, 16, 8)
GEMM(gemm_portable_e4m3_f32_m128, E4m3, float, 2, 4, 64, 32, 3)
GEMM(gemm_portable_bf16_m16, Bf16, bf16, 1, 4, 16, 8, 8)
GEMM(gemm_portable_bf16_m64, Bf16, bf16, 2, 2, 32, 32, 4)
GEMM(gemm_portable_bf16_m128, Bf16, bf16, 2, 4, 64, 32, 3)
GEMM(gemm_portable_bf16_f32_m16, Bf16, float, 1, 4, 16, 16, 8)
GEMM(gemm_portable_bf16_f32_m128, Bf16, float, 2, 4, 64, 32, 3)
