// Enough of CUDA to run clipped_adamw_cuda.cu on the host, as plain C++20: one thread per CUDA thread, one block after
// another, from the last to the first. Barriers are real, so a missing one shows in the results.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

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

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace host_cuda {
inline std::barrier<>* block_barrier;
inline std::deque<std::barrier<>> warp_barriers;
inline double exchanged[1024];
}  // namespace host_cuda

using std::min;
inline void __syncthreads() { host_cuda::block_barrier->arrive_and_wait(); }
inline void __syncwarp() { host_cuda::warp_barriers[threadIdx.x / 32].arrive_and_wait(); }
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
struct cudaFuncAttributes {};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F) { return cudaSuccess; }

struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  gridDim = config->gridDim;
  for (unsigned b = config->gridDim.x; b-- > 0;) {
    std::barrier<> barrier(config->blockDim.x);
    host_cuda::block_barrier = &barrier;
    host_cuda::warp_barriers.clear();
    for (unsigned w = 0; w < config->blockDim.x / 32; ++w) host_cuda::warp_barriers.emplace_back(32);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < config->blockDim.x; ++t)
      threads.emplace_back([&, t] {
        threadIdx = dim3(t);
        blockIdx = dim3(b);
        kernel(args...);
        host_cuda::warp_barriers[t / 32].arrive_and_drop();
        barrier.arrive_and_drop();
      });
    for (std::thread& thread : threads) thread.join();
  }
  return cudaSuccess;
}
