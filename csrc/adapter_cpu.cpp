// Which instruction set, which memory, which thread: see adapter_cpu.h.
#include "adapter_cpu.h"
#include "threads.h"

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

void forward(const Kernels& kernels, const Forward& f, int threads) {
  share(threads, ceiling(f.rows, kRows), kernels, kernels.forward_scratch(f.w),
        [&](int64_t block, int64_t following, char* memory) { kernels.forward(f, block, following, memory); });
}

void backward(const Kernels& kernels, const Backward& b, int threads) {
  const int64_t rp = padded(b.w.r, kRank), blocks = ceiling(b.rows, kRows), wide = padded(b.w.d, kColumns);
  share(threads, blocks, kernels, kernels.backward_scratch(b.w, 0),
        [&](int64_t block, int64_t following, char* memory) { kernels.backward_rows(b, block, following, memory); });
  memset(b.s, 0, size_t(rp) * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t j = 0; j < rp; ++j) b.s[j] += b.sums[block * rp + j];
  if (b.d_down_bias) memcpy(b.d_down_bias, b.s, size_t(b.w.r) * sizeof(float));
  const int64_t each = padded(ceiling(wide, threads), kColumns);
  share_range(threads, wide, each, kernels, kernels.backward_scratch(b.w, each),
        [&](int64_t begin, int64_t end, char* memory) { kernels.backward_cols(b, begin, end, memory); });
}

}  // namespace adapterkern::cpu
