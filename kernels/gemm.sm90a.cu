// Matrix product of many tokens, for Hopper: out[m][n] = (sum over k of x[m][k] * w[n][k]) * x_scales[m] * w_scales[n].
//
// Shapes: x [panels][x_stride][128 bytes], w [panels][w_rows][128 bytes] (layout.cuh), e4m3 or bf16; out [m][out_stride]
// bf16, or f32 with the soft-cap of the output projection; or, gated, the e4m3 input of the next product (gated.cuh).
// Work: one block an SM, which takes tile after tile of 128 tokens x `Columns` outputs, in an order that lets a wave share
// few rows of both operands in L2. One warp copies: a tile's rows of one panel are a single contiguous piece, swizzled as
// wgmma wants it. Two warpgroups multiply 64 tokens each; while they store a tile, the copies for the next one run ahead.
// A pair of blocks (a cluster) takes two tiles of the same columns: each copies half of the weights' rows to both.
// Bound by flops. Per panel (128 + Columns) * 128 bytes come from L2 to each block, (128 + Columns / 2) * 128 in a pair,
// which is why there are pairs, and why tiles are as wide as the registers of two sets of sums allow.
// A sum's order depends on K alone, never on the tile or on other rows: k from 0 up, and for e4m3 a full f32 sum after
// every kPromoteEvery panels.
#include "common/gated.cuh"

namespace {

constexpr int kTileRows = 128;
constexpr int kConsumerRows = 64;
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 384;
/// Registers a thread starts with: 64 Ki over the block's threads, in steps of 8.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
/// Tiles whose scales are in shared memory at once.
constexpr int kJobs = 2;

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

template <class Out>
struct ParamsFor {
  using Type = GemmParams;
};
template <>
struct ParamsFor<Gated> {
  using Type = GatedGemmParams;
};

/// Tiles of `Columns` columns, for a block alone or for each of a cluster of `Blocks` blocks.
template <class Operand_, class Out_, int Columns, int Stages, int Blocks>
struct Tiling {
  using Operand = Operand_;
  using Out = Out_;
  using Params = typename ParamsFor<Out>::Type;
  static constexpr int kBlocks = Blocks;
  static constexpr int kColumns = Columns;
  static constexpr int kStages = Stages;
  static constexpr int kXBytes = kTileRows * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + Columns * kPanelBytes;
  static constexpr int kJobBytes = (kTileRows + Columns + 4) * 4;
  static constexpr int kBarriers = 2 * Stages + 2 * kJobs + 1;
  static constexpr int kSharedBytes = Stages * kStageBytes + kJobs * kJobBytes + kBarriers * 8;
  static_assert(kSharedBytes <= 227 << 10, "what a block has");
  /// Warps get registers only from what others of the block gave back: with one too many they would wait for ever.
  static constexpr int kConsumerRegisters = Operand::kPromotes && Columns >= 224 ? 240 : 232;
  static constexpr int kProducerRegisters = 3 * kLaunchRegisters - 2 * kConsumerRegisters;
};

/// First row and first column of a tile.
struct Tile {
  int row, column;
};

/// What the copying warp tells the others of a tile, before its scales.
struct alignas(16) Job {
  int row, column;
  int num_rows;  // of all of x; 0: there are no more tiles
  int padding;
};

/// Where things lie in shared memory: stages, then jobs with their scales, then barriers.
template <class T>
struct Shared {
  uint8_t* memory;

  DEVICE uint32_t x(int stage) const { return shared_address(memory) + stage * T::kStageBytes; }
  DEVICE uint32_t w(int stage) const { return x(stage) + T::kXBytes; }
  DEVICE uint8_t* job_memory(int job) const { return memory + T::kStages * T::kStageBytes + job * T::kJobBytes; }
  DEVICE Job& job(int job) const { return *reinterpret_cast<Job*>(job_memory(job)); }
  DEVICE float* x_scales(int job) const { return reinterpret_cast<float*>(job_memory(job) + sizeof(Job)); }
  DEVICE float* w_scales(int job) const { return x_scales(job) + kTileRows; }
  DEVICE uint32_t barrier(int index) const { return shared_address(job_memory(kJobs)) + index * 8; }
  DEVICE uint32_t full(int stage) const { return barrier(stage); }
  DEVICE uint32_t empty(int stage) const { return barrier(T::kStages + stage); }
  DEVICE uint32_t job_full(int job) const { return barrier(2 * T::kStages + job); }
  DEVICE uint32_t job_empty(int job) const { return barrier(2 * T::kStages + kJobs + job); }
  DEVICE uint32_t lead() const { return barrier(2 * T::kStages + 2 * kJobs); }
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

/// The tiles of the product in the order of work: this block's are those at blockIdx.x / kBlocks, and so on by
/// gridDim.x / kBlocks.
template <class T>
struct Tiles {
  int row_tiles, column_tiles, max_together;  // row tiles of a whole cluster

  DEVICE Tiles(const GemmParams& p, int rows)
      : row_tiles((rows + kTileRows * T::kBlocks - 1) / (kTileRows * T::kBlocks)),
        column_tiles((p.columns + T::kColumns - 1) / T::kColumns),
        max_together(p.row_tiles_together / T::kBlocks) {}
  DEVICE int first() const { return blockIdx.x / T::kBlocks; }
  DEVICE int step() const { return gridDim.x / T::kBlocks; }
  DEVICE int count() const { return row_tiles * column_tiles; }
  DEVICE Tile at(int index) const {
    const int above = index / (max_together * column_tiles) * max_together;
    const int together = min(max_together, row_tiles - above);
    const int inside = index - above * column_tiles;
    const int row = (above + inside % together) * T::kBlocks + (T::kBlocks > 1 ? cluster_rank() : 0);
    return {row * kTileRows, inside / together * T::kColumns};
  }
};

/// Tells of a tile and copies its scales, if there are any.
template <class T>
DEVICE void start_job(const GemmParams& p, const Shared<T>& shared, Ring<kJobs>& ring, Tile tile, int num_rows) {
  mbarrier_wait(shared.job_empty(ring.index), ring.parity ^ 1);
  shared.job(ring.index) = {tile.row, tile.column, num_rows, 0};
  const uint32_t full = shared.job_full(ring.index);
  const uint32_t x_bytes = p.x_scales == nullptr || tile.row >= num_rows ? 0 : kTileRows * 4;
  const uint32_t w_bytes = p.w_scales == nullptr ? 0 : min(T::kColumns, p.w_rows - tile.column) * 4;
  mbarrier_arrive_expect_tx(full, x_bytes + w_bytes);
  if (x_bytes > 0) bulk_copy(shared_address(shared.x_scales(ring.index)), p.x_scales + tile.row, x_bytes, full);
  if (w_bytes > 0) bulk_copy(shared_address(shared.w_scales(ring.index)), p.w_scales + tile.column, w_bytes, full);
  ring.advance();
}

template <class T>
DEVICE void end_jobs(const Shared<T>& shared, const Ring<kJobs>& ring) {
  mbarrier_wait(shared.job_empty(ring.index), ring.parity ^ 1);
  shared.job(ring.index).num_rows = 0;
  mbarrier_arrive(shared.job_full(ring.index));
}

/// Copies one panel of a tile's weights, or this block's half of it to both blocks of the cluster.
template <class T>
DEVICE void copy_weights(uint32_t to, const uint8_t* from, int columns, uint32_t full) {
  if constexpr (T::kBlocks == 1) {
    bulk_copy(to, from, columns * kPanelBytes, full);
  } else {
    constexpr int kShare = T::kColumns / T::kBlocks;
    const int first = cluster_rank() * kShare, count = min(kShare, columns - first);
    if (count <= 0) return;
    const int offset = first * kPanelBytes;
    bulk_copy_multicast(to + offset, from + offset, count * kPanelBytes, full, (1u << T::kBlocks) - 1);
  }
}

/// One thread: keeps the stages full. A block of a pair may have no rows; it copies its share of the weights nevertheless.
template <class T>
DEVICE void produce(const GemmParams& p, const Shared<T>& shared, const Tiles<T>& tiles, int num_rows) {
  Ring<T::kStages> ring;
  Ring<kJobs> jobs;
  for (int index = tiles.first(); index < tiles.count(); index += tiles.step()) {
    const Tile tile = tiles.at(index);
    start_job<T>(p, shared, jobs, tile, num_rows);
    const int columns = min(T::kColumns, p.w_rows - tile.column);
    const uint32_t x_bytes = tile.row < num_rows ? T::kXBytes : 0;
    const uint8_t* x = p.x + size_t(tile.row) * kPanelBytes;
    const uint8_t* w = p.w + size_t(tile.column) * kPanelBytes;
    for (int panel = 0; panel < p.panels; panel++) {
      mbarrier_wait(shared.empty(ring.index), ring.parity ^ 1);
      const uint32_t full = shared.full(ring.index);
      mbarrier_arrive_expect_tx(full, x_bytes + columns * kPanelBytes);
      if (x_bytes > 0) bulk_copy(shared.x(ring.index), x, x_bytes, full);
      copy_weights<T>(shared.w(ring.index), w, columns, full);
      x += size_t(p.x_stride) * kPanelBytes;
      w += size_t(p.w_rows) * kPanelBytes;
      ring.advance();
    }
  }
  end_jobs<T>(shared, jobs);
}

/// One arrival of each warp frees a buffer. What the warp read of it must be done.
DEVICE void release(uint32_t empty) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty);
}

/// Frees a stage in all blocks that copy to it. The first lanes arrive, one at each block.
template <class T>
DEVICE void release_stage(uint32_t empty) {
  if constexpr (T::kBlocks == 1) {
    release(empty);
  } else {
    if (threadIdx.x % 32 < T::kBlocks) mbarrier_arrive_at(empty, threadIdx.x % 32);
  }
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
/// started, so that the tensor cores have work meanwhile. After `announced` panels it arrives at the barrier `lead`.
template <class T>
DEVICE void multiply_stages(const Shared<T>& shared, Ring<T::kStages>& ring, int panels, int consumer, int announced,
                            float (&sums)[T::kColumns / 2]) {
  uint32_t held = 0;
#pragma unroll 1
  for (int panel = 0; panel < panels; panel++) {
    mbarrier_wait(shared.full(ring.index), ring.parity);
    multiply_stage<T>(shared, ring.index, consumer, sums, panel == 0);
    wgmma_wait<1>();
    if (panel > 0) release_stage<T>(held);
    held = shared.empty(ring.index);
    ring.advance();
    if (panel + 1 == announced) release(shared.lead());
  }
  wgmma_wait<0>();
  pin_registers(sums);
  release_stage<T>(held);
}

/// The sums of one tile.
template <class T>
DEVICE void multiply_tile(const GemmParams& p, const Shared<T>& shared, Ring<T::kStages>& ring, int consumer,
                          float (&sums)[T::kColumns / 2]) {
  int announced = consumer == 0 ? p.lead_panels : 0;
  if constexpr (T::Operand::kPromotes) {
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; i++) sums[i] = 0.0f;
    for (int left = p.panels; left > 0; left -= kPromoteEvery) {
      float part[T::kColumns / 2];
      multiply_stages<T>(shared, ring, min(left, kPromoteEvery), consumer, announced, part);
      announced = 0;
#pragma unroll
      for (int i = 0; i < T::kColumns / 2; i++) sums[i] += part[i];
    }
  } else {
    multiply_stages<T>(shared, ring, p.panels, consumer, announced, sums);
  }
}

/// The same pace without products, for 64 rows beyond the last token.
template <class T>
DEVICE void skip_tile(const Shared<T>& shared, Ring<T::kStages>& ring, int panels) {
  for (int panel = 0; panel < panels; panel++) {
    mbarrier_wait(shared.full(ring.index), ring.parity);
    __syncwarp();
    release_stage<T>(shared.empty(ring.index));
    ring.advance();
  }
}

/// Scales and stores the sums of the calling warp.
template <class T>
DEVICE void store_tile(const typename T::Params& p, const Shared<T>& shared, int slot, const float (&sums)[T::kColumns / 2]) {
  const Job& job = shared.job(slot);
  const int inside = (threadIdx.x / 32 - 4) * 16;
  const SumsTarget to{job.row + inside, job.column, job.num_rows,
                      shared.x_scales(slot) + inside, shared.w_scales(slot)};
  store_warp_sums<typename T::Out, T::kColumns>(p, to, sums);
}

/// A warpgroup: multiplies and stores its 64 rows of every tile. The second begins a tile some panels after the first:
/// while one adds to its full sums or stores a tile, the tensor cores have work of the other.
/// It keeps little in registers besides sums: what it must know of a tile it reads again. The shuffles tell the compiler
/// that all lanes agree, without which it does not let wgmma run ahead.
template <class T>
DEVICE void consume(const typename T::Params& p, const Shared<T>& shared) {
  const int consumer = __shfl_sync(~0u, int(threadIdx.x) / 128 - 1, 0);
  Ring<T::kStages> ring;
  Ring<1> lead;
  for (Ring<kJobs> jobs;; jobs.advance()) {
    mbarrier_wait(shared.job_full(jobs.index), jobs.parity);
    const int num_rows = __shfl_sync(~0u, shared.job(jobs.index).num_rows, 0);
    if (num_rows == 0) break;
    const int row = __shfl_sync(~0u, shared.job(jobs.index).row, 0);
    if (row + consumer * kConsumerRows < num_rows) {
      if (consumer > 0 && p.lead_panels > 0) mbarrier_wait(shared.lead(), lead.parity);
      float sums[T::kColumns / 2];
      multiply_tile<T>(p, shared, ring, consumer, sums);
      store_tile<T>(p, shared, jobs.index, sums);
    } else {
      skip_tile<T>(shared, ring, p.panels);
    }
    if (row < num_rows) lead.advance();
    __syncwarp();
    release(shared.job_empty(jobs.index));
  }
}

/// Waits for all threads of the block or of its cluster.
template <class T>
DEVICE void sync_blocks() {
  if constexpr (T::kBlocks == 1) __syncthreads();
  else cluster_sync();
}

template <class T>
DEVICE void prepare(const GemmParams& p, const Shared<T>& shared) {
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; stage++) {
      mbarrier_init(shared.full(stage), 1);
      mbarrier_init(shared.empty(stage), kConsumerWarps * T::kBlocks);
    }
    for (int job = 0; job < kJobs; job++) {
      mbarrier_init(shared.job_full(job), 1);
      mbarrier_init(shared.job_empty(job), kConsumerWarps);
    }
    mbarrier_init(shared.lead(), kConsumerWarps / 2);
    fence_mbarrier_init();
  }
  // Scales that are not copied are 1.
  for (int i = threadIdx.x; i < kJobs * kTileRows && p.x_scales == nullptr; i += kThreads) {
    shared.x_scales(i / kTileRows)[i % kTileRows] = 1.0f;
  }
  for (int i = threadIdx.x; i < kJobs * T::kColumns && p.w_scales == nullptr; i += kThreads) {
    shared.w_scales(i / T::kColumns)[i % T::kColumns] = 1.0f;
  }
  sync_blocks<T>();
}

template <class T>
DEVICE void gemm(const typename T::Params& p, uint8_t* memory) {
  let_next_kernel_start();
  const Shared<T> shared{memory};
  prepare<T>(p, shared);
  wait_for_previous_kernels();
  if (threadIdx.x < 128) {
    decrease_registers<T::kProducerRegisters>();
    const int num_rows = *p.num_rows;
    if (threadIdx.x == 0) produce<T>(p, shared, Tiles<T>(p, num_rows), num_rows);
  } else {
    increase_registers<T::kConsumerRegisters>();
    consume<T>(p, shared);
  }
  // A block must not end while another may copy to it or arrive at its barriers.
  if constexpr (T::kBlocks > 1) sync_blocks<T>();
}

}  // namespace

#define GEMM(name, Operand, Out, Columns, Stages)              \
  KERNEL(name, ParamsFor<Out>::Type, kThreads, 1) {            \
    DYNAMIC_SHARED(memory);                                    \
    gemm<Tiling<Operand, Out, Columns, Stages, 1>>(p, memory); \
  }
#define GEMM_PAIR(name, Operand, Out, Columns, Stages)         \
  CLUSTER_KERNEL(name, ParamsFor<Out>::Type, kThreads, 2) {    \
    DYNAMIC_SHARED(memory);                                    \
    gemm<Tiling<Operand, Out, Columns, Stages, 2>>(p, memory); \
  }

GEMM(gemm_e4m3_n64, E4m3, bf16, 64, 8)
GEMM(gemm_e4m3_n96, E4m3, bf16, 96, 7)
GEMM(gemm_e4m3_n112, E4m3, bf16, 112, 7)
GEMM(gemm_e4m3_n128, E4m3, bf16, 128, 6)
GEMM(gemm_e4m3_n160, E4m3, bf16, 160, 6)
GEMM(gemm_e4m3_n192, E4m3, bf16, 192, 5)
GEMM(gemm_e4m3_n224, E4m3, bf16, 224, 5)
GEMM(gemm_e4m3_f32_n128, E4m3, float, 128, 6)
GEMM(gemm_e4m3_f32_n192, E4m3, float, 192, 5)
GEMM(gemm_bf16_n64, Bf16, bf16, 64, 8)
GEMM(gemm_bf16_n128, Bf16, bf16, 128, 6)
GEMM(gemm_bf16_n192, Bf16, bf16, 192, 5)
GEMM(gemm_bf16_n256, Bf16, bf16, 256, 4)
GEMM(gemm_bf16_f32_n128, Bf16, float, 128, 6)
GEMM(gemm_bf16_f32_n256, Bf16, float, 256, 4)
GEMM_PAIR(gemm_pair_e4m3_n112, E4m3, bf16, 112, 7)
GEMM_PAIR(gemm_pair_e4m3_n128, E4m3, bf16, 128, 6)
GEMM_PAIR(gemm_pair_e4m3_n160, E4m3, bf16, 160, 6)
GEMM_PAIR(gemm_pair_e4m3_n192, E4m3, bf16, 192, 5)
GEMM_PAIR(gemm_pair_bf16_n128, Bf16, bf16, 128, 6)
GEMM_PAIR(gemm_pair_bf16_n192, Bf16, bf16, 192, 5)
GEMM_PAIR(gemm_pair_bf16_n256, Bf16, bf16, 256, 4)
GEMM(gemm_gated_e4m3_n160, E4m3, Gated, 160, 6)
GEMM(gemm_gated_e4m3_n192, E4m3, Gated, 192, 5)
GEMM(gemm_gated_e4m3_n224, E4m3, Gated, 224, 5)
GEMM_PAIR(gemm_gated_pair_e4m3_n160, E4m3, Gated, 160, 6)
GEMM_PAIR(gemm_gated_pair_e4m3_n192, E4m3, Gated, 192, 5)
