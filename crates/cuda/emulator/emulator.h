// Runs the kernels of this project on the CPU: each CUDA thread is a fiber, the blocks of a grid (or its clusters of blocks)
// run one after another.
//
// It is for tests: it proves arithmetic, indexing, barriers and layouts, not speed. Asynchronous work is truly late here:
// a bulk copy lands at some later switch of fibers, a wgmma when its group is waited for, so that a kernel that forgets
// to wait reads stale bytes. What it cannot show: missing proxy fences, races that need true parallelism, registers.
//
// Layout rules (swizzles, descriptors, fragments) follow the PTX ISA and are confirmed on a GPU by the device tests.
#pragma once

#if !defined(__x86_64__)
#error "the kernel emulator switches stacks in x86-64 assembly"
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static thread_local

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

[[noreturn]] void fail(const char* what);

/// Lets other threads of the block run. A block whose threads all wait for ever is reported and aborts.
void yield();
/// Something happened that a waiting thread may have waited for.
void progress();
/// The calling thread's index in its block.
inline unsigned thread() { return threadIdx.x; }
/// Threads of the calling thread's warp.
unsigned warp_size();
void arrive_and_wait_warp();
void arrive_and_wait_named(int barrier, int threads);
void arrive_named(int barrier, int threads);
void block_barrier();

/// 32 slots of 64 bytes that the lanes of a warp exchange values through: each writes its own, waits for the warp, and reads.
struct Slot {
  alignas(8) uint8_t bytes[64];
};
/// Those of the calling thread's next exchange. Two take turns: whoever writes to one again has waited for the warp in
/// between, and so for those who read from it.
Slot* warp_slots();

uint8_t* shared_memory();
/// Address in the shared window, never 0, with the alignment the kernel's dynamic shared memory has.
uint32_t shared_address(const void* p);
uint8_t* shared_pointer(uint32_t address, size_t bytes);

/// The calling thread's block among those of its cluster, and how many they are.
unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier();
/// Shared memory of block `rank` of the cluster, which must not have ended.
uint8_t* shared_pointer_of(unsigned rank, uint32_t address, size_t bytes);

/// Runs at some later switch of fibers.
void later(std::function<void()> work);

/// wgmma: work of the calling thread that runs when its group is waited for.
void wgmma_issue(std::function<void()> work);
void wgmma_commit();
void wgmma_wait(int pending);

/// cp.async of the calling thread.
void cp_async_issue(std::function<void()> work);
void cp_async_commit();
void cp_async_wait(int pending);

struct Registration {
  Registration(const char* name, size_t params_bytes, unsigned threads, void (*body)(const void*), unsigned cluster = 1);
};

template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(Slot), "a slot is 64 bytes");
  Slot* slots = warp_slots();
  std::memcpy(slots[thread() % 32].bytes, &value, sizeof value);
  arrive_and_wait_warp();
  T result;
  std::memcpy(&result, slots[source % 32].bytes, sizeof result);
  return result;
}

float e4m3_to_float(uint8_t code);
uint8_t float_to_e4m3(float value);

inline float bf16_bits_to_float(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float f16_bits_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline uint16_t float_to_f16_bits(float value) {
  const _Float16 rounded = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint16_t float_to_bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

/// The byte address that a 128-byte (or 64-, 32-byte) swizzle maps `address` to.
inline uint32_t swizzle(uint32_t address, uint32_t mode) {
  switch (mode) {
    case 1:
      return address ^ (((address >> 7) & 7) << 4);
    case 2:
      return address ^ (((address >> 7) & 3) << 4);
    case 3:
      return address ^ (((address >> 7) & 1) << 4);
    default:
      return address;
  }
}

/// Byte address of row `row`, byte `k` (0..31) of a K-major operand.
inline uint32_t operand_address(uint64_t descriptor, uint32_t row, uint32_t k) {
  const uint32_t mode = uint32_t(descriptor >> 62);
  const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
  const uint32_t leading = uint32_t((descriptor >> 16) & 0x3FFF) << 4;
  const uint32_t stride = uint32_t((descriptor >> 32) & 0x3FFF) << 4;
  switch (mode) {
    case 0:  // 8x16-byte core matrices
      return start + (row / 8) * stride + (k / 16) * leading + (row % 8) * 16 + k % 16;
    case 1:
      return swizzle(start + (row / 8) * stride + (row % 8) * 128 + k, mode);
    case 2:
      return swizzle(start + (row / 8) * stride + (row % 8) * 64 + k, mode);
    default:
      return swizzle(start + (row / 8) * stride + (row % 8) * 32 + k, mode);
  }
}

inline void read_operand(uint64_t descriptor, uint32_t row, uint8_t (&bytes)[32]) {
  for (uint32_t chunk = 0; chunk < 32; chunk += 16) {
    const uint32_t address = operand_address(descriptor, row, chunk);
    std::memcpy(bytes + chunk, shared_pointer(address, 16), 16);
  }
}

struct E4m3Operand {
  static constexpr int kElements = 32;
  static constexpr int kMinExponent = -6;
  static constexpr int kFractionBits = 13, kKeptBits = 13;
  static float element(uint32_t word, int index) { return e4m3_to_float(uint8_t(word >> (8 * index))); }
  static void widen(const uint8_t (&bytes)[32], float (&out)[32]) {
    for (int i = 0; i < 32; i++) out[i] = e4m3_to_float(bytes[i]);
  }
};
struct F16Operand {
  static constexpr int kElements = 16;
  static constexpr int kMinExponent = -14;
  static constexpr int kFractionBits = 25, kKeptBits = 23;
  static float element(uint32_t word, int index) { return f16_bits_to_float(uint16_t(word >> (16 * index))); }
};
struct Bf16Operand {
  static constexpr int kElements = 16;
  static constexpr int kMinExponent = -126;
  static constexpr int kFractionBits = 25, kKeptBits = 23;
  static float element(uint32_t word, int index) { return bf16_bits_to_float(uint16_t(word >> (16 * index))); }
  static void widen(const uint8_t (&bytes)[32], float (&out)[16]) {
    for (int i = 0; i < 16; i++) {
      uint16_t bits;
      std::memcpy(&bits, bytes + 2 * i, 2);
      out[i] = bf16_bits_to_float(bits);
    }
  }
};

inline int exponent(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return int(bits >> 23 & 255) - 127;
}
inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

/// What one side brings to the products of an instruction.
template <class Operand>
struct Factors {
  float values[Operand::kElements];
  /// Of numbers below the least normal one: its.
  int exponents[Operand::kElements];

  void set(int k, float value) {
    values[k] = value;
    exponents[k] = std::max(exponent(value), Operand::kMinExponent);
  }
  void set_exponents() {
    for (int k = 0; k < Operand::kElements; k++) set(k, values[k]);
  }
};

/// `c` and the products of one instruction, added as Hopper's tensor cores add: all are aligned to the largest exponent (a
/// product's is the sum of its factors'), cut off kFractionBits below it, and the sum is cut to kKeptBits. Found by comparing
/// with an H200, to the bit: wgmma of both types, mma.sync of 16 bits. That mma.sync of e4m3 does the same on other devices is
/// taken for granted.
template <class Operand>
float add_products(float c, const Factors<Operand>& a, const Factors<Operand>& b) {
  constexpr int K = Operand::kElements, kNone = -1000;
  float products[K], check = c;
  int top = c == 0 ? kNone : exponent(c);
  for (int k = 0; k < K; k++) {
    products[k] = a.values[k] * b.values[k];
    check += products[k];
    top = std::max(top, products[k] == 0 ? kNone : a.exponents[k] + b.exponents[k]);
  }
  if (!std::isfinite(check)) return check;
  if (top == kNone) return 0;
  const double unit = power_of_two(top - Operand::kFractionBits), units = power_of_two(Operand::kFractionBits - top);
  int64_t sum = int32_t(c * units);
  for (int k = 0; k < K; k++) sum += int32_t(products[k] * units);
  const int bits = 64 - __builtin_clzll(uint64_t(std::abs(sum)) | 1), extra = std::max(bits - Operand::kKeptBits - 1, 0);
  return float(double(std::abs(sum) >> extra << extra) * (sum < 0 ? -unit : unit));
}

/// The calling thread's share of D[64][N] (+)= A[64][K] * B[N][K]^T, both operands K-major in shared memory.
template <class Operand, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  const unsigned t = thread() % 128;
  float* out = d;
  wgmma_issue([=] {
    const uint32_t row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    uint8_t bytes[32];
    Factors<Operand> lhs[2], rhs;
    for (int half = 0; half < 2; half++) {
      read_operand(a, row + 8 * half, bytes);
      Operand::widen(bytes, lhs[half].values);
      lhs[half].set_exponents();
    }
    for (int j = 0; j < N / 8; j++) {
      for (int c = 0; c < 2; c++) {
        read_operand(b, j * 8 + col + c, bytes);
        Operand::widen(bytes, rhs.values);
        rhs.set_exponents();
        for (int half = 0; half < 2; half++) {
          float& to = out[j * 4 + half * 2 + c];
          to = add_products(accumulate ? to : 0.0f, lhs[half], rhs);
        }
      }
    }
  });
}

/// The calling thread's share of D[64][N] += A[64][16] * B[16][N] in bf16: A in registers, B with N contiguous.
template <int N>
void wgmma_transposed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  const unsigned lane = thread() % 32;
  Slot* slots = warp_slots();
  std::memcpy(slots[lane].bytes, a, sizeof a);
  arrive_and_wait_warp();
  struct Rows {
    Factors<Bf16Operand> of_half[2];
  } rows;
  for (unsigned k = 0; k < 16; k++) {
    uint32_t words[4];
    std::memcpy(words, slots[lane / 4 * 4 + k % 8 / 2].bytes, sizeof words);
    for (unsigned half = 0; half < 2; half++) {
      rows.of_half[half].set(int(k), bf16_bits_to_float(uint16_t(words[half + k / 8 * 2] >> (16 * (k % 2)))));
    }
  }
  float* out = d;
  wgmma_issue([=] {
    const uint32_t start = uint32_t(b & 0x3FFF) << 4;
    const uint32_t leading = uint32_t((b >> 16) & 0x3FFF) << 4, stride = uint32_t((b >> 32) & 0x3FFF) << 4;
    if (b >> 62 != 1) fail("a transposed operand without the 128-byte swizzle");
    for (uint32_t i = 0; i < N / 2; i++) {
      const uint32_t col = i / 4 * 8 + lane % 4 * 2 + i % 2;
      Factors<Bf16Operand> column;
      for (uint32_t k = 0; k < 16; k++) {
        const uint32_t address = start + col / 64 * leading + k / 8 * stride + k % 8 * 128 + col % 64 * 2;
        uint16_t bits;
        std::memcpy(&bits, shared_pointer(swizzle(address, 1), 2), 2);
        column.set(int(k), bf16_bits_to_float(bits));
      }
      out[i] = add_products(out[i], rows.of_half[i / 2 % 2], column);
    }
  });
}

/// mma.sync m16n8: `regs` of every lane are known to all lanes of the warp.
template <class Operand>
void mma_sync(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  Slot* slots = warp_slots();
  const unsigned lane = thread() % 32;
  Fragments mine;
  std::memcpy(mine.a, a, 16);
  std::memcpy(mine.b, b, 8);
  std::memcpy(slots[lane].bytes, &mine, sizeof mine);
  arrive_and_wait_warp();
  constexpr int K = Operand::kElements;
  constexpr int kHalf = K / 2;  // elements of a row that registers 0, 1 (low half) and 2, 3 (high half) hold
  constexpr int kPerRegister = K / 8;  // 4 of 8 bits or 2 of 16
  auto a_at = [&](int row, int k) {
    Fragments f;
    const int owner = row % 8 * 4 + k % kHalf / kPerRegister;
    std::memcpy(&f, slots[owner].bytes, sizeof f);
    return Operand::element(f.a[(row / 8) + 2 * (k / kHalf)], k % kPerRegister);
  };
  auto b_at = [&](int col, int k) {
    Fragments f;
    const int owner = col * 4 + k % kHalf / kPerRegister;
    std::memcpy(&f, slots[owner].bytes, sizeof f);
    return Operand::element(f.b[k / kHalf], k % kPerRegister);
  };
  float result[4];
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
    Factors<Operand> lhs, rhs;
    for (int k = 0; k < K; k++) lhs.set(k, a_at(row, k)), rhs.set(k, b_at(col, k));
    result[i] = add_products(c[i], lhs, rhs);
  }
  std::memcpy(d, result, sizeof result);
}

template <int Count, bool Transposed>
void ldmatrix(uint32_t (&d)[Count], uint32_t address) {
  const unsigned lane = thread() % 32;
  Slot* slots = warp_slots();
  std::memcpy(slots[lane].bytes, &address, 4);
  arrive_and_wait_warp();
  uint32_t result[Count];
  for (int m = 0; m < Count; m++) {
    auto element = [&](unsigned row, unsigned col) {
      uint32_t row_address;
      std::memcpy(&row_address, slots[m * 8 + row].bytes, 4);
      uint16_t value;
      std::memcpy(&value, shared_pointer(row_address, 16) + 2 * col, 2);
      return uint32_t(value);
    };
    const unsigned r = lane / 4, c = lane % 4 * 2;
    result[m] = Transposed ? element(c, r) | element(c + 1, r) << 16 : element(r, c) | element(r, c + 1) << 16;
  }
  arrive_and_wait_warp();
  std::memcpy(d, result, sizeof result);
}

inline uint32_t transposed(uint32_t pair) {
  const unsigned lane = thread() % 32;
  Slot* slots = warp_slots();
  std::memcpy(slots[lane].bytes, &pair, 4);
  arrive_and_wait_warp();
  // Row and column of what the lane gets are column and row of what there is.
  auto at = [&](unsigned row, unsigned column) {
    uint16_t value;
    std::memcpy(&value, slots[row * 4 + column / 2].bytes + column % 2 * 2, 2);
    return uint32_t(value);
  };
  const unsigned row = lane / 4, column = lane % 4 * 2;
  return at(column, row) | at(column + 1, row) << 16;
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::arrive_and_wait_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulator::exchange(value, (emulator::thread() % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source, int = 32) {
  return emulator::exchange(value, source);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta, int = 32) {
  const unsigned lane = emulator::thread() % 32;
  return emulator::exchange(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta, int = 32) {
  const unsigned lane = emulator::thread() % 32;
  return emulator::exchange(value, int(lane) >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned result = 0;
  const unsigned lane = emulator::thread() % 32;
  emulator::Slot* slots = emulator::warp_slots();
  slots[lane].bytes[0] = predicate;
  emulator::arrive_and_wait_warp();
  for (unsigned i = 0; i < emulator::warp_size(); i++) result |= unsigned(slots[i].bytes[0] != 0) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
template <class T>
T atomicAdd(T* p, T value) {
  T old = *p;
  *p = T(old + value);
  return old;
}
inline unsigned atomicAdd(unsigned* p, int value) { return atomicAdd(p, unsigned(value)); }
template <class T>
T atomicMax(T* p, T value) {
  T old = *p;
  *p = std::max(old, value);
  return old;
}
template <class T>
T atomicExch(T* p, T value) {
  T old = *p;
  *p = value;
  return old;
}
inline void __threadfence() {}
using std::max;
using std::min;
