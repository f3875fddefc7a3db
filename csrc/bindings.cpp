// The Python bindings of the two passes: raw pointers, sizes and a raw stream. Nothing here owns device memory: the
// tensors behind the pointers must outlive the calls, which adapterkern/optim/backends.py ensures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "clipped_adamw.h"

namespace py = pybind11;
using namespace adapterkern;
using namespace pybind11::literals;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

#ifdef ADAPTERKERN_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

[[maybe_unused]] void check(const char* error) {
  if (error) throw std::runtime_error(std::string("adapterkern's CUDA kernels: ") + error);
}

// Where to run: on the CPU with `threads` if device < 0, otherwise on a CUDA device and its stream. `early`: the update may
// start before the norm's pass is complete, where launches_early(device).
struct Where {
  int device, threads;
  uintptr_t stream;
  bool early;
};

void sum_squares(const Table& table, const Clip& clip, uintptr_t slots, uintptr_t scalars, const Where& at) {
  py::gil_scoped_release release;
#ifdef ADAPTERKERN_WITH_CUDA
  if (at.device >= 0)
    return check(cuda::sum_squares(table, clip, pointer<double>(slots), pointer<Scalars>(scalars), at.device,
                                   pointer<void>(at.stream)));
#endif
  cpu::sum_squares(table, clip, pointer<double>(slots), pointer<Scalars>(scalars), at.threads);
}

void finish_scalars(const Clip& clip, uintptr_t scalars, const Where& at) {
#ifdef ADAPTERKERN_WITH_CUDA
  if (at.device >= 0) return check(cuda::finish(clip, pointer<Scalars>(scalars), at.device, pointer<void>(at.stream)));
#endif
  cpu::finish(clip, pointer<Scalars>(scalars));
}

void update(const Table& table, const std::vector<Group>& groups, uintptr_t scalars, bool clear_grads, uint32_t seed,
            const Where& at) {
  for (const Tensor& t : table.tensors)
    if (t.group >= groups.size()) throw std::out_of_range("groups: expected those that the table was made for, got fewer");
  py::gil_scoped_release release;
#ifdef ADAPTERKERN_WITH_CUDA
  if (at.device >= 0)
    return check(cuda::update(table, groups, pointer<Scalars>(scalars), clear_grads, seed, at.early, at.device,
                              pointer<void>(at.stream)));
#endif
  cpu::update(table, groups, pointer<Scalars>(scalars), clear_grads, seed, at.threads);
}

// Why this build cannot run on CUDA device `device`, or None if it can.
const char* cuda_unavailable([[maybe_unused]] int device) {
#ifdef ADAPTERKERN_WITH_CUDA
  return cuda::unavailable(device);
#else
  return "the extension was built without CUDA kernels, because no CUDA toolkit was found or it failed";
#endif
}

// Whether the update's launch on CUDA device `device` may be early.
bool launches_early([[maybe_unused]] int device) {
#ifdef ADAPTERKERN_WITH_CUDA
  return cuda::launches_early(device);
#else
  return false;
#endif
}

}  // namespace

void bind_adapter(py::module_& m);
void bind_clusters(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Over raw pointers: clipped AdamW, see csrc/clipped_adamw.h and adapterkern/optim/backends.py; the adapter on a "
      "CPU, see csrc/adapter_cpu.h and adapterkern/ops/native.py; its kernels by clusters, see csrc/adapter_cluster.h and "
      "adapterkern/ops/kernels/clusters.py.";
  bind_adapter(m);
  bind_clusters(m);
  m.attr("VERSION") = 7;  // adapterkern/extension.py asks for it
  m.attr("TILE") = kTile;
  m.attr("WITH_CUDA") = kWithCuda;

  m.attr("KINDS") = py::dict("float32"_a = int(Kind::kFloat32), "bf16_master"_a = int(Kind::kBf16Master),
                             "fp16_master"_a = int(Kind::kFp16Master),
                             "bf16_stochastic"_a = int(Kind::kBf16Stochastic));

  py::class_<Table>(m, "Table")
      .def(py::init<>())
      .def_readonly("tiles", &Table::tiles)
      .def("add",
           [](Table& table, int kind, int64_t count, int group, uintptr_t main, uintptr_t exp_avg,
              uintptr_t exp_avg_sq, uintptr_t rounded, uintptr_t step) {
             table.add({pointer<void>(main), nullptr, pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                        pointer<void>(rounded), pointer<float>(step), count, 0, uint16_t(group), Kind(kind)});
           })
      .def("set_grads", [](Table& table, const std::vector<uintptr_t>& grads) {
        if (grads.size() != table.tensors.size()) throw std::invalid_argument("expected one gradient per tensor");
        for (size_t i = 0; i < grads.size(); ++i) table.tensors[i].grad = pointer<void>(grads[i]);
      });

  py::class_<Group>(m, "Group")
      .def(py::init([](double lr, uintptr_t lr_tensor, double beta1, double beta2, double eps, double weight_decay,
                       uintptr_t weight_decay_tensor, bool maximize) {
        return Group{pointer<float>(lr_tensor), pointer<float>(weight_decay_tensor), float(lr), float(weight_decay),
                     float(1 - beta1), float(beta2), float(1 - beta2), float(std::log(beta1)), float(std::log(beta2)),
                     float(eps), maximize ? -1.0f : 1.0f};
      }));

  py::class_<Clip>(m, "Clip").def(
      py::init([](uintptr_t grad_scale, uintptr_t found_inf, double max_norm, uintptr_t max_norm_tensor) {
        return Clip{pointer<float>(grad_scale), pointer<float>(found_inf), pointer<float>(max_norm_tensor),
                    float(max_norm)};
      }));

  py::class_<Where>(m, "Where").def(py::init([](int device, int threads, uintptr_t stream, bool early) {
    return Where{device, threads, stream, early};
  }));

  m.def("sum_squares", &sum_squares);
  m.def("finish", &finish_scalars);
  m.def("update", &update);
  m.def("cuda_unavailable", &cuda_unavailable, py::arg("device"));
  m.def("launches_early", &launches_early, py::arg("device"));
}
