// The launches by clusters: one kernel per pass and padded adapter dimension.
#include <cuda_runtime.h>

#include "adapter_cluster_backward.h"
#include "adapter_cluster_forward.h"

namespace adapterkern::cluster {
namespace {

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) forward_kernel(const __grid_constant__ Forward p) {
  forward<K>(p);
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) backward_kernel(const __grid_constant__ Backward p) {
  backward<K>(p);
}

struct Chosen {
  const void* kernel;
  int threads, bytes, columns;
};

template <class K>
Chosen chosen(const void* kernel) {
  static_assert(sizeof(typename K::Shared) <= 227 * 1024, "what a block may have of shared memory");
  return {kernel, K::kThreads, int(sizeof(typename K::Shared)), K::kColumns};
}

template <int R, int kColumns, int kBuffers>
Chosen chosen_forward() {
  using K = ForwardConfig<R, kColumns, kBuffers>;
  return chosen<K>(reinterpret_cast<const void*>(&forward_kernel<K>));
}

template <int R, int kColumns, int kBuffers>
Chosen chosen_backward() {
  using K = BackwardConfig<R, kColumns, kBuffers>;
  return chosen<K>(reinterpret_cast<const void*>(&backward_kernel<K>));
}

Chosen choose(Pass pass, int R) {
  const bool backward = pass == Pass::kBackward;
  switch (R) {
    case 16: return backward ? chosen_backward<16, 256, 5>() : chosen_forward<16, 512, 5>();
    case 32: return backward ? chosen_backward<32, 256, 5>() : chosen_forward<32, 512, 5>();
    case 64: return backward ? chosen_backward<64, 256, 4>() : chosen_forward<64, 512, 5>();
    case 128: return backward ? Chosen{} : chosen_forward<128, 256, 7>();  // G and U would not fit in registers
    default: return {};
  }
}

// Makes `device` current, then restores the caller's.
struct DeviceGuard {
  int previous = 0;
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous);
    cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
};

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  Launch(const Chosen& c, const Grid& grid) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = unsigned(grid.blocks);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // the kernel calls follow()
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(unsigned(grid.blocks * grid.clusters));
    config.blockDim = dim3(unsigned(c.threads));
    config.dynamicSmemBytes = size_t(c.bytes);
    config.stream = cudaStream_t(grid.stream);
    config.attrs = attributes;
    config.numAttrs = grid.early ? 2 : 1;
  }
};

const char* describe(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // an answer here, not an error for the next caller
  return cudaGetErrorString(error);
}

cudaError_t allow(const Chosen& c) {
  const cudaError_t error = cudaFuncSetAttribute(c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c.bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(c.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <class P>
const char* launch(Pass pass, P p, const Grid& grid) {
  const DeviceGuard guard(grid.device);
  const Chosen c = choose(pass, grid.R);
  const Launch launch(c, grid);
  void* arguments[] = {&p};
  return describe(cudaLaunchKernelExC(&launch.config, c.kernel, arguments));
}

}  // namespace

int most_columns(Pass pass, int R) { return choose(pass, R).columns; }

int most_clusters(Pass pass, int R, int blocks, int device, const char** error) {
  const DeviceGuard guard(device);
  const Chosen c = choose(pass, R);
  int found = 0;
  cudaError_t status = allow(c);
  if (status == cudaSuccess) {
    const Launch launch(c, {R, blocks, 1, device, nullptr, false});
    status = cudaOccupancyMaxActiveClusters(&found, c.kernel, &launch.config);
  }
  *error = describe(status);
  return *error ? 0 : found;
}

const char* forward(const Forward& p, const Grid& grid) { return launch(Pass::kForward, p, grid); }

const char* backward(const Backward& p, const Grid& grid) { return launch(Pass::kBackward, p, grid); }

}  // namespace adapterkern::cluster
