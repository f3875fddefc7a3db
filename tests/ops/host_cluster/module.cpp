// A module with the functions of csrc/cluster_bindings.cpp, whose clusters run on the host: see host_ops.h.
#include <pybind11/pybind11.h>

#include "adapter_cluster_backward.h"
#include "adapter_cluster_forward.h"

namespace adapterkern::cluster {
namespace {

bool narrow;
unsigned seed;
bool early;  // whether the last launch was to be early

// A kernel, and the most columns of its blocks.
struct Chosen {
  int columns;
  std::string (*run)(const void* p, int blocks, int clusters);
};

template <class K, class P, void (*kRun)(const P&)>
Chosen chosen() {
  return {K::kColumns, [](const void* p, int blocks, int clusters) {
            const auto body = [of = *static_cast<const P*>(p)] { kRun(of); };
            return host::run(clusters, blocks, K::kThreads, sizeof(typename K::Shared), seed, body);
          }};
}

template <int R, int kColumns, int kBuffers>
Chosen chosen_forward() {
  using K = ForwardConfig<R, kColumns, kBuffers>;
  return chosen<K, Forward, forward<K>>();
}

template <int R, int kColumns, int kBuffers>
Chosen chosen_backward() {
  using K = BackwardConfig<R, kColumns, kBuffers>;
  return chosen<K, Backward, backward<K>>();
}

// Those of csrc/adapter_cluster.cu, or with few columns per block, so that many blocks have little to do.
Chosen choose(Pass pass, int R) {
  if (pass == Pass::kBackward) switch (R) {
      case 16: return narrow ? chosen_backward<16, 128, 3>() : chosen_backward<16, 256, 5>();
      case 32: return narrow ? chosen_backward<32, 128, 5>() : chosen_backward<32, 256, 5>();
      case 64: return narrow ? chosen_backward<64, 128, 2>() : chosen_backward<64, 256, 4>();
      default: return {};
    }
  switch (R) {
    case 16: return narrow ? chosen_forward<16, 128, 3>() : chosen_forward<16, 512, 5>();
    case 32: return narrow ? chosen_forward<32, 64, 5>() : chosen_forward<32, 512, 5>();
    case 64: return narrow ? chosen_forward<64, 64, 3>() : chosen_forward<64, 512, 5>();
    case 128: return narrow ? chosen_forward<128, 64, 4>() : chosen_forward<128, 256, 7>();
    default: return {};
  }
}

void allow(const void* from, int64_t bytes) {
  const char* begin = static_cast<const char*>(from);
  host::ranges.push_back({begin, begin + bytes});
}

}  // namespace

int most_columns(Pass pass, int R) { return choose(pass, R).columns; }

int most_clusters(Pass, int, int, int, const char** error) {
  *error = nullptr;
  return 3;
}

const char* run(Pass pass, const void* p, const Grid& grid) {
  static std::string error;
  early = grid.early;
  error = choose(pass, grid.R).run(p, grid.blocks, grid.clusters);
  host::ranges.clear();
  return error.empty() ? nullptr : error.c_str();
}

const char* forward(const Forward& p, const Grid& grid) {
  int64_t adapters = 1;
  for (unsigned row = 0; p.index && row < p.rows; row += p.sequence)
    adapters = std::max(adapters, p.index[row / p.sequence] + 1);
  allow(p.x, ((p.rows - 1) * p.stride + p.d) * 2);
  allow(p.y, int64_t(p.rows) * p.d * 2);
  allow(p.next.n, p.next.n ? int64_t(p.rows) * p.d * 2 : 0);
  allow(p.a, adapters * grid.R * p.padded_d * 2);
  allow(p.w, adapters * grid.R * p.padded_d * 2);
  return run(Pass::kForward, &p, grid);
}

const char* backward(const Backward& p, const Grid& grid) {
  allow(p.x, ((p.rows - 1) * p.stride + p.d) * 2);
  allow(p.dy, int64_t(p.rows) * p.d * 2);
  allow(p.dx, p.dx ? int64_t(p.rows) * p.d * 2 : 0);
  allow(p.z, int64_t(p.rows) * p.r * 2);
  allow(p.a, int64_t(grid.R) * p.padded_d * 2);
  allow(p.w, int64_t(grid.R) * p.padded_d * 2);
  return run(Pass::kBackward, &p, grid);
}

}  // namespace adapterkern::cluster

void bind_clusters(pybind11::module_& m);

PYBIND11_MODULE(host_cluster, m) {
  bind_clusters(m);
  // `ignored`: a line of the kernel whose barrier is left out; −1 for none.
  m.def("set", [](bool narrow, unsigned seed, int ignored) {
    adapterkern::cluster::narrow = narrow, adapterkern::cluster::seed = seed;
    adapterkern::cluster::host::ignored = ignored, adapterkern::cluster::host::reached = false;
  });
  m.def("reached", [] { return adapterkern::cluster::host::reached; });
  m.def("was_early", [] { return adapterkern::cluster::early; });
}
