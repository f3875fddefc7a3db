// The CPU twin: the tiles, the element rules and the order of summation of clipped_adamw.h, on threads.
#include <algorithm>
#include <atomic>

#include "clipped_adamw.h"
#include "threads.h"

// One binary for every x86-64: the loader picks the widest vectors of the machine. The results do not depend on that,
// because nothing here is contracted or reassociated.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define AK_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define AK_CLONES
#endif

namespace adapterkern::cpu {
namespace {

constexpr int64_t kChunk = 32;  // tiles, half a megabyte of gradients; below that a thread costs more than it saves

// Calls f(first, last) on chunks of tiles, the last chunk first if `backwards`. Threads take chunks as they come: one that
// shares its core does less. The result does not depend on who does what.
template <typename F>
void parallel(int64_t tiles, int threads, bool backwards, F f) {
  const int64_t chunks = (tiles + kChunk - 1) / kChunk;
  std::atomic<int64_t> next{0};
  const int useful = int(std::clamp<int64_t>(tiles / kChunk, 1, std::max(threads, 1)));
  on_threads(threads, useful, [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      const int64_t first = (backwards ? chunks - 1 - i : i) * kChunk;
      f(first, std::min(first + kChunk, tiles));
    }
  });
}

// Calls f(tensor, ordinal, tile, begin, n) for the tiles [first, last).
template <typename F>
void for_each_tile(const Table& table, int64_t first, int64_t last, F f) {
  const auto by_tile = [](int64_t tile, const Tensor& t) { return tile < t.first_tile; };
  auto t = std::upper_bound(table.tensors.begin(), table.tensors.end(), first, by_tile) - 1;
  for (int64_t tile = first; tile < last; ++tile) {
    if (t + 1 != table.tensors.end() && tile == (t + 1)->first_tile) ++t;
    const int64_t begin = (tile - t->first_tile) * kTile;
    f(*t, uint32_t(t - table.tensors.begin()), tile, begin, int(std::min<int64_t>(kTile, t->count - begin)));
  }
}

template <int kCount>
double fold(double* lane) {
  for (int half = kCount / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Asks for kCount elements 8 KiB ahead. The hardware's own prefetcher lags behind the norm pass: on one core of an
// EPYC (Zen 4) this takes it from 0.37 to 0.13 ns per element, while the update's four streams go from 0.69 to 1.0 with
// it, so the update does not prefetch. Addresses past the end are harmless.
template <int kCount, typename T>
AK_INLINE void prefetch(const T* p) {
  for (size_t byte = 0; byte < kCount * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 8192 + byte);
}

// Calls f(lane, x) for each element of a tile, in order.
template <typename F>
AK_INLINE void for_each_element(const Tensor& t, int64_t begin, int n, float inv_scale, F f) {
  dispatch(t.kind, [&](auto rule) __attribute__((always_inline)) {
    const auto* grad = static_cast<const typename decltype(rule)::Gradient*>(t.grad) + begin;
    int e = 0;
    for (; e + kLanes <= n; e += kLanes) {
      prefetch<kLanes>(grad + e);
      for (int i = 0; i < kLanes; ++i) f(i, to_float(grad[e + i]) * inv_scale);
    }
    for (int i = 0; e + i < n; ++i) f(i, to_float(grad[e + i]) * inv_scale);
  });
}

// Sums side by side, the terms apart, to be vectorized.
template <int kCount>
struct Sums {
  float hi[kCount], lo[kCount];
  AK_INLINE TwoTerms at(int i) const { return {hi[i], lo[i]}; }
  AK_INLINE void set(int i, TwoTerms sum) { hi[i] = sum.hi, lo[i] = sum.lo; }
};

template <bool kFma>
AK_INLINE double add_squares(const Tensor& t, int64_t begin, int n, float inv_scale) {
  Sums<kLanes> lanes{};
  for_each_element(t, begin, n, inv_scale, [&](int i, float x) __attribute__((always_inline)) {
    lanes.set(i, add(lanes.at(i), square<kFma>(x)));
  });
  Sums<kLanes / 4> quads;  // a thread's four lanes first, then across the warp
  for (int i = 0; i < kLanes / 4; ++i)
    quads.set(i, add(add(lanes.at(4 * i), lanes.at(4 * i + 1)), add(lanes.at(4 * i + 2), lanes.at(4 * i + 3))));
  for (int half = kLanes / 8; half; half /= 2)
    for (int i = 0; i < half; ++i) quads.set(i, add(quads.at(i), quads.at(i + half)));
  const double sum = total(quads.at(0));
  if (in_range(sum)) return sum;

  double lane[kLanes] = {};
  for_each_element(t, begin, n, inv_scale, [&](int i, float x) __attribute__((always_inline)) {
    lane[i] += double(x) * x;
  });
  for (int i = 0; i < kLanes / 4; ++i) lane[i] = (lane[4 * i] + lane[4 * i + 1]) + (lane[4 * i + 2] + lane[4 * i + 3]);
  return fold<kLanes / 4>(lane);
}

#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
constexpr bool kBaseFma = true;  // the instruction set that all of this is compiled for has it
#else
constexpr bool kBaseFma = false;
#endif

AK_CLONES void update_tile(const Tensor& t, int64_t begin, int n, const Step& step) {
  dispatch(t.kind, [&](auto rule) __attribute__((always_inline)) {
    using Rule = decltype(rule);
    auto* __restrict__ main = static_cast<typename Rule::Main*>(t.main) + begin;
    const auto* __restrict__ grad = static_cast<const typename Rule::Gradient*>(t.grad) + begin;
    auto* __restrict__ rounded = static_cast<typename Rule::Rounded*>(t.rounded) + begin;
    float* __restrict__ m = t.exp_avg + begin;
    float* __restrict__ v = t.exp_avg_sq + begin;
    const Step s = step;
    for (int i = 0; i < n; ++i) Rule::apply(s, uint32_t(begin) + i, main[i], grad[i], m[i], v[i], rounded[i]);
  });
}

void clear_tile(const Tensor& t, int64_t begin, int n) {
  dispatch(t.kind, [&](auto rule) {
    using Gradient = typename decltype(rule)::Gradient;
    memset(static_cast<Gradient*>(t.grad) + begin, 0, sizeof(Gradient) * n);
  });
}

// Clones by hand: target_clones cannot name AVX2 and FMA together, and a resolver of clones outside of the unnamed namespace
// would be a symbol that others see.
using TileSquares = double (*)(const Tensor&, int64_t, int, float);

double squares_base(const Tensor& t, int64_t begin, int n, float inv_scale) {
  return add_squares<kBaseFma>(t, begin, n, inv_scale);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f"))) double squares_avx512(const Tensor& t, int64_t begin, int n, float inv_scale) {
  return add_squares<true>(t, begin, n, inv_scale);
}
__attribute__((target("avx2,fma"))) double squares_avx2(const Tensor& t, int64_t begin, int n, float inv_scale) {
  return add_squares<true>(t, begin, n, inv_scale);
}

TileSquares best_squares() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return squares_avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? squares_avx2 : squares_base;
}
#else
TileSquares best_squares() { return squares_base; }
#endif

const TileSquares tile_squares = best_squares();

}  // namespace

void sum_squares(const Table& table, const Clip& clip, double* slots, Scalars* scalars, int threads) {
  const float inv_scale = inverse(clip.grad_scale);
  parallel(table.tiles, threads, /*backwards=*/false, [&](int64_t first, int64_t last) {
    for_each_tile(table, first, last, [&](const Tensor& t, uint32_t, int64_t tile, int64_t begin, int n) {
      slots[tile] = tile_squares(t, begin, n, inv_scale);
      if (begin == 0) *t.step += 1;  // update() takes it back if the step is skipped
    });
  });
  double lane[kSlotLanes] = {};
  for (int64_t tile = 0; tile < table.tiles; ++tile) lane[tile % kSlotLanes] += slots[tile];
  scalars->sum_squares = fold<kSlotLanes>(lane);
  finish(clip, scalars);
}

void finish(const Clip& clip, Scalars* scalars) { adapterkern::finish(clip, *scalars); }

void update(const Table& table, const std::vector<Group>& groups, const Scalars* scalars, bool clear_grads,
            uint32_t seed, int threads) {
  const bool skipped = scalars->skipped != 0;
  // Backwards: the gradients that the norm's pass read last are still in the cache.
  parallel(table.tiles, threads, /*backwards=*/true, [&](int64_t first, int64_t last) {
    for_each_tile(table, first, last, [&](const Tensor& t, uint32_t ordinal, int64_t, int64_t begin, int n) {
      if (!skipped)
        update_tile(t, begin, n, make_step(groups[t.group], *scalars, *t.step, seed, ordinal));
      else if (begin == 0)
        *t.step -= 1;
      if (clear_grads) clear_tile(t, begin, n);
    });
  });
}

}  // namespace adapterkern::cpu
