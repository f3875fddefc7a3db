// Enough of CUDA to run clipped_adamw_cuda.cu on the host, as plain C++20: one thread per CUDA thread, one block after
// another, from the last to the first. Barriers are real, so a missing one shows in the results. A kernel runs as late as
// CUDA lets it: at the next launch, or, if that is an early one, when a thread of that kernel waits for it.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

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

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace host_cuda {
inline thread_local std::barrier<>*block_barrier, *warp_barrier;
inline double exchanged[1024];

inline std::function<void()> launched;  // and not run yet
inline std::mutex one_runs_it;
inline void run_launched() {
  const std::lock_guard lock(one_runs_it);
  if (const auto run = std::exchange(launched, nullptr)) run();
}
}  // namespace host_cuda

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { host_cuda::run_launched(); }

using std::min;
inline void __syncthreads() { host_cuda::block_barrier->arrive_and_wait(); }
inline void __syncwarp() { host_cuda::warp_barrier->arrive_and_wait(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T v) { *p = v; }

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
      std::barrier<> barrier(block.x);
      std::deque<std::barrier<>> warp_barriers;
      for (unsigned w = 0; w < block.x / 32; ++w) warp_barriers.emplace_back(32);
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < block.x; ++t)
        threads.emplace_back([&, t] {
          threadIdx = dim3(t), blockIdx = dim3(b), gridDim = grid;
          host_cuda::block_barrier = &barrier, host_cuda::warp_barrier = &warp_barriers[t / 32];
          kernel(args...);
          warp_barriers[t / 32].arrive_and_drop();
          barrier.arrive_and_drop();
        });
      for (std::thread& thread : threads) thread.join();
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
