// Where the time of a process goes on the GPU, kernel by kernel, without a profiler installed: a library that the CUDA driver
// loads into any process and that prints a table when the process ends.
//
//   g++ -O2 -shared -fPIC tests/gpu/kernel_times.cc -o kernel_times.so -I CUPTI/include -L CUPTI/lib -lcupti
//   CUDA_INJECTION64_PATH=$PWD/kernel_times.so KERNEL_TIMES=times.txt lapidary serve CHECKPOINT
//
// CUPTI comes with the CUDA toolkit (extras/CUPTI) and, as nvidia-cuda-cupti, from the Python registry. Kernels that overlap
// (dependent launches do) share time: "own" is what a kernel adds after all before it have ended, so that the column sums to
// the time the GPU was busy. KERNEL_TIMES_AFTER=1 tells apart what a kernel came after.

#include <cupti.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr size_t kBufferBytes = 8 << 20;
/// A longer pause is the process's, not a gap between two kernels of a step.
constexpr uint64_t kPauseNanoseconds = 1000000;

struct Launch {
  uint64_t start, end;
  std::string what;
};

std::mutex mutex;
std::vector<Launch> launches;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(aligned_alloc(8, kBufferBytes));
  *size = kBufferBytes;
  *max_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    char what[256];
    snprintf(what, sizeof what, "%-48s %5d x %5d", kernel->name, kernel->gridX, kernel->gridY);
    launches.push_back({kernel->start, kernel->end, what});
  }
  free(buffer);
}

struct Total {
  uint64_t count = 0, own = 0, whole = 0;
};

void print_table() {
  cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const char* path = getenv("KERNEL_TIMES");
  FILE* out = path == nullptr ? stderr : fopen(path, "w");
  if (out == nullptr) return;
  std::sort(launches.begin(), launches.end(), [](const Launch& a, const Launch& b) { return a.end < b.end; });
  std::map<std::string, Total> totals;
  uint64_t last_end = 0, busy = 0, gaps = 0;
  const bool by_predecessor = getenv("KERNEL_TIMES_AFTER") != nullptr;
  std::string before;
  for (const Launch& launch : launches) {
    Total& total = totals[by_predecessor ? launch.what + "  after " + before : launch.what];
    before = launch.what.substr(0, launch.what.find(' '));
    const uint64_t own = launch.end - std::max(launch.start, std::min(last_end, launch.end));
    total.count++;
    total.own += own;
    total.whole += launch.end - launch.start;
    busy += own;
    if (launch.start > last_end && launch.start - last_end < kPauseNanoseconds) gaps += launch.start - last_end;
    last_end = launch.end;
  }
  std::vector<std::pair<std::string, Total>> sorted(totals.begin(), totals.end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second.own > b.second.own; });
  fprintf(out, "busy %.3f ms, gaps between kernels %.3f ms\n", double(busy) / 1e6, double(gaps) / 1e6);
  fprintf(out, "%-48s %13s %9s %10s %9s %9s\n", "kernel", "grid", "launches", "own ms", "own us", "whole us");
  for (const auto& [what, total] : sorted) {
    fprintf(out, "%s %9lu %10.3f %9.2f %9.2f\n", what.c_str(), total.count, double(total.own) / 1e6,
            double(total.own) / 1e3 / double(total.count), double(total.whole) / 1e3 / double(total.count));
  }
  if (out != stderr) fclose(out);
}

}  // namespace

/// The driver calls it when the process first uses CUDA.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS) return 0;
  if (cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS) return 0;
  atexit(print_table);
  return 1;
}
