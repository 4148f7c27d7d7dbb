// A fault on a real GPU, at a chosen moment: a library that the CUDA driver loads into any process and that runs a broken
// kernel in the process's own context once the file named by BREAK_WHEN exists. BREAK_HOW: `address` reads what is not mapped,
// `trap` stops itself, `hang` keeps all multiprocessors busy for ever.
//
//   g++ -O2 -shared -fPIC tests/gpu/break_device.cc -o break_device.so -I CUDA/include -ldl
//   CUDA_INJECTION64_PATH=$PWD/break_device.so BREAK_WHEN=now BREAK_HOW=trap lapidary serve demo
//
// `tests/gpu/faults.py` uses it.

#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace {

constexpr useconds_t kPollMicroseconds = 1000;

constexpr char kKernels[] = R"(
.version 8.0
.target sm_80
.address_size 64
.visible .entry break_address() {
  .reg .u64 %a;
  .reg .u32 %v;
  mov.u64 %a, 64;
  ld.volatile.global.u32 %v, [%a];
  ret;
}
.visible .entry break_trap() { trap; ret; }
.visible .entry break_hang() {
again:
  bra.uni again;
}
)";

/// Threads of the one that hangs: a whole multiprocessor has room for two such blocks.
constexpr unsigned kHangThreads = 1024, kHangBlocks = 2 * 256;

template <class Function>
Function* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  return reinterpret_cast<Function*>(dlsym(library, name));
}

/// A server that ends for want of what should break it must not pass for one that was broken.
void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  fprintf(stderr, "break_device: %s: error %d\n", what, int(result));
  abort();
}

void break_device(const char* how) {
  CUcontext context;
  CUmodule module;
  CUfunction kernel;
  CUstream stream;
  char name[64];
  snprintf(name, sizeof name, "break_%s", how);
  check(driver<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain")(&context, 0), "the context");
  check(driver<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent")(context), "entering it");
  check(driver<decltype(cuModuleLoadData)>("cuModuleLoadData")(&module, kKernels), "loading");
  check(driver<decltype(cuModuleGetFunction)>("cuModuleGetFunction")(&kernel, module, name), "the kernel");
  check(driver<decltype(cuStreamCreate)>("cuStreamCreate")(&stream, CU_STREAM_NON_BLOCKING), "a stream");
  const bool hangs = strcmp(how, "hang") == 0;
  fprintf(stderr, "break_device: %s\n", how);
  check(driver<decltype(cuLaunchKernel)>("cuLaunchKernel")(kernel, hangs ? kHangBlocks : 1, 1, 1, hangs ? kHangThreads : 1, 1, 1, 0,
                                                           stream, nullptr, nullptr),
        "launching");
}

}  // namespace

/// The driver calls it when the process first uses CUDA.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char *when = getenv("BREAK_WHEN"), *how = getenv("BREAK_HOW");
  if (when == nullptr || how == nullptr) return 0;
  std::thread([=] {
    while (access(when, F_OK) != 0) usleep(kPollMicroseconds);
    break_device(how);
  }).detach();
  return 1;
}
