// The Python bindings of the adapter's CPU kernels: raw pointers and sizes. The tensors behind the pointers must outlive
// the calls, which adapterkern/ops/native.py ensures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "adapter_cpu.h"

namespace py = pybind11;
using namespace adapterkern::cpu;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr std::array<const char*, 4> kNames = {"avx2", "avx512", "avx512_bf16", "amx"};

Isa isa_of(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return Isa(i);
  return Isa::kNone;
}

// The instruction sets that this machine and this build have, the best one last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (int i = 0; i <= int(best_isa()); ++i)
    if (is_built(Isa(i))) found.push_back(kNames[size_t(i)]);
  return found;
}

// Those that this build lacks, and why.
std::vector<std::string> left_out() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kNames.size(); ++i)
    if (!is_built(Isa(i))) names.push_back(kNames[i]);
  return names;
}

#ifndef __x86_64__
constexpr const char* kLeftOutBecause = "this build is not for x86-64";
#elif defined(__clang__)
constexpr const char* kLeftOutBecause = "the compiler of this build, " __VERSION__ ", or its assembler does not know them";
#else
constexpr const char* kLeftOutBecause = "the compiler of this build, GCC " __VERSION__ ", or its assembler does not know them";
#endif

const Kernels& kernels_of(const std::string& isa, int stream, int compute) {
  const Kernels* found = find_kernels(isa_of(isa), Dtype(stream), Dtype(compute));
  if (!found) throw std::invalid_argument("no kernels of " + isa + " for these dtypes");
  return *found;
}

// An adapter's parameters, and what prepare() makes of them for products in one dtype.
struct Prepared {
  std::string isa;
  int compute;
  Weights w;
};

int64_t align(int64_t bytes) { return padded(bytes, 64); }

// Bytes of what prepare() makes.
int64_t packed_bytes(const Kernels& kernels, int64_t d, int64_t r) {
  return 4 * align(4 * sizes(kernels, 0, d, r).packed) + align(4 * padded(r, kRank)) + 64;
}

Prepared prepared(const std::string& isa, int compute, int64_t d, int64_t r, const std::array<uintptr_t, 6>& from,
                  uintptr_t memory, int threads) {
  const Kernels& kernels = kernels_of(isa, 0, compute);
  char* next = pointer<char>(uintptr_t(align(int64_t(memory))));
  const auto take = [&](int64_t bytes) {
    char* here = next;
    next += align(bytes);
    return here;
  };
  const int64_t packed = 4 * sizes(kernels, 0, d, r).packed;
  Weights w{d, r};
  const float** const inputs[] = {&w.norm_weight, &w.norm_bias, &w.down_weight, &w.down_bias, &w.up_weight, &w.up_bias};
  for (size_t i = 0; i < 6; ++i) *inputs[i] = pointer<const float>(from[i]);
  for (uint32_t** to : {&w.down_k, &w.down_n, &w.up_k, &w.up_n}) *to = reinterpret_cast<uint32_t*>(take(packed));
  w.c = reinterpret_cast<float*>(take(4 * padded(r, kRank)));
  py::gil_scoped_release release;
  prepare(kernels, w, threads);
  return {isa, compute, w};
}

void run_forward(const Prepared& p, int stream, int64_t rows, int64_t x_stride, int64_t residual_stride, uintptr_t x,
                 uintptr_t residual, uintptr_t y, const std::array<uintptr_t, 3>& saved, double eps, int activation,
                 int threads) {
  const Forward f{p.w, rows, x_stride, residual_stride, pointer<const void>(x), pointer<const void>(residual),
                  pointer<void>(y), pointer<void>(saved[0]), pointer<float>(saved[1]), pointer<float>(saved[2]),
                  float(eps), Activation(activation)};
  const Kernels& kernels = kernels_of(p.isa, stream, p.compute);
  py::gil_scoped_release release;
  forward(kernels, f, threads);
}

// Bytes of the memory between the two passes of a backward of `rows` rows.
int64_t backward_bytes(const Prepared& p, int stream, int64_t rows) {
  const Sizes n = sizes(kernels_of(p.isa, stream, p.compute), rows, p.w.d, p.w.r);
  const int64_t rp = padded(p.w.r, kRank);
  return align(4 * n.rows) + 2 * align(4 * n.cols) + align(4 * padded(rows, kRows)) + align(4 * n.blocks * rp) +
         align(4 * rp) + 64;
}

void run_backward(const Prepared& p, int stream, int64_t rows, int64_t x_stride, int64_t dy_stride,
                  const std::array<uintptr_t, 5>& inputs, int activation, bool residual,
                  const std::array<uintptr_t, 7>& grads, uintptr_t memory, int threads) {
  const Kernels& kernels = kernels_of(p.isa, stream, p.compute);
  const Sizes n = sizes(kernels, rows, p.w.d, p.w.r);
  const int64_t rp = padded(p.w.r, kRank);
  char* next = pointer<char>(uintptr_t(align(int64_t(memory))));
  const auto take = [&](int64_t count) {
    char* here = next;
    next += align(4 * count);
    return here;
  };
  Backward b{};
  b.w = p.w;
  b.rows = rows, b.x_stride = x_stride, b.dy_stride = dy_stride;
  b.x = pointer<const void>(inputs[0]), b.dy = pointer<const void>(inputs[1]), b.z = pointer<const void>(inputs[2]);
  b.mean = pointer<const float>(inputs[3]), b.rstd = pointer<const float>(inputs[4]);
  b.activation = Activation(activation);
  b.residual = residual;
  b.dx = pointer<void>(grads[0]);
  float** const to[] = {&b.d_norm_weight, &b.d_norm_bias, &b.d_down_weight,
                        &b.d_down_bias,   &b.d_up_weight, &b.d_up_bias};
  for (size_t i = 0; i < 6; ++i) *to[i] = pointer<float>(grads[i + 1]);
  b.dz_rows = reinterpret_cast<uint32_t*>(take(n.rows));
  b.dz_cols = reinterpret_cast<uint32_t*>(take(n.cols));
  b.h_cols = reinterpret_cast<uint32_t*>(take(n.cols));
  b.kappa = reinterpret_cast<float*>(take(padded(rows, kRows)));
  b.sums = reinterpret_cast<float*>(take(n.blocks * rp));
  b.s = reinterpret_cast<float*>(take(rp));
  py::gil_scoped_release release;
  backward(kernels, b, threads);
}

}  // namespace

void bind_adapter(py::module_& m) {
  m.attr("DTYPES") = py::dict(py::arg("float32") = int(Dtype::kFloat32), py::arg("bfloat16") = int(Dtype::kBfloat16),
                              py::arg("float16") = int(Dtype::kFloat16));
  m.attr("ACTIVATIONS") =
      py::dict(py::arg("silu") = int(Activation::kSilu), py::arg("gelu") = int(Activation::kGelu),
               py::arg("relu") = int(Activation::kRelu), py::arg("tanh") = int(Activation::kTanh),
               py::arg("identity") = int(Activation::kIdentity));
  m.attr("ADAPTER_VERSION") = 2;  // adapterkern/ops/native.py asks for it
  m.def("instruction_sets", &instruction_sets);
  m.def("left_out", &left_out);
  m.attr("LEFT_OUT_BECAUSE") = kLeftOutBecause;
  m.def("packed_bytes", [](const std::string& isa, int compute, int64_t d, int64_t r) {
    return packed_bytes(kernels_of(isa, 0, compute), d, r);
  });
  py::class_<Prepared>(m, "PreparedAdapter")
      .def(py::init(&prepared))
      .def("forward", &run_forward)
      .def("backward_bytes", &backward_bytes)
      .def("backward", &run_backward);
}
