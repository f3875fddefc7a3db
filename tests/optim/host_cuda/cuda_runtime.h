// Enough of CUDA to run clipped_adamw_cuda.cu on the host, as plain C++20: a fiber per CUDA thread, one block after
// another, from the last to the first. The fibers of a block run in an order drawn at random, and are interrupted at
// random wherever they touch what other blocks see; in half of the blocks one warp gets a turn only when the others
// wait. So a missing barrier shows in the results. A kernel runs as late as CUDA lets it: at the next launch, or, if that
// is an early one, when all threads of a block of that kernel wait for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "fiber.h"

#define __CUDA_ARCH__ 900

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x = 1;
  explicit dim3(unsigned x = 1) : x(x) {}
};
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

inline dim3 threadIdx, blockIdx, gridDim;

namespace host_cuda {

struct Meeting {
  unsigned size, arrived = 0, number = 0;
  void check() {
    if (arrived == size) arrived = 0, ++number;
  }
};

struct Fiber {
  StackOfFiber stack;
  bool over = false;
};

struct Block {
  std::vector<Fiber>& fibers;
  const std::function<void()>& kernel;
  Meeting all;
  std::vector<Meeting> warps;
  void* scheduler = nullptr;
  bool moved = false;  // whether anything has happened since the scheduler last looked
  bool stuck = false;  // whether nothing can happen before the kernel that was launched has run
};

inline Block* block;  // the innermost: a launched kernel runs inside of a thread that waits for it
inline std::deque<std::vector<Fiber>> pools;  // a block's fibers, for each depth
inline size_t depth = 0;
inline std::mt19937 draw;
inline double exchanged[1024];
inline std::function<void()> launched;  // and not run yet

inline void run_launched() {
  if (const auto run = std::exchange(launched, nullptr)) run();
}

inline void yield() { block->fibers[threadIdx.x].stack.leave(block->scheduler); }
inline void yield_sometimes() {
  if (!block || draw() % 8) return;
  block->moved = true;
  yield();
}

template <typename Over>
void until(Over over) {
  while (!over()) yield();
  block->moved = true;
}

inline void meet(Meeting& meeting) {
  const unsigned number = meeting.number;
  ++meeting.arrived;
  meeting.check();
  until([&] { return meeting.number != number; });
}

inline void begin() {
  block->kernel();
  block->fibers[threadIdx.x].over = block->moved = true;
  for (Meeting* meeting : {&block->all, &block->warps[threadIdx.x / 32]}) --meeting->size, meeting->check();
  for (;;) yield();
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  if (pools.size() == depth) pools.emplace_back();
  std::vector<Fiber>& fibers = pools[depth++];
  fibers.resize(threads);
  for (Fiber& fiber : fibers) fiber.stack.start(begin), fiber.over = false;
  Block own{fibers, kernel, {threads}, std::vector<Meeting>(threads / 32, {32})};
  Block* const outer = std::exchange(block, &own);
  std::vector<unsigned> warps(threads / 32);
  for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
  const unsigned starved = draw() % (2 * warps.size());  // a warp, or none, that runs only once the others cannot
  for (size_t idle = 0; !warps.empty();) {
    const size_t chosen = draw() % warps.size();
    if (warps[chosen] == starved && warps.size() > 1 && idle < 4 * warps.size()) {
      ++idle;
      continue;
    }
    own.moved = false;
    const unsigned rotation = draw() % 32;
    bool over = true;
    for (unsigned i = 0; i < 32; ++i) {
      threadIdx = dim3(warps[chosen] * 32 + (i + rotation) % 32);
      Fiber& fiber = fibers[threadIdx.x];
      if (!fiber.over) fiber.stack.enter(&own.scheduler);
      over = over && fiber.over;
    }
    if (over) warps[chosen] = warps.back(), warps.pop_back();
    idle = own.moved ? 0 : idle + 1;
    if (idle <= 100 * (warps.size() + 1)) continue;
    if (own.stuck || !launched) std::fputs("the threads wait for each other\n", stderr), std::abort();
    own.stuck = true, idle = 0;
  }
  block = outer;
  --depth;
}

}  // namespace host_cuda

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {
  host_cuda::until([] { return !host_cuda::launched || host_cuda::block->stuck; });
  const dim3 thread = threadIdx, index = blockIdx, grid = gridDim;
  host_cuda::run_launched();
  threadIdx = thread, blockIdx = index, gridDim = grid;
}

using std::min;
inline void __syncthreads() { host_cuda::meet(host_cuda::block->all); }
inline void __syncwarp() { host_cuda::meet(host_cuda::block->warps[threadIdx.x / 32]); }
inline void __threadfence() { host_cuda::yield_sometimes(); }
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  host_cuda::yield_sometimes();
  return std::exchange(*p, *p + v);
}
template <typename T>
T __ldcs(const T* p) {
  host_cuda::yield_sometimes();
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  host_cuda::yield_sometimes();
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  host_cuda::yield_sometimes();
  *p = v;
}

template <typename T>
T __shfl_xor_sync(unsigned, T v, int offset) {
  host_cuda::exchanged[threadIdx.x] = v;
  __syncwarp();
  const T got = T(host_cuda::exchanged[threadIdx.x ^ unsigned(offset)]);
  __syncwarp();
  return got;
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
struct cudaFuncAttributes { int ptxVersion; };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F) {
  return attributes->ptxVersion = __CUDA_ARCH__ / 10, cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim{}, blockDim{};
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  const auto run = [grid = config->gridDim, block = config->blockDim, kernel, args...] {
    for (unsigned b = grid.x; b-- > 0;) {
      blockIdx = dim3(b), gridDim = grid;
      host_cuda::run_block(block.x, [&] { kernel(args...); });
    }
  };
  if (config->numAttrs) {
    run();
    host_cuda::run_launched();
  } else {
    host_cuda::run_launched();
    host_cuda::launched = run;
  }
  return cudaSuccess;
}
