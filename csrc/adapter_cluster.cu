// The launch of the forward by clusters: one kernel per padded adapter dimension.
#include <cuda_runtime.h>

#include "adapter_cluster_kernel.h"

namespace adapterkern::cluster {
namespace {

template <class K>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Forward p) {
  forward<K>(p);
}

struct Chosen {
  void (*kernel)(Forward);
  int bytes, columns;
};

template <class K>
Chosen chosen() {
  static_assert(sizeof(typename K::Shared) <= 227 * 1024, "what a block may have of shared memory");
  return {forward_kernel<K>, int(sizeof(typename K::Shared)), K::kColumns};
}

Chosen choose(int R) {
  switch (R) {
    case 16: return chosen<Config<16, 512, 5>>();
    case 32: return chosen<Config<32, 512, 5>>();
    case 64: return chosen<Config<64, 512, 5>>();
    case 128: return chosen<Config<128, 256, 7>>();
    default: return {nullptr, 0, 0};
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

  Launch(const Chosen& c, int blocks, int clusters, void* stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = unsigned(blocks);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // the kernel calls follow()
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(unsigned(blocks * clusters));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(c.bytes);
    config.stream = cudaStream_t(stream);
    config.attrs = attributes;
    config.numAttrs = 2;
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

}  // namespace

int most_columns(int R) { return choose(R).columns; }

int most_clusters(int R, int blocks, int device, const char** error) {
  const DeviceGuard guard(device);
  const Chosen c = choose(R);
  int found = 0;
  cudaError_t status = allow(c);
  if (status == cudaSuccess) {
    Launch launch(c, blocks, 1, nullptr);
    launch.config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&found, c.kernel, &launch.config);
  }
  *error = describe(status);
  return *error ? 0 : found;
}

const char* forward(const Forward& p, int R, int blocks, int clusters, int device, void* stream) {
  const DeviceGuard guard(device);
  const Chosen c = choose(R);
  const Launch launch(c, blocks, clusters, stream);
  return describe(cudaLaunchKernelEx(&launch.config, c.kernel, p));
}

}  // namespace adapterkern::cluster
