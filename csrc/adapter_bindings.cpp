// The Python bindings of the adapter's CPU kernels: raw pointers and sizes. The tensors behind the pointers must outlive
// the calls, which adapterkern/ops/native.py ensures.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
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

// One adapter of a call, with the positions of its rows in `order`: [begin, end)
using Share = std::tuple<const Prepared*, int64_t, int64_t>;
// A gate for each row, or null; the rate of dropout as rate·2³², what multiplies the units that stay, the seed, and the
// numbers of the rows for the mask, or null
using Gating = std::tuple<uintptr_t, uint32_t, float, int64_t, uintptr_t>;

Drop drop_of(const Gating& g) {
  return {uint64_t(std::get<3>(g)), std::get<1>(g), std::get<2>(g), pointer<const int64_t>(std::get<4>(g))};
}

// The kernels of a call; there is at least one adapter, and all have the same shapes.
const Kernels& kernels_of(const std::vector<Share>& adapters, int stream) {
  const Prepared& first = *std::get<0>(adapters.at(0));
  return kernels_of(first.isa, stream, first.compute);
}

// What a call has around its adapter: the tensors x, added, s, n, rstd and the weight of an RMSNorm, the strides of x and
// added, and eps
using AroundGiven = std::tuple<std::array<uintptr_t, 6>, std::array<int64_t, 2>, double>;

Around around_of(const AroundGiven& given) {
  const auto& [t, strides, eps] = given;
  return {strides[0], strides[1], pointer<const void>(t[0]), pointer<const void>(t[1]), pointer<void>(t[2]),
          pointer<const float>(t[5]), float(eps), pointer<void>(t[3]), pointer<float>(t[4])};
}

void run_forward(const std::vector<Share>& adapters, int stream, int64_t x_stride, int64_t residual_stride, uintptr_t x,
                 uintptr_t residual, uintptr_t y, const std::array<uintptr_t, 3>& saved, uintptr_t order,
                 const Gating& gating, double eps, int activation, const std::optional<AroundGiven>& given,
                 int threads) {
  const Forward f{x_stride, residual_stride, pointer<const void>(x), pointer<const void>(residual), pointer<void>(y),
                  pointer<void>(saved[0]), pointer<float>(saved[1]), pointer<float>(saved[2]),
                  pointer<const int64_t>(order), pointer<const float>(std::get<0>(gating)), drop_of(gating), float(eps),
                  Activation(activation)};
  const Kernels& kernels = kernels_of(adapters, stream);
  std::vector<Adapter> all;
  for (const auto& [prepared, begin, end] : adapters) all.push_back({prepared->w, {begin, end}});
  const Around around = given ? around_of(*given) : Around{};
  py::gil_scoped_release release;
  forward(kernels, f, all, given ? &around : nullptr, threads);
}

// The memory between the two passes of a backward, of several adapters with these numbers of rows.
struct Memory {
  char* next;
  template <class T>
  void take(T*& to, int64_t count) {
    to = reinterpret_cast<T*>(next);
    next += align(4 * count);
  }
  void take(const Kernels& kernels, int64_t rows, Gradients& g) {
    const Sizes n = sizes(kernels, rows, g.w.d, g.w.r);
    const int64_t rp = padded(g.w.r, kRank);
    take(g.dz_rows, n.rows);
    take(g.dz_cols, n.cols);
    take(g.h_cols, n.cols);
    take(g.kappa, padded(rows, kRows));
    take(g.sums, n.blocks * rp);
    take(g.s, rp);
  }
};

int64_t backward_bytes(const std::vector<Share>& adapters, int stream) {
  const Kernels& kernels = kernels_of(adapters, stream);
  Memory memory{nullptr};
  for (const auto& [prepared, begin, end] : adapters) {
    Gradients g{};
    g.w = prepared->w;
    memory.take(kernels, end - begin, g);
  }
  return int64_t(reinterpret_cast<uintptr_t>(memory.next)) + 64;
}

void run_backward(const std::vector<Share>& adapters, int stream, int64_t x_stride, int64_t dy_stride,
                  const std::array<uintptr_t, 5>& inputs, uintptr_t order, const Gating& gating, int activation,
                  bool residual, uintptr_t dx, uintptr_t d_gate, const std::vector<std::array<uintptr_t, 6>>& grads,
                  uintptr_t memory, int threads) {
  const Kernels& kernels = kernels_of(adapters, stream);
  const Backward b{x_stride, dy_stride, pointer<const void>(inputs[0]), pointer<const void>(inputs[1]),
                   pointer<const void>(inputs[2]), pointer<const float>(inputs[3]), pointer<const float>(inputs[4]),
                   pointer<const int64_t>(order), pointer<const float>(std::get<0>(gating)), drop_of(gating),
                   Activation(activation), residual, pointer<void>(dx), pointer<float>(d_gate)};
  Memory rest{pointer<char>(uintptr_t(align(int64_t(memory))))};
  std::vector<Gradients> all;
  for (size_t e = 0; e < adapters.size(); ++e) {
    const auto& [prepared, begin, end] = adapters[e];
    Gradients g{};
    g.w = prepared->w, g.rows = {begin, end};
    float** const to[] = {&g.d_norm_weight, &g.d_norm_bias, &g.d_down_weight,
                          &g.d_down_bias,   &g.d_up_weight, &g.d_up_bias};
    for (size_t i = 0; i < 6; ++i) *to[i] = pointer<float>(grads.at(e)[i]);
    rest.take(kernels, end - begin, g);
    all.push_back(g);
  }
  py::gil_scoped_release release;
  backward(kernels, b, all, threads);
}

void run_norm_backward(const std::string& isa, int stream, int64_t rows, int64_t d, int64_t dn_stride, int64_t y_stride,
                       uintptr_t dn, uintptr_t y, uintptr_t weight, uintptr_t rstd, uintptr_t dy, int threads) {
  const Kernels& kernels = kernels_of(isa, stream, int(Dtype::kFloat32));  // without products
  const NormBackward b{dn_stride, y_stride, pointer<const void>(dn), pointer<const void>(y),
                       pointer<const float>(weight), pointer<const float>(rstd), pointer<void>(dy)};
  py::gil_scoped_release release;
  norm_backward(kernels, b, rows, d, threads);
}

}  // namespace

void bind_adapter(py::module_& m) {
  m.attr("DTYPES") = py::dict(py::arg("float32") = int(Dtype::kFloat32), py::arg("bfloat16") = int(Dtype::kBfloat16),
                              py::arg("float16") = int(Dtype::kFloat16));
  m.attr("ACTIVATIONS") =
      py::dict(py::arg("silu") = int(Activation::kSilu), py::arg("gelu") = int(Activation::kGelu),
               py::arg("relu") = int(Activation::kRelu), py::arg("tanh") = int(Activation::kTanh),
               py::arg("identity") = int(Activation::kIdentity));
  m.def("instruction_sets", &instruction_sets);
  m.def("left_out", &left_out);
  m.attr("LEFT_OUT_BECAUSE") = kLeftOutBecause;
  m.def("packed_bytes", [](const std::string& isa, int compute, int64_t d, int64_t r) {
    return packed_bytes(kernels_of(isa, 0, compute), d, r);
  });
  m.def("sort_rows", [](uintptr_t index, int64_t count, int64_t each, int64_t n, uintptr_t order) {
    return sort_rows(pointer<const int64_t>(index), count, each, n, pointer<int64_t>(order));
  });
  m.def("copy_rows", [](uintptr_t order, int64_t rows, uintptr_t from, int64_t stride, uintptr_t to, int64_t bytes,
                        int threads) {
    py::gil_scoped_release release;
    copy_rows(pointer<const int64_t>(order), rows, pointer<const char>(from), stride, pointer<char>(to), bytes, threads);
  });
  py::class_<Prepared>(m, "PreparedAdapter").def(py::init(&prepared));
  m.def("forward", &run_forward);
  m.def("backward_bytes", &backward_bytes);
  m.def("backward", &run_backward);
  m.def("norm_backward", &run_norm_backward);
}
