// Every instruction that CUDA C++ has no name for, once as PTX for nvcc and once as C++ for the emulator. Inline PTX
// stands in this file and in wgmma.cuh (its wide instructions) and nowhere else.
#pragma once

#include <stdint.h>

#ifdef LAPIDARY_EMULATOR

#include "emulator.h"

#define KERNEL(name, Params, threads, min_blocks)                                                                    \
  static void name##_kernel(const Params& p);                                                                        \
  static emulator::Registration name##_registration(                                                                 \
      #name, sizeof(Params), threads, [](const void* q) { name##_kernel(*static_cast<const Params*>(q)); });          \
  static void name##_kernel(const Params& p)
#define CLUSTER_KERNEL(name, Params, threads, cluster)                                                               \
  static void name##_kernel(const Params& p);                                                                        \
  static emulator::Registration name##_registration(                                                                 \
      #name, sizeof(Params), threads, [](const void* q) { name##_kernel(*static_cast<const Params*>(q)); }, cluster); \
  static void name##_kernel(const Params& p)
#define DYNAMIC_SHARED(name) uint8_t* const name = emulator::shared_memory()
#define DEVICE inline

DEVICE uint32_t shared_address(const void* p) { return emulator::shared_address(p); }

// ---- numbers
DEVICE uint32_t bf16x2_from_floats(float low, float high) {
  return uint32_t(emulator::float_to_bf16_bits(low)) | uint32_t(emulator::float_to_bf16_bits(high)) << 16;
}
DEVICE uint16_t e4m3x2_from_floats(float low, float high) {
  return uint16_t(emulator::float_to_e4m3(low) | emulator::float_to_e4m3(high) << 8);
}
DEVICE float float_from_e4m3(uint8_t code) { return emulator::e4m3_to_float(code); }
DEVICE uint32_t f16x2_from_floats(float low, float high) {
  return uint32_t(emulator::float_to_f16_bits(low)) | uint32_t(emulator::float_to_f16_bits(high)) << 16;
}
DEVICE float low_half(uint32_t f16x2) { return emulator::f16_bits_to_float(uint16_t(f16x2)); }
DEVICE float high_half(uint32_t f16x2) { return emulator::f16_bits_to_float(uint16_t(f16x2 >> 16)); }
DEVICE void f16x2_from_e4m3x4(uint32_t codes, uint32_t& low, uint32_t& high) {
  auto value = [=](int index) { return emulator::e4m3_to_float(uint8_t(codes >> (8 * index))); };
  low = f16x2_from_floats(value(0), value(1));
  high = f16x2_from_floats(value(2), value(3));
}
DEVICE uint32_t odd_bytes_last(uint32_t x) {
  return (x & 0xff0000ffu) | (x >> 8 & 0xff00u) | (x << 8 & 0xff0000u);
}
DEVICE float exp2_approx(float x) { return std::exp2(x); }
DEVICE float log2_approx(float x) { return std::log2(x); }
DEVICE float reciprocal_approx(float x) { return 1.0f / x; }
DEVICE unsigned long long multiply_high(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)(a) * b) >> 64);
}

// ---- memory
DEVICE uint4 load_streaming(const uint4* p) { return *p; }
DEVICE unsigned load_acquire(const unsigned* p) { return *p; }
DEVICE unsigned atomic_add_acq_rel(unsigned* p, unsigned value) { return atomicAdd(p, value); }
DEVICE uint4 load_l2(const uint4* p) { return *p; }
DEVICE float load_l2(const float* p) { return *p; }
template <class T>
DEVICE T load_l2(const T* p) {
  return *p;
}
DEVICE void cp_async_16(uint32_t to, const void* from, bool valid) {
  emulator::cp_async_issue([=] {
    uint8_t* target = emulator::shared_pointer(to, 16);
    if (valid) std::memcpy(target, from, 16);
    else std::memset(target, 0, 16);
  });
}
DEVICE void store_zeros_16(uint32_t to) { std::memset(emulator::shared_pointer(to, 16), 0, 16); }
DEVICE uint2 load_shared_8(uint32_t from) {
  uint2 value;
  std::memcpy(&value, emulator::shared_pointer(from, 8), 8);
  return value;
}
DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int Pending>
DEVICE void cp_async_wait() {
  emulator::cp_async_wait(Pending);
}

// ---- barriers
namespace emulator {
/// phase, arrivals still missing, arrivals of a phase, bytes still missing
struct Mbarrier {
  int64_t bytes : 32, count : 15, missing : 15, phase : 2;
};
inline Mbarrier& mbarrier(uint32_t address, unsigned rank = cluster_rank()) {
  return *reinterpret_cast<Mbarrier*>(shared_pointer_of(rank, address, 8));
}
inline void mbarrier_step(Mbarrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.missing = barrier.count;
  }
  progress();
}
}  // namespace emulator
DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  if (barrier % 8 != 0) emulator::fail("misaligned mbarrier");
  emulator::mbarrier(barrier) = {0, int64_t(count), int64_t(count), 0};
}
DEVICE void mbarrier_arrive_at(uint32_t barrier, unsigned rank) {
  auto& b = emulator::mbarrier(barrier, rank);
  if (b.missing == 0) emulator::fail("more arrivals than the mbarrier was made for");
  b.missing = b.missing - 1;
  emulator::mbarrier_step(b);
}
DEVICE void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_at(barrier, emulator::cluster_rank()); }
DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  emulator::mbarrier(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
DEVICE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) { emulator::mbarrier(barrier).bytes += bytes; }
/// Waits until the phase of this parity is over.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while ((uint32_t(emulator::mbarrier(barrier).phase) & 1) == parity) emulator::yield();
}
DEVICE void fence_mbarrier_init() {}
DEVICE void fence_proxy_async() {}
DEVICE void named_barrier_sync(int barrier, int threads) { emulator::arrive_and_wait_named(barrier, threads); }
DEVICE void named_barrier_arrive(int barrier, int threads) { emulator::arrive_named(barrier, threads); }

namespace emulator {
inline void bulk_copy_to(unsigned rank, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 != 0 || to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("misaligned bulk copy");
  later([=] {
    std::memcpy(shared_pointer_of(rank, to, bytes), from, bytes);
    mbarrier(barrier, rank).bytes -= bytes;
    mbarrier_step(mbarrier(barrier, rank));
  });
}
}  // namespace emulator
/// Copies `bytes` (a multiple of 16; both ends aligned to 16) to shared memory and counts them on the mbarrier.
DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emulator::bulk_copy_to(emulator::cluster_rank(), to, from, bytes, barrier);
}
/// As bulk_copy, to the same place in every block of the cluster that has a bit in `blocks`, and counted there.
DEVICE void bulk_copy_multicast(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, unsigned blocks) {
  for (unsigned rank = 0; rank < emulator::cluster_size(); rank++) {
    if (blocks >> rank & 1) emulator::bulk_copy_to(rank, to, from, bytes, barrier);
  }
}
/// As bulk_copy, for bytes that no one reads again: they leave L2 first.
DEVICE void bulk_copy_evict_first(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  bulk_copy(to, from, bytes, barrier);
}
DEVICE void prefetch_l2(const void* from, uint32_t bytes) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("misaligned prefetch");
  // Only what can be read.
  const volatile uint8_t* ends = static_cast<const uint8_t*>(from);
  (void)ends[0], (void)ends[bytes - 1];
}

// ---- clusters
DEVICE unsigned cluster_rank() { return emulator::cluster_rank(); }
DEVICE void cluster_sync() { emulator::cluster_barrier(); }

// ---- programmatic dependent launch
DEVICE void wait_for_previous_kernels() {}
DEVICE void let_next_kernel_start() {}

// ---- matrix instructions
template <int Registers>
DEVICE void decrease_registers() {}
template <int Registers>
DEVICE void increase_registers() {}
DEVICE void wgmma_fence() {}
DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int Pending>
DEVICE void wgmma_wait() {
  emulator::wgmma_wait(Pending);
}
template <int N>
DEVICE void wgmma_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  emulator::wgmma<emulator::E4m3Operand, N>(d, a, b, accumulate);
}
template <int N>
DEVICE void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  emulator::wgmma<emulator::Bf16Operand, N>(d, a, b, accumulate);
}
template <int N>
DEVICE void wgmma_bf16_transposed(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  emulator::wgmma_transposed<N>(d, a, b);
}
template <int N>
DEVICE void pin_registers(float (&)[N]) {}
DEVICE int thread_index_again() { return int(threadIdx.x); }
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  emulator::mma_sync<emulator::Bf16Operand>(d, a, b, c);
}
DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  emulator::mma_sync<emulator::F16Operand>(d, a, b, c);
}
DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  emulator::mma_sync<emulator::E4m3Operand>(d, a, b, c);
}
DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) { emulator::ldmatrix<4, false>(d, address); }
DEVICE void ldmatrix_x2(uint32_t (&d)[2], uint32_t address) { emulator::ldmatrix<2, false>(d, address); }
DEVICE void ldmatrix_x4_transposed(uint32_t (&d)[4], uint32_t address) { emulator::ldmatrix<4, true>(d, address); }
DEVICE void ldmatrix_x2_transposed(uint32_t (&d)[2], uint32_t address) { emulator::ldmatrix<2, true>(d, address); }
DEVICE uint32_t transposed(uint32_t pair) { return emulator::transposed(pair); }

#else  // nvcc

/// A kernel takes one struct by value; `min_blocks` an SM must hold at once.
#define KERNEL(name, Params, threads, min_blocks) \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ Params p)
/// As KERNEL, for blocks that run `cluster` at a time and reach each other's shared memory (Hopper and later). The grid's
/// width is a multiple of `cluster`.
#define CLUSTER_KERNEL(name, Params, threads, cluster)                                       \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, 1)   \
      name(const __grid_constant__ Params p)
/// The block's dynamic shared memory; the alignment is what a 128-byte swizzle needs.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]
#define DEVICE __device__ __forceinline__

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- numbers
DEVICE uint32_t bf16x2_from_floats(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
/// Rounds to nearest even and saturates at 448.
DEVICE uint16_t e4m3x2_from_floats(float low, float high) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
}
DEVICE float float_from_e4m3(uint8_t code) {
  uint32_t halves;
  float result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(code)));
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(uint16_t(halves)));
  return result;
}
DEVICE uint32_t f16x2_from_floats(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
DEVICE float low_half(uint32_t f16x2) {
  float result;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(result) : "r"(f16x2));
  return result;
}
DEVICE float high_half(uint32_t f16x2) {
  float result;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(result) : "r"(f16x2));
  return result;
}
/// Four e4m3 codes, from the lowest byte on, exactly.
DEVICE void f16x2_from_e4m3x4(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{.reg .b16 first, second; mov.b32 {first, second}, %2; cvt.rn.f16x2.e4m3x2 %0, first; "
      "cvt.rn.f16x2.e4m3x2 %1, second;}"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
/// Bytes 0, 2, 1, 3.
DEVICE uint32_t odd_bytes_last(uint32_t x) { return __byte_perm(x, 0, 0x3120); }
/// threadIdx.x where a register that kept it, or what is made of it, would be one too many.
DEVICE int thread_index_again() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE unsigned long long multiply_high(unsigned long long a, unsigned long long b) { return __umul64hi(a, b); }
DEVICE float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- memory
/// Reads what no one reads again: it does not displace others in L1.
DEVICE uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
DEVICE unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
/// Adds and returns the old value. What this thread, and those it synchronised with, wrote before is seen by whoever adds
/// to it later.
DEVICE unsigned atomic_add_acq_rel(unsigned* p, unsigned value) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}
/// Reads what other SMs wrote during this kernel, or what is read before wait_for_previous_kernels(): past L1.
DEVICE uint4 load_l2(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
DEVICE float load_l2(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
/// As above, for other types.
template <class T>
DEVICE T load_l2(const T* p) {
  return __ldcg(p);
}
/// 16 bytes to shared memory; zeros if not `valid`.
DEVICE void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
/// To shared memory.
DEVICE void store_zeros_16(uint32_t to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
DEVICE uint2 load_shared_8(uint32_t from) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(from) : "memory");
  return value;
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- barriers
DEVICE void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
/// Counts as one of the barrier's threads and goes on.
DEVICE void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- programmatic dependent launch
/// Every thread that reads or writes what earlier kernels touch must pass this first, and every block must call it.
DEVICE void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Permits the next kernel of the stream to be scheduled beside this one.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- matrix instructions of every architecture from 8.9 on
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}
DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}
DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}
/// A warp's 8 x 8 values of 16 bits, of which lane l has columns 2 (l % 4) + {0, 1} of row l / 4, with rows and columns
/// exchanged.
DEVICE uint32_t transposed(uint32_t pair) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
  return d;
}
DEVICE void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_x2(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_x4_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}
DEVICE void ldmatrix_x2_transposed(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}

// ---- Hopper: barriers that count bytes, bulk copies (also on later parts)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Waits until the phase of this parity is over.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra "
      "AGAIN;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
/// Makes initialised mbarriers visible to the copy engine; the block must synchronise after it.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/// Ordinary stores to shared memory before it are seen by wgmma and bulk copies after it (and after a barrier).
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// Copies `bytes` (a multiple of 16; both ends aligned to 16) to shared memory and counts them on the mbarrier.
DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
/// As bulk_copy, for bytes that no one reads again: they leave L2 first.
DEVICE void bulk_copy_evict_first(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
/// As bulk_copy, to the same place in every block of the cluster that has a bit in `blocks`, and counted there.
DEVICE void bulk_copy_multicast(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, unsigned blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(uint16_t(blocks))
      : "memory");
}
/// Arrives at the barrier that lies at the same address in block `rank` of the cluster. It tells that reads are done; to
/// publish writes to that block it would have to release at the cluster's scope, which costs a fence of the whole GPU.
DEVICE void mbarrier_arrive_at(uint32_t barrier, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
/// The block's place in its cluster.
DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/// Waits for all threads of the cluster; what they wrote to shared memory is seen.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE void prefetch_l2(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
#endif

// ---- Hopper only (sm_90a)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int Registers>
DEVICE void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
DEVICE void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most `Pending` committed groups are unfinished.
template <int Pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// After a wait: keeps the compiler from reading accumulators before it.
template <int N>
DEVICE void pin_registers(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#include "wgmma.cuh"
#endif

#endif  // LAPIDARY_EMULATOR
