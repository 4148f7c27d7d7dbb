// See emulator.h. Also the C interface the Rust side launches kernels through.
#include "emulator.h"

#include <map>
#include <string>

#include <sys/mman.h>

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the callee-saved registers on the current stack, stores the stack pointer, and continues on another stack.
extern "C" void emulator_switch(void** from, void* to);
asm(".text\n.globl emulator_switch\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp,(%rdi)\n"
    "movq %rsi,%rsp\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr uint32_t kSharedBase = 1024;
/// What an SM of compute capability 9.0 gives a block.
constexpr size_t kMaxSharedBytes = 227 << 10;

struct Groups {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> committed;

  void issue(std::function<void()> work) { open.push_back(std::move(work)); }
  void commit() { committed.push_back(std::move(open)), open.clear(); }
  void wait(size_t pending) {
    while (committed.size() > pending) {
      for (auto& work : committed.front()) work();
      committed.erase(committed.begin());
    }
  }
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  dim3 index, block_index;
  unsigned rank = 0;  // of its block in the cluster
  bool done = false;
  unsigned exchanges = 0;
  // Waits here for the generation after this one.
  const Barrier* at = nullptr;
  unsigned generation = 0;
  Groups wgmma, cp_async;

  bool waits() const { return at != nullptr && at->generation == generation; }
};

struct Warp {
  Barrier barrier;
  Slot slots[2][32];
  unsigned exchanges = 0;  // of the lanes that wait at the barrier
};

/// What each block of a cluster has for itself.
struct BlockState {
  std::vector<Warp> warps;
  Barrier barriers[17];  // 16 named ones and __syncthreads
  size_t live = 0;
  uint8_t* shared = nullptr;
};

/// The block that runs on this OS thread, or the blocks of a cluster, whose fibers lie one block after another.
struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<BlockState> blocks;
  Barrier barrier;
  size_t threads = 0;  // of a block
  size_t current = 0, live = 0;
  BlockState* block = nullptr;  // the current fiber's
  uint64_t steps = 0, seen = 0, idle = 0;
  size_t shared_bytes = 0;
  std::vector<std::function<void()>> late;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  void* main_stack = nullptr;
  const char* name = "";
};

thread_local Cluster cluster;
thread_local std::vector<char*> stacks;

struct Kernel {
  std::string name;
  size_t params_bytes;
  unsigned threads, cluster;
  void (*body)(const void*);
};

std::map<std::string, Kernel>& registry() {
  static std::map<std::string, Kernel> kernels;
  return kernels;
}

uint64_t next_random() {
  cluster.random ^= cluster.random << 13;
  cluster.random ^= cluster.random >> 7;
  cluster.random ^= cluster.random << 17;
  return cluster.random;
}

bool run_one_late() {
  if (cluster.late.empty()) return false;
  const size_t index = next_random() % cluster.late.size();
  auto work = std::move(cluster.late[index]);
  cluster.late.erase(cluster.late.begin() + long(index));
  work();
  progress();
  return true;
}

/// The calling thread's block.
BlockState& block() { return *cluster.block; }

void enter(size_t index) {
  const Fiber& fiber = cluster.fibers[index];
  threadIdx = fiber.index;
  blockIdx = fiber.block_index;
  cluster.block = &cluster.blocks[fiber.rank];
}

void switch_to(size_t next) {
  Fiber& me = cluster.fibers[cluster.current];
  me.index = threadIdx;
  cluster.current = next;
  enter(next);
  emulator_switch(&me.stack_pointer, cluster.fibers[next].stack_pointer);
}

/// The next fiber that does not wait at a barrier; if all do, the next of those, to find out what becomes of them.
size_t next_live() {
  const size_t count = cluster.fibers.size();
  size_t live = cluster.current;
  for (size_t i = 1, next = cluster.current; i <= count; i++) {
    if (++next == count) next = 0;
    const Fiber& fiber = cluster.fibers[next];
    if (fiber.done) continue;
    if (!fiber.waits()) return next;
    if (live == cluster.current) live = next;
  }
  return live;
}

void arrive(Barrier& barrier, unsigned threads) {
  progress();
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.generation++;
  }
}

void arrive_and_wait(Barrier& barrier, unsigned threads) {
  Fiber& me = cluster.fibers[cluster.current];
  me.at = &barrier;
  me.generation = barrier.generation;
  arrive(barrier, threads);
  while (me.waits()) yield();
  me.at = nullptr;
}

Barrier& named_barrier(int barrier, int threads) {
  if (barrier < 0 || barrier > 15 || threads % 32 != 0) fail("no such named barrier");
  return block().barriers[barrier];
}

void fiber_main() {
  cluster.body(cluster.params);
  progress();
  Fiber& me = cluster.fibers[cluster.current];
  if (!me.wgmma.open.empty() || !me.cp_async.open.empty()) fail("a thread ended with uncommitted asynchronous work");
  me.done = true;
  block().live--;
  if (--cluster.live == 0) emulator_switch(&me.stack_pointer, cluster.main_stack);
  const size_t next = next_live();
  cluster.current = next;
  enter(next);
  emulator_switch(&me.stack_pointer, cluster.fibers[next].stack_pointer);
  abort();
}

void prepare_stacks(size_t count) {
  while (stacks.size() < count) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    stacks.push_back(static_cast<char*>(stack));
  }
}

/// Fibers of `blocks` blocks, of which the first is `blockIdx`.
void prepare_fibers(size_t blocks) {
  const size_t threads = cluster.threads, count = blocks * threads;
  prepare_stacks(count);
  cluster.fibers.assign(count, {});
  cluster.live = count;
  cluster.barrier = {};
  for (auto& state : cluster.blocks) {
    state.warps.assign((threads + 31) / 32, {});
    for (auto& barrier : state.barriers) barrier = {};
    state.live = threads;
  }
  for (size_t i = 0; i < count; i++) {
    Fiber& fiber = cluster.fibers[i];
    const unsigned x = unsigned(i % threads);
    fiber.index = {x % blockDim.x, x / blockDim.x % blockDim.y, x / (blockDim.x * blockDim.y)};
    fiber.rank = unsigned(i / threads);
    fiber.block_index = {blockIdx.x + unsigned(i / threads), blockIdx.y, blockIdx.z};
    void** top = reinterpret_cast<void**>(stacks[i] + kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

/// Runs the cluster whose first block is `blockIdx`.
void run_cluster() {
  // No number in any format: what a kernel reads before it is written shows in the result.
  for (auto& state : cluster.blocks) std::memset(state.shared, 0xFF, cluster.shared_bytes);
  prepare_fibers(cluster.blocks.size());
  cluster.current = 0;
  enter(0);
  emulator_switch(&cluster.main_stack, cluster.fibers[0].stack_pointer);
  while (run_one_late()) {
  }
}

float decode_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return NAN;
  const float magnitude = exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "emulator: %s: %s; block (%u,%u,%u), thread (%u,%u,%u)\n", cluster.name, what, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  abort();
}

void progress() { cluster.steps++; }

void yield() {
  if (next_random() % 4 == 0) run_one_late();
  if (cluster.seen != cluster.steps) {
    cluster.seen = cluster.steps;
    cluster.idle = 0;
  } else if (++cluster.idle > cluster.fibers.size() * 4 + 16 && !run_one_late()) {
    fail("every thread waits (deadlock)");
  }
  const size_t next = next_live();
  if (next != cluster.current) switch_to(next);
}

unsigned warp_size() {
  const unsigned first = thread() / 32 * 32;
  return std::min<unsigned>(32, unsigned(cluster.threads) - first);
}

Slot* warp_slots() {
  const unsigned turn = cluster.fibers[cluster.current].exchanges++ % 2;
  return block().warps[thread() / 32].slots[turn];
}
void arrive_and_wait_warp() {
  Warp& warp = block().warps[thread() / 32];
  const unsigned exchanges = cluster.fibers[cluster.current].exchanges;
  if (warp.barrier.arrived == 0) warp.exchanges = exchanges;
  if (warp.exchanges != exchanges) fail("lanes of a warp exchange values with others that do not");
  arrive_and_wait(warp.barrier, warp_size());
}
void block_barrier() { arrive_and_wait(block().barriers[16], unsigned(cluster.threads)); }

void arrive_and_wait_named(int barrier, int threads) {
  arrive_and_wait(named_barrier(barrier, threads), unsigned(threads));
}
void arrive_named(int barrier, int threads) { arrive(named_barrier(barrier, threads), unsigned(threads)); }

unsigned cluster_rank() { return cluster.fibers[cluster.current].rank; }
unsigned cluster_size() { return unsigned(cluster.blocks.size()); }
void cluster_barrier() { arrive_and_wait(cluster.barrier, unsigned(cluster.fibers.size())); }

uint8_t* shared_memory() { return block().shared; }

uint32_t shared_address(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - block().shared;
  if (offset < 0 || offset >= ptrdiff_t(cluster.shared_bytes)) fail("not an address of dynamic shared memory");
  return uint32_t(offset) + kSharedBase;
}

uint8_t* shared_pointer_of(unsigned rank, uint32_t address, size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > cluster.shared_bytes) fail("shared memory out of range");
  if (rank >= cluster.blocks.size()) fail("no such block in the cluster");
  if (cluster.blocks.size() > 1 && cluster.blocks[rank].live == 0) fail("shared memory of a block that has ended");
  return cluster.blocks[rank].shared + (address - kSharedBase);
}
uint8_t* shared_pointer(uint32_t address, size_t bytes) { return shared_pointer_of(cluster_rank(), address, bytes); }

void later(std::function<void()> work) { cluster.late.push_back(std::move(work)); }

void wgmma_issue(std::function<void()> work) { cluster.fibers[cluster.current].wgmma.issue(std::move(work)); }
void wgmma_commit() { cluster.fibers[cluster.current].wgmma.commit(); }
void wgmma_wait(int pending) {
  cluster.fibers[cluster.current].wgmma.wait(size_t(pending));
  // `.sync.aligned`: the lanes of a warp go on together. Warps of a warpgroup do not, so a stage is released by each.
  arrive_and_wait_warp();
}
void cp_async_issue(std::function<void()> work) { cluster.fibers[cluster.current].cp_async.issue(std::move(work)); }
void cp_async_commit() { cluster.fibers[cluster.current].cp_async.commit(); }
void cp_async_wait(int pending) { cluster.fibers[cluster.current].cp_async.wait(size_t(pending)); }

float e4m3_to_float(uint8_t code) {
  static const auto table = [] {
    std::vector<float> values(256);
    for (int i = 0; i < 256; i++) values[size_t(i)] = decode_e4m3(uint8_t(i));
    return values;
  }();
  return table[code];
}

uint8_t float_to_e4m3(float value) {
  if (std::isnan(value)) return 0x7f;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::min(std::fabs(value), 448.0f);
  int exponent;
  std::frexp(magnitude, &exponent);
  // Values below 2^-6 are fixed point with quantum 2^-9.
  const int quantum = std::max(exponent - 1, -6) - 3;
  const float steps = std::nearbyint(std::ldexp(magnitude, -quantum));
  const float rounded = std::ldexp(steps, quantum);
  if (rounded < std::ldexp(1.0f, -6)) return sign | uint8_t(std::ldexp(rounded, 9));
  std::frexp(rounded, &exponent);
  const int mantissa = int(std::ldexp(rounded, 4 - exponent)) - 8;
  return sign | uint8_t((exponent - 1 + 7) << 3 | mantissa);
}

Registration::Registration(const char* name, size_t params_bytes, unsigned threads, void (*body)(const void*),
                           unsigned cluster) {
  registry()[name] = {name, params_bytes, threads, cluster, body};
}

}  // namespace emulator

extern "C" {

/// A kernel by name, or null. `params_bytes` and `threads` receive what its declaration says.
const void* lapidary_emulator_kernel(const char* name, size_t* params_bytes, unsigned* threads) {
  auto& kernels = emulator::registry();
  const auto found = kernels.find(name);
  if (found == kernels.end()) return nullptr;
  *params_bytes = found->second.params_bytes;
  *threads = found->second.threads;
  return &found->second;
}

void* lapidary_emulator_alloc(size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory != nullptr) std::memset(memory, 0xff, bytes);
  return memory;
}

void lapidary_emulator_free(void* memory) { std::free(memory); }

void lapidary_emulator_launch(const void* kernel, const unsigned* grid, unsigned threads, size_t shared_bytes,
                              const void* params) {
  const auto& k = *static_cast<const emulator::Kernel*>(kernel);
  auto& cluster = emulator::cluster;
  cluster.name = k.name.c_str();
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  if (threads != k.threads) emulator::fail("launched with another block size than it is declared for");
  if (shared_bytes > emulator::kMaxSharedBytes) emulator::fail("more shared memory than an SM has");
  if (grid[0] % k.cluster != 0) emulator::fail("the grid is not made of whole clusters");
  cluster.body = k.body;
  cluster.params = params;
  cluster.threads = threads;
  cluster.shared_bytes = shared_bytes;
  cluster.blocks.assign(k.cluster, {});
  for (auto& state : cluster.blocks) {
    state.shared = static_cast<uint8_t*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024 + 1024));
  }
  const unsigned width = grid[0] / k.cluster;
  const uint64_t clusters = uint64_t(width) * grid[1] * grid[2];
  // Blocks of a grid run in no particular order.
  const uint64_t first = clusters == 0 ? 0 : emulator::next_random() % clusters;
  for (uint64_t i = 0; i < clusters; i++) {
    const uint64_t index = (first + i) % clusters;
    blockIdx = {unsigned(index % width) * k.cluster, unsigned(index / width % grid[1]), unsigned(index / width / grid[1])};
    emulator::run_cluster();
  }
  for (auto& state : cluster.blocks) std::free(state.shared);
  cluster.blocks.clear();
  cluster.fibers.clear();
}

}  // extern "C"
