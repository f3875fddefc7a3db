// The Python bindings of the forward by clusters: raw pointers, sizes and a raw stream. The tensors behind the pointers
// must outlive the calls, which adapterkern/ops/kernels/clusters.py ensures.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "adapter_cluster.h"

namespace py = pybind11;
using namespace adapterkern::cluster;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int columns([[maybe_unused]] int R) {
#ifdef ADAPTERKERN_WITH_CLUSTERS
  return most_columns(R);
#else
  return 0;
#endif
}

// How many clusters run at once, and why none if that is 0.
py::tuple capacity([[maybe_unused]] int R, [[maybe_unused]] int blocks, [[maybe_unused]] int device) {
#ifdef ADAPTERKERN_WITH_CLUSTERS
  const char* error = nullptr;
  const int found = most_clusters(R, blocks, device, &error);
  return py::make_tuple(found, error ? error : "");
#else
  return py::make_tuple(0, "the extension was built without them: for no card that has clusters, or without nvcc");
#endif
}

void launch(uintptr_t x, uintptr_t index, uintptr_t a, uintptr_t c, uintptr_t w, uintptr_t bias, uintptr_t y, uintptr_t z,
            uintptr_t mean, uintptr_t rstd, int64_t stride, unsigned rows, unsigned sequence, int d, int padded_d, int r,
            int columns, float eps, int activation, [[maybe_unused]] int R, [[maybe_unused]] int blocks,
            [[maybe_unused]] int clusters, [[maybe_unused]] int device, [[maybe_unused]] uintptr_t stream) {
  const Forward p{pointer<uint16_t>(x), pointer<int64_t>(index), pointer<uint16_t>(a), pointer<float>(c),
                  pointer<uint16_t>(w), pointer<float>(bias),    pointer<uint16_t>(y), pointer<uint16_t>(z),
                  pointer<float>(mean), pointer<float>(rstd),    stride,               rows,
                  sequence,             d,                       padded_d,             r,
                  columns,              eps,                     Activation(activation)};
#ifdef ADAPTERKERN_WITH_CLUSTERS
  if (const char* error = forward(p, R, blocks, clusters, device, pointer<void>(stream)))
    throw std::runtime_error(std::string("the forward by clusters: ") + error);
#else
  (void)p;
#endif
}

}  // namespace

void bind_clusters(py::module_& m) {
  m.def("cluster_columns", &columns);
  m.def("cluster_capacity", &capacity);
  m.def("cluster_forward", &launch);
}
