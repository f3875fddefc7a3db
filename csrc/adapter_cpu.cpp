// Which instruction set, which memory, which thread: see adapter_cpu.h.
#include "adapter_cpu.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AK_X86 1
#endif

namespace adapterkern::cpu {
namespace {

#ifdef AK_X86
// Linux gives a process the tiles' registers when it asks for them.
bool tiles_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_tiles() {
#ifdef AK_EMULATE_TILES
  return true;
#endif
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) && tiles_permitted();
}

// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
}
#endif

struct Free {
  void operator()(char* p) const { free(p); }
};

// Memory of this thread, which grows and is kept; null if there is none
char* scratch(size_t bytes) {
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    memory.reset(static_cast<char*>(aligned_alloc(4096, size_t(padded(int64_t(bytes), 4096)))));
    size = memory ? bytes : 0;
  }
  return memory.get();
}

// body(piece, the one that this thread is likely to take next, scratch) for pieces [0, n), which threads take as they
// come: which thread takes what leaves no trace.
template <class Body>
void share(int threads, int64_t n, const Kernels& kernels, size_t bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};  // no exception may leave an OpenMP region
  const int useful = n < threads ? int(n) : threads;
  on_threads(threads, useful, [&] {
    char* memory = scratch(bytes);
    if (!memory) {
      failed = true;
      return;
    }
    kernels.enter();
    for (int64_t i; (i = next.fetch_add(1)) < n;) body(i, i + useful, memory);
    kernels.leave();
  });
  if (failed) throw std::bad_alloc();
}

int64_t ceiling(int64_t n, int64_t by) { return (n + by - 1) / by; }

// body(begin, end, scratch) for pieces of [0, n)
template <class Body>
void share_range(int threads, int64_t n, int64_t piece, const Kernels& kernels, size_t bytes, const Body& body) {
  share(threads, ceiling(n, piece), kernels, bytes, [&](int64_t i, int64_t, char* memory) {
    body(i * piece, (i + 1) * piece < n ? (i + 1) * piece : n, memory);
  });
}

// body(adapter, a block of its rows, the block that this thread is likely to take next, scratch) for all blocks of all
// adapters, those of one adapter after another: their weights are in the caches.
template <class One, class Scratch, class Body>
void share_blocks(int threads, const std::vector<One>& adapters, const Kernels& kernels, const Scratch& scratch,
                  const Body& body) {
  if (adapters.empty()) return;
  std::vector<int64_t> first(1, 0);  // the number of each adapter's first block, and of all
  for (const One& one : adapters) first.push_back(first.back() + ceiling(one.rows.end - one.rows.begin, kRows));
  const auto adapter_of = [&](int64_t i) { return std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1; };
  const auto block_of = [&](int64_t i) {
    if (i >= first.back()) return Rows{0, 0};
    const auto e = size_t(adapter_of(i));
    const int64_t begin = adapters[e].rows.begin + (i - first[e]) * kRows, end = adapters[e].rows.end;
    return Rows{begin, begin + kRows < end ? begin + kRows : end};
  };
  share(threads, first.back(), kernels, scratch(adapters[0].w), [&](int64_t i, int64_t following, char* memory) {
    body(adapters[size_t(adapter_of(i))], block_of(i), block_of(following), memory);
  });
}

}  // namespace

Isa best_isa() {
#ifdef AK_X86
  static const Isa found = [] {
    __builtin_cpu_init();
    const auto all = [](auto... has) { return (... && has); };
    if (!all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), has_f16c()))
      return Isa::kNone;
    if (!all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512vl"),
             __builtin_cpu_supports("avx512dq")))
      return Isa::kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
    return has_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
  }();
  return found;
#else
  return Isa::kNone;
#endif
}

bool is_built([[maybe_unused]] Isa isa) {
  switch (isa) {
#ifdef AK_WITH_AVX2
    case Isa::kAvx2: return true;
#endif
#ifdef AK_WITH_AVX512
    case Isa::kAvx512: return true;
#endif
#ifdef AK_WITH_AVX512BF16
    case Isa::kAvx512Bf16: return true;
#endif
#ifdef AK_WITH_AMX
    case Isa::kAmx: return true;
#endif
    default: return false;
  }
}

const Kernels* find_kernels(Isa isa, [[maybe_unused]] Dtype stream, [[maybe_unused]] Dtype compute) {
  const Kernels* found = nullptr;
#ifdef AK_WITH_AMX
  if (isa >= Isa::kAmx) found = amx::kernels(stream, compute);
#endif
#ifdef AK_WITH_AVX512BF16
  if (!found && isa >= Isa::kAvx512Bf16) found = avx512bf16::kernels(stream, compute);
#endif
#ifdef AK_WITH_AVX512
  if (!found && isa >= Isa::kAvx512) found = avx512::kernels(stream, compute);
#endif
#ifdef AK_WITH_AVX2
  if (!found && isa >= Isa::kAvx2) found = avx2::kernels(stream, compute);
#endif
  return found;
}

Sizes sizes(const Kernels& kernels, int64_t rows, int64_t d, int64_t r) {
  const int64_t per_unit = kernels.pairs ? 2 : 1, rp = padded(r, kRank);
  return {padded(d, kColumns) * rp / per_unit, padded(rows, kRows) * rp / per_unit,
          padded(rows, kChunk) * rp / per_unit, ceiling(rows, kRows)};
}

void prepare(const Kernels& kernels, const Weights& w, int threads) {
  const int64_t rp = padded(w.r, kRank);
  std::vector<float> means(size_t(rp), 0.0f);
  memset(w.c, 0, size_t(rp) * sizeof(float));
  share_range(threads, w.r, 8, kernels, 64, [&](int64_t begin, int64_t end, char*) {
    kernels.prepare_rows(w, begin, end, means.data());
  });
  share_range(threads, padded(w.d, kColumns), 8 * kColumns, kernels, 64, [&](int64_t begin, int64_t end, char*) {
    kernels.prepare_columns(w, begin, end, means.data());
  });
}

void forward(const Kernels& kernels, const Forward& f, const std::vector<Adapter>& adapters, const Around* around,
             int threads) {
  share_blocks(threads, adapters, kernels, kernels.forward_scratch,
               [&](const Adapter& one, Rows block, Rows following, char* memory) {
                 if (around && around->added) kernels.sum_rows(*around, block, one.w.d);
                 kernels.forward(f, one.w, block, following, memory);
                 if (around) kernels.norm_rows(*around, f.y, block, one.w.d);
               });
}

void norm_backward(const Kernels& kernels, const NormBackward& b, int64_t rows, int64_t d, int threads) {
  share_range(threads, rows, kRows, kernels, 64, [&](int64_t begin, int64_t end, char*) {
    kernels.norm_backward(b, {begin, end}, d);
  });
}

void backward(const Kernels& kernels, const Backward& b, const std::vector<Gradients>& adapters, int threads) {
  const auto no_columns = [&](const Weights& w) { return kernels.backward_scratch(w, 0); };
  share_blocks(threads, adapters, kernels, no_columns,
               [&](const Gradients& one, Rows block, Rows following, char* memory) {
                 kernels.backward_rows(b, one, block, following, memory);
               });
  for (const Gradients& one : adapters) {
    const int64_t rp = padded(one.w.r, kRank), blocks = ceiling(one.rows.end - one.rows.begin, kRows);
    memset(one.s, 0, size_t(rp) * sizeof(float));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t j = 0; j < rp; ++j) one.s[j] += one.sums[block * rp + j];
    if (one.d_down_bias) memcpy(one.d_down_bias, one.s, size_t(one.w.r) * sizeof(float));
  }
  if (adapters.empty()) return;
  const Weights& w = adapters[0].w;  // all have the same shapes
  const int64_t wide = padded(w.d, kColumns), each = padded(ceiling(wide, threads), kColumns);
  const int64_t pieces = ceiling(wide, each);  // of each adapter, one for each thread
  share(threads, int64_t(adapters.size()) * pieces, kernels, kernels.backward_scratch(w, each),
        [&](int64_t i, int64_t, char* memory) {
          const int64_t begin = i % pieces * each;
          kernels.backward_cols(b, adapters[size_t(i / pieces)], begin, begin + each < wide ? begin + each : wide, memory);
        });
}

std::vector<int64_t> sort_rows(const int64_t* index, int64_t count, int64_t each, int64_t n, int64_t* order) {
  std::vector<int64_t> next(size_t(n) + 2, 0);  // where the next row of each goes; at first how many there are before it
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < -1 || index[i] >= n) return {};
    next[size_t(index[i] + 2)] += each;
  }
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  const std::vector<int64_t> begins = next;
  for (int64_t i = 0; i < count; ++i) {
    int64_t& at = next[size_t(index[i] + 1)];
    for (int64_t t = i * each; t < (i + 1) * each; ++t) order[at++] = t;
  }
  return begins;
}

void copy_rows(const int64_t* order, int64_t rows, const char* from, int64_t stride, char* to, int64_t bytes, int threads) {
  std::atomic<int64_t> next{0};
  const int64_t pieces = ceiling(rows, kRows);
  on_threads(threads, pieces < threads ? int(pieces) : threads, [&] {
    for (int64_t i; (i = next.fetch_add(1)) < pieces;)
      for (int64_t p = i * kRows; p < rows && p < (i + 1) * kRows; ++p) {
        if (from)
          memcpy(to + order[p] * bytes, from + order[p] * stride, size_t(bytes));
        else
          memset(to + order[p] * bytes, 0, size_t(bytes));
      }
  });
}

}  // namespace adapterkern::cpu
