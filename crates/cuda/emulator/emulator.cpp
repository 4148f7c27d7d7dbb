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

struct Fiber {
  void* stack_pointer = nullptr;
  dim3 index;
  bool done = false;
  Groups wgmma, cp_async;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  Slot slots[32];
};

/// The block that runs on this OS thread.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[17];  // 16 named ones and __syncthreads
  size_t current = 0, live = 0;
  uint64_t steps = 0, seen = 0, idle = 0;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<std::function<void()>> late;
  uint64_t random = 0x9e3779b97f4a7c15ull;
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  void* main_stack = nullptr;
  const char* name = "";
};

thread_local Block block;
thread_local std::vector<char*> stacks;

struct Kernel {
  std::string name;
  size_t params_bytes;
  unsigned threads;
  void (*body)(const void*);
};

std::map<std::string, Kernel>& registry() {
  static std::map<std::string, Kernel> kernels;
  return kernels;
}

uint64_t next_random() {
  block.random ^= block.random << 13;
  block.random ^= block.random >> 7;
  block.random ^= block.random << 17;
  return block.random;
}

bool run_one_late() {
  if (block.late.empty()) return false;
  const size_t index = next_random() % block.late.size();
  auto work = std::move(block.late[index]);
  block.late.erase(block.late.begin() + long(index));
  work();
  progress();
  return true;
}

void switch_to(size_t next) {
  Fiber& me = block.fibers[block.current];
  me.index = threadIdx;
  block.current = next;
  threadIdx = block.fibers[next].index;
  emulator_switch(&me.stack_pointer, block.fibers[next].stack_pointer);
}

size_t next_live() {
  size_t next = block.current;
  do next = (next + 1) % block.fibers.size();
  while (block.fibers[next].done);
  return next;
}

void arrive_and_wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  progress();
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.generation++;
    return;
  }
  while (barrier.generation == generation) yield();
}

void fiber_main() {
  block.body(block.params);
  progress();
  Fiber& me = block.fibers[block.current];
  if (!me.wgmma.open.empty() || !me.cp_async.open.empty()) fail("a thread ended with uncommitted asynchronous work");
  me.done = true;
  if (--block.live == 0) emulator_switch(&me.stack_pointer, block.main_stack);
  const size_t next = next_live();
  block.current = next;
  threadIdx = block.fibers[next].index;
  emulator_switch(&me.stack_pointer, block.fibers[next].stack_pointer);
  abort();
}

void prepare_fibers(size_t threads) {
  while (stacks.size() < threads) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for stacks");
    stacks.push_back(static_cast<char*>(stack));
  }
  block.fibers.assign(threads, {});
  block.warps.assign((threads + 31) / 32, {});
  for (auto& barrier : block.barriers) barrier = {};
  block.live = threads;
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = block.fibers[i];
    const unsigned x = unsigned(i);
    fiber.index = {x % blockDim.x, x / blockDim.x % blockDim.y, x / (blockDim.x * blockDim.y)};
    void** top = reinterpret_cast<void**>(stacks[i] + kStackBytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
  }
}

void run_block() {
  std::memset(block.shared, 0xA5, block.shared_bytes);
  prepare_fibers(size_t(blockDim.x) * blockDim.y * blockDim.z);
  block.current = 0;
  threadIdx = block.fibers[0].index;
  emulator_switch(&block.main_stack, block.fibers[0].stack_pointer);
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
  fprintf(stderr, "emulator: %s: %s; block (%u,%u,%u), thread (%u,%u,%u)\n", block.name, what, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  abort();
}

void progress() { block.steps++; }

void yield() {
  if (next_random() % 4 == 0) run_one_late();
  if (block.seen != block.steps) {
    block.seen = block.steps;
    block.idle = 0;
  } else if (++block.idle > block.fibers.size() * 4 + 16 && !run_one_late()) {
    fail("every thread waits (deadlock)");
  }
  const size_t next = next_live();
  if (next != block.current) switch_to(next);
}

unsigned thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

unsigned warp_size() {
  const unsigned first = thread() / 32 * 32;
  return std::min<unsigned>(32, unsigned(block.fibers.size()) - first);
}

Slot* warp_slots() { return block.warps[thread() / 32].slots; }
void arrive_and_wait_warp() { arrive_and_wait(block.warps[thread() / 32].barrier, warp_size()); }
void block_barrier() { arrive_and_wait(block.barriers[16], unsigned(block.fibers.size())); }

void arrive_and_wait_named(int barrier, int threads) {
  if (barrier < 0 || barrier > 15 || threads % 32 != 0) fail("no such named barrier");
  arrive_and_wait(block.barriers[barrier], unsigned(threads));
}

uint8_t* shared_memory() { return block.shared; }

uint32_t shared_address(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - block.shared;
  if (offset < 0 || offset >= ptrdiff_t(block.shared_bytes)) fail("not an address of dynamic shared memory");
  return uint32_t(offset) + kSharedBase;
}

uint8_t* shared_pointer(uint32_t address, size_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > block.shared_bytes) fail("shared memory out of range");
  return block.shared + (address - kSharedBase);
}

void later(std::function<void()> work) { block.late.push_back(std::move(work)); }

void wgmma_issue(std::function<void()> work) { block.fibers[block.current].wgmma.issue(std::move(work)); }
void wgmma_commit() { block.fibers[block.current].wgmma.commit(); }
void wgmma_wait(int pending) {
  block.fibers[block.current].wgmma.wait(size_t(pending));
  // `.sync.aligned`: the lanes of a warp go on together. Warps of a warpgroup do not, so a stage is released by each.
  arrive_and_wait_warp();
}
void cp_async_issue(std::function<void()> work) { block.fibers[block.current].cp_async.issue(std::move(work)); }
void cp_async_commit() { block.fibers[block.current].cp_async.commit(); }
void cp_async_wait(int pending) { block.fibers[block.current].cp_async.wait(size_t(pending)); }

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

Registration::Registration(const char* name, size_t params_bytes, unsigned threads, void (*body)(const void*)) {
  registry()[name] = {name, params_bytes, threads, body};
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
  auto& block = emulator::block;
  block.name = k.name.c_str();
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  if (threads != k.threads) emulator::fail("launched with another block size than it is declared for");
  if (shared_bytes > emulator::kMaxSharedBytes) emulator::fail("more shared memory than an SM has");
  block.body = k.body;
  block.params = params;
  block.shared_bytes = shared_bytes;
  block.shared = static_cast<uint8_t*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024 + 1024));
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  // Blocks of a grid run in no particular order.
  const uint64_t first = blocks == 0 ? 0 : emulator::next_random() % blocks;
  for (uint64_t i = 0; i < blocks; i++) {
    const uint64_t index = (first + i) % blocks;
    blockIdx = {unsigned(index % grid[0]), unsigned(index / grid[0] % grid[1]), unsigned(index / grid[0] / grid[1])};
    emulator::run_block();
  }
  std::free(block.shared);
  block.shared = nullptr;
  block.fibers.clear();
}

}  // extern "C"
