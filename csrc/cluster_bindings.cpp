// The Python bindings of the kernels by clusters: raw pointers, sizes and a raw stream. The tensors behind the pointers
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

int columns([[maybe_unused]] int pass, [[maybe_unused]] int R) {
#ifdef ADAPTERKERN_WITH_CLUSTERS
  return most_columns(Pass(pass), R);
#else
  return 0;
#endif
}

// How many clusters run at once, and why none if that is 0.
py::tuple capacity([[maybe_unused]] int pass, [[maybe_unused]] int R, [[maybe_unused]] int blocks,
                   [[maybe_unused]] int device) {
#ifdef ADAPTERKERN_WITH_CLUSTERS
  const char* error = nullptr;
  const int found = most_clusters(Pass(pass), R, blocks, device, &error);
  return py::make_tuple(found, error ? error : "");
#else
  return py::make_tuple(0, "the extension was built without them: for no card that has clusters, or without nvcc");
#endif
}

// What both passes are given of the rows, and how they are launched.
struct How {
  Rows rows;
  Grid grid;
};

How how(uintptr_t index, unsigned rows, unsigned sequence, int d, int padded_d, int r, int columns, int activation, int R,
        int blocks, int clusters, int device, uintptr_t stream, bool early) {
  return {{pointer<int64_t>(index), rows, sequence, d, padded_d, r, columns, Activation(activation)},
          {R, blocks, clusters, device, pointer<void>(stream), early}};
}

void check([[maybe_unused]] const char* error) {
  if (error) throw std::runtime_error(std::string("the kernels by clusters: ") + error);
}

void run_forward(const How& how, uintptr_t x, uintptr_t a, uintptr_t c, uintptr_t w, uintptr_t bias, uintptr_t y,
                 uintptr_t z, uintptr_t mean, uintptr_t rstd, int64_t stride, float eps, uintptr_t next_weight,
                 uintptr_t n, uintptr_t next_rstd, float next_eps) {
  [[maybe_unused]] const Forward p{how.rows,           pointer<uint16_t>(x),    pointer<uint16_t>(a), pointer<float>(c),
                                   pointer<uint16_t>(w), pointer<float>(bias),    pointer<uint16_t>(y), pointer<uint16_t>(z),
                                   pointer<float>(mean), pointer<float>(rstd), stride, eps,
                                   {pointer<float>(next_weight), pointer<uint16_t>(n), pointer<float>(next_rstd), next_eps}};
#ifdef ADAPTERKERN_WITH_CLUSTERS
  check(forward(p, how.grid));
#endif
}

void run_backward(const How& how, uintptr_t dy, uintptr_t x, uintptr_t z, uintptr_t mean, uintptr_t rstd, uintptr_t a,
                  uintptr_t row_sums, uintptr_t c, uintptr_t w, uintptr_t dx, uintptr_t g, uintptr_t u, uintptr_t dz,
                  uintptr_t q, uintptr_t dbias, int64_t stride) {
  [[maybe_unused]] const Backward p{
      how.rows, pointer<uint16_t>(dy), pointer<uint16_t>(x), pointer<uint16_t>(z), pointer<float>(mean),
      pointer<float>(rstd), pointer<uint16_t>(a), pointer<float>(row_sums), pointer<float>(c), pointer<uint16_t>(w),
      pointer<uint16_t>(dx), pointer<float>(g), pointer<float>(u), pointer<float>(dz), pointer<float>(q),
      pointer<float>(dbias), stride};
#ifdef ADAPTERKERN_WITH_CLUSTERS
  check(backward(p, how.grid));
#endif
}

}  // namespace

void bind_clusters(py::module_& m) {
  m.def("cluster_columns", &columns);
  m.def("cluster_capacity", &capacity);
  py::class_<How>(m, "ClusterLaunch", py::module_local())
      .def(py::init(&how), py::kw_only(), py::arg("index"), py::arg("rows"), py::arg("sequence"), py::arg("d"),
           py::arg("padded_d"), py::arg("r"), py::arg("columns"), py::arg("activation"), py::arg("R"), py::arg("blocks"),
           py::arg("clusters"), py::arg("device"), py::arg("stream"), py::arg("early"));
  m.def("cluster_forward", &run_forward);
  m.def("cluster_backward", &run_backward);
}
