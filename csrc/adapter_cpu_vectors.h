// Vectors of floats in memory of three dtypes, the activations, and a row's statistics: a part of adapter_cpu_kernels.h.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <utility>

#include "adapter_cpu.h"

#define AK_INLINE static inline __attribute__((always_inline))

namespace adapterkern::cpu::AK_ISA {
namespace {

constexpr int W = AK_WIDTH;
constexpr bool kPairs = AK_PAIRS != 0;
constexpr int64_t U = kPairs ? 2 : 1;  // elements of a unit

typedef float vf __attribute__((vector_size(W * 4)));
typedef float float_any __attribute__((may_alias));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Vectors of floats, from and to memory of each dtype

AK_INLINE vf splat(float a) { return a - vf{}; }
AK_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
AK_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
#if AK_WIDTH == 16
AK_INLINE vf load(const bf16* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
AK_INLINE vf load(const fp16* p) {
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
AK_INLINE void store(fp16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
}
#else
AK_INLINE vf load(const bf16* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
AK_INLINE vf load(const fp16* p) {
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
AK_INLINE void store(fp16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
}
#endif

// 2·W numbers, for sums, where their order does not matter
template <class E>
AK_INLINE void load_two(const E* p, vf (&two)[2]) {
  two[0] = load(p);
  two[1] = load(p + W);
}
AK_INLINE void load_two(const bf16* p, vf (&two)[2]) {
  const vu pairs = *reinterpret_cast<const vu_any*>(p);
  two[0] = reinterpret_cast<vf>(pairs << 16);
  two[1] = reinterpret_cast<vf>(pairs & 0xffff0000u);
}

// To nearest, ties to even; NaN stays NaN.
AK_INLINE vh to_bf16(vf v) {
#if AK_PAIRS
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu quiet = (u >> 16) | 64;
  const vi is_nan = v != v;
  return __builtin_convertvector((reinterpret_cast<vu>(is_nan) & quiet) | (~reinterpret_cast<vu>(is_nan) & rounded), vh);
#endif
}
AK_INLINE void store(bf16* p, vf v) { *reinterpret_cast<vh_any*>(p) = to_bf16(v); }

template <class E>
AK_INLINE float to_float(E value) {
  E many[W];
  for (int i = 0; i < W; ++i) many[i] = value;
  return load(many)[0];
}

AK_INLINE float sum(vf v) {  // pairwise
  float s[W];
  store(s, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

// Parts of a vector, at the end of a row: lanes from n on are 0, and are not stored
template <class E>
AK_INLINE vf load_part(const E* p, int64_t n) {
  E part[W] = {};
  if (n > 0) memcpy(part, p, size_t(n < W ? n : W) * sizeof(E));
  return load(part);
}
template <class E>
AK_INLINE vf load_upto(const E* p, int64_t n) {
  return n >= W ? load(p) : load_part(p, n);
}
template <class E>
AK_INLINE void store_upto(E* p, vf v, int64_t n) {
  if (n >= W) return store(p, v);
  E part[W];
  store(part, v);
  if (n > 0) memcpy(p, part, size_t(n) * sizeof(E));
}

// Transposition, in log2(W) steps: step kHalf exchanges the squares of kHalf × kHalf numbers off the diagonal.
template <int kHalf, size_t... kLane>
AK_INLINE void exchange(vf& a, vf& b, std::index_sequence<kLane...>) {
#ifdef __clang__
  const vf low = __builtin_shufflevector(a, b, (kLane & kHalf ? W + kLane - kHalf : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kHalf ? W + kLane : kLane + kHalf)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{(kLane & kHalf ? int(W + kLane - kHalf) : int(kLane))...});
  b = __builtin_shuffle(a, b, vi{(kLane & kHalf ? int(W + kLane) : int(kLane + kHalf))...});
#endif
  a = low;
}
template <int kHalf>
AK_INLINE void exchange(vf (&rows)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & kHalf)) exchange<kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<W>());
}
AK_INLINE void transpose(vf (&rows)[W]) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  if constexpr (W > 8) exchange<8>(rows);
}

// Activations

AK_INLINE vf clamp(vf v, float low, float high) {
  v = v < splat(low) ? splat(low) : v;
  return v > splat(high) ? splat(high) : v;
}

// e^x to 2 ulp: 2^n·e^f with |f| <= ln 2 / 2, and a polynomial of degree 7 (Cephes) for e^f
AK_INLINE vf exponential(vf x) {
  x = clamp(x, -87.0f, 88.0f);
  const vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  vf f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * reinterpret_cast<vf>(power);
}

// h = act(z), and act'(z)
AK_INLINE void activate(Activation activation, vf z, vf& h, vf& slope) {
  switch (activation) {
    case Activation::kSilu: {
      const vf s = 1.0f / (1.0f + exponential(-z));
      h = z * s;
      slope = s * (1.0f + z * (1.0f - s));
      return;
    }
    case Activation::kRelu:
      h = z < splat(0) ? splat(0) : z;  // NaN stays NaN
      slope = z <= splat(0) ? splat(0) : splat(1);
      return;
    case Activation::kIdentity:
      h = z;
      slope = splat(1);
      return;
    case Activation::kGelu:
      for (int i = 0; i < W; ++i) {
        const float cdf = 0.5f * std::erfc(-z[i] * 0.70710678f);
        h[i] = z[i] * cdf;
        slope[i] = cdf + z[i] * std::exp(-0.5f * z[i] * z[i]) * 0.39894228f;
      }
      return;
    case Activation::kTanh:
      for (int i = 0; i < W; ++i) {
        h[i] = std::tanh(z[i]);
        slope[i] = 1.0f - h[i] * h[i];
      }
      return;
  }
}

// Statistics

// The mean of a row, and 1/sqrt(variance + eps). Sums of 256 numbers, which stay in the L1 cache, are taken around their
// own mean, and then combined (Chan et al. 1979): a row is read from memory once, and a constant row has variance 0.
template <class E>
void statistics(const E* x, int64_t d, float eps, float& mean, float& rstd) {
  constexpr int64_t kPart = 256;
  float total_mean = 0, total_squares = 0;
  for (int64_t begin = 0; begin < d; begin += kPart) {
    const int64_t n = d - begin < kPart ? d - begin : kPart;
    const E* part = x + begin;
    vf sums[2] = {}, offs[2] = {}, squares[2] = {};
    int64_t i = 0;
    vf two[2];
    for (; i + 2 * W <= n; i += 2 * W) {
      load_two(part + i, two);
      sums[0] += two[0];
      sums[1] += two[1];
    }
    for (; i < n; i += W) sums[0] += load_upto(part + i, n - i);
    const float first = sum(sums[0] + sums[1]) / float(n);
    const vf around = splat(first);
    for (i = 0; i + 2 * W <= n; i += 2 * W) {
      load_two(part + i, two);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const vf off = two[j] - around;
        offs[j] += off;
        squares[j] += off * off;
      }
    }
    for (; i < n; i += W) {
      float lanes[W];
      store(lanes, load_upto(part + i, n - i) - around);
      for (int64_t j = n - i < W ? n - i : W; j < W; ++j) lanes[j] = 0;
      const vf off = load(lanes);
      offs[0] += off;
      squares[0] += off * off;
    }
    const float rest = sum(offs[0] + offs[1]) / float(n), part_mean = first + rest;
    const float part_squares = sum(squares[0] + squares[1]) - float(n) * rest * rest;
    const float before = float(begin), after = float(begin + n), step = part_mean - total_mean;
    total_mean += step * (float(n) / after);
    total_squares += part_squares + step * step * (before * float(n) / after);
  }
  mean = total_mean;
  rstd = 1.0f / std::sqrt((total_squares > 0 ? total_squares : 0) / float(d) + eps);
}

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
