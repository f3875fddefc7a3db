// The adapter's kernels, compiled once per instruction set: see adapter_cpu.h. Each translation unit defines AK_ISA (a
// namespace), AK_WIDTH (floats per vector) and AK_PAIRS: 0 for products of floats, 1 for pairs of bf16 by AVX512-BF16,
// 2 for pairs of bf16 by AMX.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "adapter_cpu.h"
#if AK_PAIRS == 2
#include "adapter_cpu_tiles.h"
#endif

#define AK_INLINE static inline __attribute__((always_inline))

namespace adapterkern::cpu::AK_ISA {
namespace {

constexpr int W = AK_WIDTH;
constexpr bool kPairs = AK_PAIRS != 0;
constexpr int64_t U = kPairs ? 2 : 1;  // elements of a unit

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
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
      h = z > splat(0) ? z : splat(0);
      slope = z > splat(0) ? splat(1) : splat(0);
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

// Products: C[M][32] (+)= A[M][K]·B[K][32], K in units, B a panel; M a multiple of kRows

#if AK_PAIRS == 2
AK_INLINE void product(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B, float* C, int64_t ldc,
                       bool add) {
  tile_product(M, K, A, lda, B, C, ldc, add);
}
#else
constexpr int kTileRows = W == 16 ? 8 : 4, kTileVectors = 2;

AK_INLINE vf multiply_add(vf c, vf a, vf b) {
#if AK_PAIRS
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a),
                                               reinterpret_cast<__m512bh>(b)));
#else
  return c + a * b;
#endif
}

AK_INLINE vf broadcast(const float* unit) {
#if AK_PAIRS
  return reinterpret_cast<vf>(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(unit)));
#else
  return splat(*unit);
#endif
}

template <int kTall>
AK_INLINE void tile(int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add) {
  vf c[kTall][kTileVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kTall; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n) c[m][n] = vf{};
  for (int64_t k = 0; k < K; ++k) {
    vf b[kTileVectors];
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n) b[n] = load(B + k * kColumns + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < kTall; ++m) {
      const vf a = broadcast(A + m * lda + k);
#pragma GCC unroll 2
      for (int n = 0; n < kTileVectors; ++n) c[m][n] = multiply_add(c[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTall; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n) {
      float* to = C + m * ldc + n * W;
      store(to, add ? load(to) + c[m][n] : c[m][n]);  // sums of sums: each is over K units
    }
}

void product(int64_t M, int64_t K, const uint32_t* A_, int64_t lda, const uint32_t* B_, float* C, int64_t ldc, bool add) {
  const float *A = reinterpret_cast<const float*>(A_), *B = reinterpret_cast<const float*>(B_);
  for (int n = 0; n < kColumns; n += kTileVectors * W) {
    int64_t m = 0;
    for (; m + kTileRows <= M; m += kTileRows) tile<kTileRows>(K, A + m * lda, lda, B + n, C + m * ldc + n, ldc, add);
    for (; m < M; m += 4) tile<4>(K, A + m * lda, lda, B + n, C + m * ldc + n, ldc, add);
  }
}
#endif

// Units of a row: floats, or pairs of bf16 along it

AK_INLINE void pack(uint32_t* to, vf low, vf high) {  // 2·W elements of a row
#if AK_PAIRS
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(
                              _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low))));
#else
  store(reinterpret_cast<float*>(to), low);
  store(reinterpret_cast<float*>(to) + W, high);
#endif
}

// Units of two rows: W columns of both, interleaved
AK_INLINE void pack_pair(uint32_t* to, vf even, vf odd) {
#if AK_PAIRS
  const __m512i both = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
#else
  (void)to, (void)even, (void)odd;
#endif
}

class Arena {  // memory of a thread, cut into arrays on cache lines
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    char* at = base_ + used_;
    used_ += size_t(padded(n * int64_t(sizeof(T)), 64)) + 64;  // not a power of two apart
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

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
    for (; i + 2 * W <= n; i += 2 * W) {
      sums[0] += load(part + i);
      sums[1] += load(part + i + W);
    }
    for (; i < n; i += W) sums[0] += load_upto(part + i, n - i);
    const float first = sum(sums[0] + sums[1]) / float(n);
    const vf around = splat(first);
    for (i = 0; i + 2 * W <= n; i += 2 * W)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const vf off = load(part + i + j * W) - around;
        offs[j] += off;
        squares[j] += off * off;
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

// A row of sums, C, and the numbers of columns between its rows: not a power of two, so that rows lie in several sets
constexpr int64_t kPanelColumns = 128, kForwardStride = kPanelColumns + 16, kBackwardStride = kSlice + 16;
constexpr int64_t kDepth = 128;  // units of a row that are packed at a time

template <class E, class Z>
struct Of {
  static int64_t rank(const Weights& w) { return padded(w.r, kRank); }
  static int64_t rank_units(const Weights& w) { return rank(w) / U; }
  static int64_t width(const Weights& w) { return padded(w.d, kColumns); }

  struct Scratch {
    uint32_t* row_units;  // kRows × kDepth
    float* sums;          // kRows × rp
    uint32_t* h;          // kRows × r units
    float* out;           // kRows × kBackwardStride
    float* dz;            // kRows × rp, then h, of a block
    float* hs;
    uint32_t *x_units, *dy_units;  // row units of a chunk × kSlice
    float *G, *U_, *up_bias;       // rp × columns, twice; columns
  };
  static size_t lay(Scratch& s, char* base, const Weights& w, int64_t columns) {
    Arena arena(base);
    s.row_units = arena.take<uint32_t>(kRows * kDepth);
    s.sums = arena.take<float>(kRows * rank(w));
    s.h = arena.take<uint32_t>(kRows * rank(w));
    s.out = arena.take<float>(kRows * kBackwardStride);
    if (columns < 0) return arena.used();
    s.dz = arena.take<float>(kRows * rank(w));
    s.hs = arena.take<float>(kRows * rank(w));
    s.x_units = arena.take<uint32_t>(kChunk / U * kSlice);
    s.dy_units = arena.take<uint32_t>(kChunk / U * kSlice);
    s.G = arena.take<float>(rank(w) * columns);
    s.U_ = arena.take<float>(rank(w) * columns);
    s.up_bias = arena.take<float>(columns);
    return arena.used();
  }
  static size_t forward_scratch(const Weights& w) {
    Scratch s;
    return lay(s, nullptr, w, -1);
  }
  static size_t backward_scratch(const Weights& w, int64_t columns) {
    Scratch s;
    return lay(s, nullptr, w, columns);
  }

  // sums[kRows][rp] = (x − mean)·B, summed over d; rows from `rows` on are 0
  static void from_rows(const E* x, int64_t stride, int64_t rows, const float* mean, const Weights& w, const uint32_t* B,
                        const Scratch& s) {
    const int64_t rp = rank(w), units = width(w) / U;
    for (int64_t k = 0; k < units; k += kDepth) {
      const int64_t depth = units - k < kDepth ? units - k : kDepth;
      for (int64_t i = 0; i < kRows; ++i) {
        uint32_t* to = s.row_units + i * kDepth;
        if (i >= rows) {
          memset(to, 0, size_t(depth) * 4);
          continue;
        }
        const E* from = x + i * stride + k * U;
        const vf mu = splat(mean ? mean[i] : 0.0f);
        const int64_t left = w.d - k * U, whole = left < depth * U ? left / (2 * W) * (2 * W) : depth * U;
        int64_t n = 0;
        for (; n < whole; n += 2 * W) pack(to + n / U, load(from + n) - mu, load(from + n + W) - mu);
        for (; n < depth * U; n += 2 * W) {
          float lanes[2 * W];
          for (int64_t j = 0; j < 2 * W; ++j) lanes[j] = n + j < left ? to_float(from[n + j]) - mu[0] : 0.0f;
          pack(to + n / U, load(lanes), load(lanes + W));
        }
      }
      for (int64_t j = 0; j < rp; j += kColumns)
        product(kRows, depth, s.row_units, kDepth, B + j * units + k * kColumns, s.sums + j, rp, k > 0);
    }
  }

  static void forward(const Forward& f, int64_t begin, int64_t end, char* base) {
    const Weights& w = f.w;
    const int64_t d = w.d, r = w.r, rp = rank(w), ru = rank_units(w), wide = width(w);
    Scratch s;
    lay(s, base, w, -1);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t t = block * kRows, rows = f.rows - t < kRows ? f.rows - t : kRows;
      const E* x = static_cast<const E*>(f.x) + t * f.x_stride;
      E* y = static_cast<E*>(f.y) + t * d;
      float mean[kRows], rstd[kRows];
      for (int64_t i = 0; i < rows; ++i) statistics(x + i * f.x_stride, d, f.eps, mean[i], rstd[i]);
      from_rows(x, f.x_stride, rows, mean, w, w.down_k, s);
      memset(s.h, 0, size_t(kRows * ru) * 4);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < rp; j += 2 * W) {
          vf h[2], slope;
#pragma GCC unroll 2
          for (int q = 0; q < 2; ++q) {
            Z kept[W];
            store(kept, load(s.sums + i * rp + j + q * W) * rstd[i] + load(w.c + j + q * W));
            if (f.z) store_upto(static_cast<Z*>(f.z) + (t + i) * r + j + q * W, load(kept), r - j - q * W);
            activate(f.activation, load(kept), h[q], slope);
          }
          pack(s.h + i * ru + j / U, h[0], h[1]);
        }
        if (f.mean) f.mean[t + i] = mean[i], f.rstd[t + i] = rstd[i];
      }
      for (int64_t n0 = 0; n0 < wide; n0 += kPanelColumns) {
        const int64_t n1 = wide - n0 < kPanelColumns ? wide - n0 : kPanelColumns;
        for (int64_t n = 0; n < n1; n += kColumns)
          product(kRows, ru, s.h, ru, w.up_n + (n0 + n) * ru, s.out + n, kForwardStride, false);
        const int64_t last = d - n0 < n1 ? d - n0 : n1;
        for (int64_t i = 0; i < rows; ++i) {
          const E* from = x + i * f.x_stride + n0;
          E* to = y + i * d + n0;
          const float* branch = s.out + i * kForwardStride;
          int64_t n = 0;
          for (; n + W <= last; n += W) store(to + n, load(from + n) + (load(branch + n) + load(w.up_bias + n0 + n)));
          if (n < last) {
            const int64_t left = last - n;
            const vf bias = load_part(w.up_bias + n0 + n, left);
            store_upto(to + n, load_part(from + n, left) + (load(branch + n) + bias), left);
          }
        }
      }
    }
  }

  static void backward_rows(const Backward& b, int64_t begin, int64_t end, char* base) {
    const Weights& w = b.w;
    const int64_t r = w.r, rp = rank(w), ru = rank_units(w), row_units = kChunk / U;
    Scratch s;
    lay(s, base, w, 0);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      uint32_t *dz_cols = b.dz_cols + chunk * rp * row_units, *h_cols = b.h_cols + chunk * rp * row_units;
      for (int64_t t = chunk * kChunk; t < (chunk + 1) * kChunk && t < b.rows; t += kRows) {
        const int64_t rows = b.rows - t < kRows ? b.rows - t : kRows;
        from_rows(static_cast<const E*>(b.dy) + t * b.dy_stride, b.dy_stride, rows, nullptr, w, w.up_k, s);
        float* sums = b.sums + t / kRows * rp;
        memset(sums, 0, size_t(rp) * 4);
        for (int64_t i = 0; i < kRows; ++i) {
          uint32_t* dz_row = b.dz_rows + (t + i) * ru;
          if (i >= rows) {
            memset(dz_row, 0, size_t(ru) * 4);
            memset(s.dz + i * rp, 0, size_t(rp) * 4);
            memset(s.hs + i * rp, 0, size_t(rp) * 4);
            b.kappa[t + i] = 0;
            continue;
          }
          const float rho = b.rstd[t + i];
          vf c2 = {};
          for (int64_t j = 0; j < rp; j += W) {
            const vf z = load_upto(static_cast<const Z*>(b.z) + (t + i) * r + j, r - j);
            vf h, slope;
            activate(b.activation, z, h, slope);
            const vf dz = load(s.sums + i * rp + j) * slope;
            c2 += dz * (z - load(w.c + j));
            store(sums + j, load(sums + j) + dz);
            store(s.dz + i * rp + j, dz * rho);
            store(s.hs + i * rp + j, h);
          }
          for (int64_t j = r; j < rp; ++j) s.hs[i * rp + j] = 0;
          for (int64_t j = 0; j < rp; j += 2 * W)
            pack(dz_row + j / U, load(s.dz + i * rp + j), load(s.dz + i * rp + j + W));
          b.kappa[t + i] = rho * rho * sum(c2) / float(w.d);
        }
        transpose(s.dz, rp, dz_cols + t % kChunk / U);
        transpose(s.hs, rp, h_cols + t % kChunk / U);
      }
    }
  }

  // The numbers [kRows][rp] of a block as units along the rows: [rp][row units of a chunk]
  static void transpose(const float* from, int64_t rp, uint32_t* to) {
    for (int64_t i = 0; i < kRows; i += U)
      for (int64_t j = 0; j < rp; j += W) {
        uint32_t units[W];
#if AK_PAIRS
        pack_pair(units, load(from + i * rp + j), load(from + (i + 1) * rp + j));
#else
        memcpy(units, from + i * rp + j, sizeof units);
#endif
        for (int q = 0; q < W; ++q) to[(j + q) * (kChunk / U) + i / U] = units[q];
      }
  }

  static void backward_cols(const Backward& b, int64_t begin, int64_t end, char* base) {
    const Weights& w = b.w;
    const int64_t d = w.d, rp = rank(w), ru = rank_units(w), columns = end - begin, row_units = kChunk / U;
    const bool down = b.d_down_weight != nullptr, up = b.d_up_weight != nullptr;
    Scratch s;
    lay(s, base, w, columns);
    if (down) memset(s.G, 0, size_t(rp * columns) * 4);
    if (up) memset(s.U_, 0, size_t(rp * columns) * 4);
    memset(s.up_bias, 0, size_t(columns) * 4);
    for (int64_t t0 = 0; t0 < b.rows; t0 += kChunk) {
      const int64_t chunk = t0 / kChunk, t1 = b.rows - t0 < kChunk ? b.rows : t0 + kChunk;
      for (int64_t c0 = begin; c0 < end; c0 += kSlice) {
        const int64_t slice = end - c0 < kSlice ? end - c0 : kSlice;
        for (int64_t t = t0; t < t1; t += kRows) {
          if (b.dx)
            for (int64_t n = 0; n < slice; n += kColumns)
              product(kRows, ru, b.dz_rows + t * ru, ru, w.down_n + (c0 + n) * ru, s.out + n, kBackwardStride, false);
          const int64_t rows = t1 - t < kRows ? t1 - t : kRows;
          const bool whole = rows == kRows && c0 + slice <= d;
          (whole ? rows_of_slice<true> : rows_of_slice<false>)(b, t, rows, (t - t0) / U, c0, slice, s, c0 - begin);
        }
        const int64_t depth = padded(t1 - t0, kRows) / U;
        for (int64_t n = 0; n < slice; n += kColumns) {
          const int64_t panel = (c0 - begin + n) * rp;
          if (down)
            product(rp, depth, b.dz_cols + chunk * rp * row_units, row_units, s.x_units + n * row_units, s.G + panel,
                    kColumns, true);
          if (up)
            product(rp, depth, b.h_cols + chunk * rp * row_units, row_units, s.dy_units + n * row_units, s.U_ + panel,
                    kColumns, true);
        }
      }
    }
    if (down) parameters_down(b, begin, end < d ? end : d, s, rp);
    for (int64_t n = begin; n < end && n < d; ++n) {
      if (b.d_up_bias) b.d_up_bias[n] = s.up_bias[n - begin];
      if (up)
        for (int64_t j = 0; j < w.r; ++j) b.d_up_weight[n * w.r + j] = s.U_[at(n - begin, rp) + j * kColumns];
    }
  }

  // Where column n of G and U begins, in panels [columns / 32][rp][32]
  static int64_t at(int64_t n, int64_t rp) { return n / kColumns * kColumns * rp + n % kColumns; }

  // dx of a block of rows in a slice, and x − μ and dy as units along the rows. kWhole: all rows and columns are there.
  template <bool kWhole>
  static void rows_of_slice(const Backward& b, int64_t t, int64_t rows, int64_t unit, int64_t c0, int64_t slice,
                            const Scratch& s, int64_t column) {
    const int64_t d = b.w.d, x_stride = b.x_stride, dy_stride = b.dy_stride, ahead = t + 2 * kRows <= b.rows ? kRows : 0;
    const E* x = static_cast<const E*>(b.x) + t * x_stride + c0;
    const E* dy = static_cast<const E*>(b.dy) + t * dy_stride + c0;
    E* const dx = b.dx ? static_cast<E*>(b.dx) + t * d + c0 : nullptr;
    const float *mean = b.mean + t, *kappa = b.kappa + t, *out = s.out;
    float bias[kSlice] = {};  // a sum of sums, each over a block
    uint32_t *const x_units = s.x_units + unit * kColumns, *const dy_units = s.dy_units + unit * kColumns;
    constexpr int64_t kLine = 64 / int64_t(sizeof(E));
    for (int64_t i = 0; i < kRows; i += U) {
      for (int64_t q = 0; q < U; ++q)
        for (int64_t n = 0; n < slice && ahead; n += kLine) {
          __builtin_prefetch(x + (i + q + ahead) * x_stride + n, 0, 2);
          __builtin_prefetch(dy + (i + q + ahead) * dy_stride + n, 0, 2);
        }
      for (int64_t n = 0; n < slice; n += W) {
        const int64_t left = kWhole ? W : d - c0 - n;
        vf xs[2] = {}, dys[2] = {}, total = load(bias + n);
#pragma GCC unroll 2
        for (int64_t q = 0; q < U; ++q) {
          if (!kWhole && (i + q >= rows || left <= 0)) continue;
          xs[q] = (kWhole ? load(x + (i + q) * x_stride + n) : load_upto(x + (i + q) * x_stride + n, left)) -
                  splat(mean[i + q]);
          dys[q] = kWhole ? load(dy + (i + q) * dy_stride + n) : load_upto(dy + (i + q) * dy_stride + n, left);
          total += dys[q];
          if (!dx) continue;
          const vf grad = dys[q] + (load(out + (i + q) * kBackwardStride + n) - splat(kappa[i + q]) * xs[q]);
          if (kWhole)
            store(dx + (i + q) * d + n, grad);
          else
            store_upto(dx + (i + q) * d + n, grad, left);
        }
        store(bias + n, total);
        const int64_t to = n / kColumns * kColumns * (kChunk / U) + n % kColumns + i / U * kColumns;
#if AK_PAIRS
        pack_pair(x_units + to, xs[0], xs[1]);
        pack_pair(dy_units + to, dys[0], dys[1]);
#else
        store(reinterpret_cast<float*>(x_units) + to, xs[0]);
        store(reinterpret_cast<float*>(dy_units) + to, dys[0]);
#endif
      }
    }
    for (int64_t n = 0; n < slice; n += W) store(s.up_bias + column + n, load(s.up_bias + column + n) + load(bias + n));
  }

  static void parameters_down(const Backward& b, int64_t begin, int64_t end, const Scratch& s, int64_t rp) {
    const Weights& w = b.w;
    for (int64_t n0 = begin; n0 < end; n0 += kColumns) {
      const int64_t many = end - n0 < kColumns ? end - n0 : kColumns;
      const float *G = s.G + (n0 - begin) * rp, *gamma = w.norm_weight + n0, *beta = w.norm_bias + n0;
      float d_gamma[kColumns] = {}, d_beta[kColumns] = {};
      for (int64_t j = 0; j < w.r; ++j, G += kColumns) {
        const float *down = w.down_weight + j * w.d + n0, sj = b.s[j];
        float* to = b.d_down_weight + j * w.d + n0;
        for (int64_t n = 0; n < many; ++n) {
          d_gamma[n] += G[n] * down[n];
          d_beta[n] += sj * down[n];
          to[n] = G[n] * gamma[n] + sj * beta[n];
        }
      }
      memcpy(b.d_norm_weight + n0, d_gamma, size_t(many) * sizeof(float));
      memcpy(b.d_norm_bias + n0, d_beta, size_t(many) * sizeof(float));
    }
  }
};

// Preparation: rows of A, then columns of both matrices

void prepare_rows(const Weights& w, int64_t begin, int64_t end, float* means) {
  for (int64_t j = begin; j < end; ++j) {
    vf a = {}, b = {};
    for (int64_t n = 0; n < w.d; n += W) {
      const vf row = load_upto(w.down_weight + j * w.d + n, w.d - n);
      a += row * load_upto(w.norm_weight + n, w.d - n);
      b += row * load_upto(w.norm_bias + n, w.d - n);
    }
    means[j] = sum(a) / float(w.d);
    w.c[j] = sum(b) + w.down_bias[j];
  }
}

// A square of a matrix, 32 rows of A or W_upᵀ (along r) by 32 columns of d; outside of the matrix it is 0
constexpr int64_t kSquare = kColumns;
using Square = float[kSquare][kSquare];

void transpose_square(const Square& from, Square& to) {
  for (int64_t i = 0; i < kSquare; ++i)
    for (int64_t j = 0; j < kSquare; ++j) to[j][i] = from[i][j];
}

// Units of rows i, i + U, … of a square, 32 units each: those of row i begin at to + i / U * stride
void pack_square(const Square& from, uint32_t* to, int64_t stride) {
  for (int64_t i = 0; i < kSquare; i += U)
    for (int64_t n = 0; n < kSquare; n += W) {
#if AK_PAIRS
      pack_pair(to + i / U * stride + n, load(from[i] + n), load(from[i + 1] + n));
#else
      store(reinterpret_cast<float*>(to) + i * stride + n, load(from[i] + n));
#endif
    }
}

// Columns [begin, end), multiples of kColumns; those from d on are 0
void prepare_columns(const Weights& w, int64_t begin, int64_t end, const float* means) {
  static_assert(kRank == kSquare && kColumns == kSquare);
  const int64_t rp = padded(w.r, kRank), ru = rp / U, units = padded(w.d, kColumns) / U;
  alignas(64) Square rows, columns;
  for (int64_t n0 = begin; n0 < end; n0 += kColumns) {
    const int64_t left = w.d - n0 < kColumns ? w.d - n0 : kColumns;
    for (int64_t j0 = 0; j0 < rp; j0 += kSquare) {
      const int64_t many = w.r - j0 < kSquare ? w.r - j0 : kSquare;
      const int64_t to_n = n0 / kColumns * ru * kColumns + j0 / U * kColumns;
      const int64_t to_k = (j0 / kColumns * units + n0 / U) * kColumns;
      memset(rows, 0, sizeof rows);
      for (int64_t j = 0; j < many; ++j) {
        const float *down = w.down_weight + (j0 + j) * w.d + n0, *gamma = w.norm_weight + n0, mean = means[j0 + j];
        for (int64_t n = 0; n < left; ++n) rows[j][n] = down[n] * gamma[n] - mean;
      }
      transpose_square(rows, columns);
      pack_square(rows, w.down_n + to_n, kColumns);
      pack_square(columns, w.down_k + to_k, kColumns);
      memset(columns, 0, sizeof columns);
      for (int64_t n = 0; n < left; ++n) memcpy(columns[n], w.up_weight + (n0 + n) * w.r + j0, size_t(many) * sizeof(float));
      transpose_square(columns, rows);
      pack_square(rows, w.up_n + to_n, kColumns);
      pack_square(columns, w.up_k + to_k, kColumns);
    }
  }
}

void enter() {
#if AK_PAIRS == 2
  configure_tiles();
#endif
}
void leave() {
#if AK_PAIRS == 2
  release_tiles();
#endif
}

template <class E, class Z>
constexpr Kernels kOf = {kPairs,          Of<E, Z>::forward_scratch, Of<E, Z>::backward_scratch,
                         prepare_rows,    prepare_columns,           enter,
                         leave,           Of<E, Z>::forward,         Of<E, Z>::backward_rows,
                         Of<E, Z>::backward_cols};

}  // namespace

const Kernels* kernels(Dtype stream, Dtype z) {
#if AK_PAIRS
  if (z != Dtype::kBfloat16) return nullptr;
#else
  if (z == Dtype::kFloat32) switch (stream) {
      case Dtype::kFloat32: return &kOf<float, float>;
      case Dtype::kBfloat16: return &kOf<bf16, float>;
      case Dtype::kFloat16: return &kOf<fp16, float>;
    }
#endif
  switch (stream) {
    case Dtype::kFloat32: return &kOf<float, bf16>;
    case Dtype::kBfloat16: return &kOf<bf16, bf16>;
    case Dtype::kFloat16: return &kOf<fp16, bf16>;
  }
  return nullptr;
}

}  // namespace adapterkern::cpu::AK_ISA
