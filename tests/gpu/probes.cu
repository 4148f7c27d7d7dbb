// Three questions about a Hopper GPU that decide how the kernels are built. Stand-alone: the runtime's API, our headers.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -Ikernels -o probes tests/gpu/probes.cu && ./probes
//
// P0 How fast can memory be read: blocks x bytes in flight a block, by bulk copies of contiguous pieces.
// P1 What does the border between two kernels of a graph cost, with and without programmatic dependent launch.
// P2 Do wgmma's results depend on the role of the operands and on N; where does its FP8 accumulator round.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/layout.cuh"
#include "common/wgmma.cuh"

#define CHECK(call)                                                                  \
  do {                                                                               \
    const cudaError_t error = (call);                                                \
    if (error != cudaSuccess) {                                                      \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error));      \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

struct ReadParams {
  const uint8_t* data;
  size_t bytes_per_block;
  int piece, stages;
};

KERNEL(probe_read, ReadParams, 32, 1) {
#ifdef __CUDA_ARCH__
  DYNAMIC_SHARED(memory);
  const uint32_t base = shared_address(memory), barriers = base + p.piece * p.stages;
  if (threadIdx.x != 0) return;
  for (int i = 0; i < p.stages; i++) mbarrier_init(barriers + 8 * i, 1);
  fence_mbarrier_init();
  const uint8_t* from = p.data + blockIdx.x * p.bytes_per_block;
  const int pieces = int(p.bytes_per_block / p.piece);
  auto issue = [&](int i) {
    const uint32_t barrier = barriers + 8 * (i % p.stages);
    mbarrier_arrive_expect_tx(barrier, p.piece);
    bulk_copy_evict_first(base + p.piece * (i % p.stages), from + size_t(i) * p.piece, p.piece, barrier);
  };
  for (int i = 0; i < min(p.stages, pieces); i++) issue(i);
  for (int i = 0; i < pieces; i++) {
    mbarrier_wait(barriers + 8 * (i % p.stages), (i / p.stages) & 1);
    if (i + p.stages < pieces) issue(i + p.stages);
  }
#endif
}

struct EmptyParams {
  int* nothing;
};
KERNEL(probe_empty, EmptyParams, 128, 1) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  if (p.nothing != nullptr) *p.nothing = 1;
}

struct BitsParams {
  const uint8_t* a;  // [256 rows][128 bytes], swizzled
  float* normal;     // [64][256]: rows of a as A, all 256 rows as B
  float* swapped;    // [64][8] for each of 8 groups: the same rows as B (n 8), rows 0..63 of the second operand as A
};
#ifdef __CUDA_ARCH__
template <int N>
DEVICE void multiply(float (&d)[N / 2], uint32_t a, uint32_t b) {
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    wgmma_e4m3<N>(d, operand_descriptor(a) + k * kDescriptorStep, operand_descriptor(b) + k * kDescriptorStep, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(d);
}
#endif
KERNEL(probe_bits, BitsParams, 128, 1) {
#ifdef __CUDA_ARCH__
  DYNAMIC_SHARED(memory);
  for (int i = threadIdx.x; i < 256 * 128 / 16; i += 128) {
    reinterpret_cast<uint4*>(memory)[i] = reinterpret_cast<const uint4*>(p.a)[i];
  }
  fence_proxy_async();
  __syncthreads();
  const uint32_t base = shared_address(memory);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  float wide[128];
  multiply<256>(wide, base, base);
  for (int i = 0; i < 128; i++) p.normal[(row + 8 * (i / 2 % 2)) * 256 + i / 4 * 8 + col + i % 2] = wide[i];
  for (int group = 0; group < 8; group++) {
    float narrow[4];
    multiply<8>(narrow, base, base + group * 1024);
    for (int i = 0; i < 4; i++) p.swapped[(row + 8 * (i / 2)) * 64 + group * 8 + col + i % 2] = narrow[i];
  }
#endif
}

static float milliseconds(cudaGraphExec_t graph, cudaStream_t stream, int repeats) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < repeats; i++) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(graph, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float elapsed;
    CHECK(cudaEventElapsedTime(&elapsed, start, end));
    best = elapsed < best ? elapsed : best;
  }
  return best;
}

template <class Launch>
static cudaGraphExec_t record(cudaStream_t stream, Launch launch) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  return executable;
}

static void launch(const void* kernel, int blocks, int threads, int shared, cudaStream_t stream, void* params, bool dependent) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent;
  CHECK(cudaLaunchKernelExC(&config, kernel, &params));
}

static void read_rates(cudaStream_t stream) {
  const size_t total = size_t(1) << 30;
  uint8_t* data;
  CHECK(cudaMalloc(&data, total));
  std::vector<uint32_t> noise(total / 4);
  uint32_t state = 1;
  for (auto& word : noise) word = state = state * 1664525u + 1013904223u;
  CHECK(cudaMemcpy(data, noise.data(), total, cudaMemcpyHostToDevice));
  CHECK(cudaFuncSetAttribute((const void*)probe_read, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10));
  std::printf("P0 read: blocks, piece, in flight a block: GB/s over 1 GiB (100 MiB cold pieces of it)\n");
  for (int blocks : {72, 96, 112, 128, 132, 264}) {
    for (int piece : {4096, 8192, 16384}) {
      for (int flight : {32 << 10, 64 << 10, 96 << 10, 192 << 10}) {
        if (blocks == 264 && flight > (96 << 10)) continue;
        auto time = [&](size_t bytes, int launches) {
          ReadParams params = {data, bytes / blocks / piece * piece, piece, flight / piece};
          auto graph = record(stream, [&] {
            for (int i = 0; i < launches; i++) {
              params.data = data + size_t(i) * bytes;
              launch((const void*)probe_read, blocks, 32, flight + 8 * params.stages, stream, &params, false);
            }
          });
          const double read = double(params.bytes_per_block) * blocks * launches;
          const double rate = read / milliseconds(graph, stream, 5) / 1e6;
          CHECK(cudaGraphExecDestroy(graph));
          return rate;
        };
        if (piece != 8192 && flight != (96 << 10)) continue;
        std::printf("  %3d %5d %6d: %6.0f (%.0f)\n", blocks, piece, flight, time(total, 1), time(100 << 20, 10));
      }
    }
  }
  CHECK(cudaFree(data));
}

static void border_costs(cudaStream_t stream) {
  for (bool dependent : {false, true}) {
    for (int blocks : {1, 128}) {
      EmptyParams params = {nullptr};
      auto graph = record(stream, [&] {
        for (int i = 0; i < 400; i++) launch((const void*)probe_empty, blocks, 128, 0, stream, &params, dependent);
      });
      std::printf("P1 %s, %3d blocks: %.2f us a kernel\n", dependent ? "dependent launch" : "plain           ", blocks,
                  milliseconds(graph, stream, 20) * 1e3 / 400);
    }
  }
}

static void compare_bits(cudaStream_t stream) {
  std::vector<uint8_t> natural(256 * 128), packed(256 * 128);
  uint32_t state = 7;
  for (auto& byte : natural) {
    state = state * 1664525u + 1013904223u;
    byte = uint8_t((state >> 24) % 127 + (state & 128));
  }
  for (int row = 0; row < 256; row++) {
    for (int k = 0; k < 128; k++) packed[row * 128 + ((k / 16) ^ (row & 7)) * 16 + k % 16] = natural[row * 128 + k];
  }
  uint8_t* a;
  float *normal, *swapped;
  CHECK(cudaMalloc(&a, packed.size()));
  CHECK(cudaMalloc(&normal, 64 * 256 * 4));
  CHECK(cudaMalloc(&swapped, 64 * 64 * 4));
  CHECK(cudaMemcpy(a, packed.data(), packed.size(), cudaMemcpyHostToDevice));
  BitsParams params = {a, normal, swapped};
  launch((const void*)probe_bits, 1, 128, 32768, stream, &params, false);
  std::vector<float> n(64 * 256), s(64 * 64);
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaMemcpy(n.data(), normal, n.size() * 4, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(s.data(), swapped, s.size() * 4, cudaMemcpyDeviceToHost));
  auto value = [](uint8_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    const double magnitude = e ? (8 + m) * std::pow(2.0, e - 10) : m * std::pow(2.0, -9);
    return code & 128 ? -magnitude : magnitude;
  };
  double worst = 0;
  int by_role = 0, by_width = 0;
  for (int i = 0; i < 64; i++) {
    for (int j = 0; j < 256; j++) {
      double sum = 0, size = 0;
      for (int k = 0; k < 128; k++) {
        const double product = value(natural[i * 128 + k]) * value(natural[j * 128 + k]);
        sum += product, size += std::fabs(product);
      }
      worst = std::fmax(worst, std::fabs(n[i * 256 + j] - sum) / size);
      if (j < 64) by_role += n[i * 256 + j] != n[j * 256 + i], by_width += n[i * 256 + j] != s[i * 64 + j];
    }
  }
  std::printf("P2 layout confirmed: largest error %.1e of the absolute sum; results that change with the operands' roles: %d, "
              "with N (8 or 256): %d of 4096\n", worst, by_role, by_width);
}

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("# %s, %d multiprocessors, L2 %d MiB\n", properties.name, properties.multiProcessorCount, properties.l2CacheSize >> 20);
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  compare_bits(stream);
  border_costs(stream);
  read_rates(stream);
  return 0;
}
