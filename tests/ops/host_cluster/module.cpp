// A module with the functions of csrc/cluster_bindings.cpp, whose clusters run on the host: see host_ops.h.
#include <pybind11/pybind11.h>

#include "adapter_cluster_kernel.h"

namespace adapterkern::cluster {
namespace {

bool narrow;
unsigned seed;

template <class K>
std::string run(const Forward& p, int blocks, int clusters) {
  return host::run(clusters, blocks, kThreads, sizeof(typename K::Shared), seed, [p] { forward<K>(p); });
}

// Those of csrc/adapter_cluster.cu, or with few columns per block, so that many blocks have little to do.
std::string choose(const Forward& p, int R, int blocks, int clusters) {
  switch (R) {
    case 16: return narrow ? run<Config<16, 128, 3>>(p, blocks, clusters) : run<Config<16, 512, 5>>(p, blocks, clusters);
    case 32: return narrow ? run<Config<32, 64, 5>>(p, blocks, clusters) : run<Config<32, 512, 5>>(p, blocks, clusters);
    case 64: return narrow ? run<Config<64, 64, 3>>(p, blocks, clusters) : run<Config<64, 512, 5>>(p, blocks, clusters);
    default: return narrow ? run<Config<128, 64, 4>>(p, blocks, clusters) : run<Config<128, 256, 7>>(p, blocks, clusters);
  }
}

void allow(const void* from, int64_t bytes) {
  const char* begin = static_cast<const char*>(from);
  host::ranges.push_back({begin, begin + bytes});
}

}  // namespace

int most_columns(int R) {
  if (R > 128) return 0;
  return narrow ? (R == 16 ? 128 : 64) : R == 128 ? 256 : 512;
}

int most_clusters(int, int, int, const char** error) {
  *error = nullptr;
  return 3;
}

const char* forward(const Forward& p, int R, int blocks, int clusters, int, void*) {
  static std::string error;
  int64_t adapters = 1;
  for (unsigned row = 0; p.index && row < p.rows; row += p.sequence)
    adapters = std::max(adapters, p.index[row / p.sequence] + 1);
  host::ranges.clear();
  allow(p.x, ((p.rows - 1) * p.stride + p.d) * 2);
  allow(p.y, int64_t(p.rows) * p.d * 2);
  allow(p.a, adapters * R * p.padded_d * 2);
  allow(p.w, adapters * R * p.padded_d * 2);
  error = choose(p, R, blocks, clusters);
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace adapterkern::cluster

void bind_clusters(pybind11::module_& m);

PYBIND11_MODULE(host_cluster, m) {
  bind_clusters(m);
  // `ignored`: a line of the kernel whose barrier is left out; −1 for none.
  m.def("set", [](bool narrow, unsigned seed, int ignored) {
    adapterkern::cluster::narrow = narrow, adapterkern::cluster::seed = seed;
    adapterkern::cluster::host::ignored = ignored;
  });
}
