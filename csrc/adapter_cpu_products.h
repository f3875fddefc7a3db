// Products, and the units that they read: a part of adapter_cpu_kernels.h.
#pragma once

#include "adapter_cpu_ahead.h"
#include "adapter_cpu_vectors.h"
#if AK_PAIRS == 2
#include "adapter_cpu_tiles.h"
#endif

namespace adapterkern::cpu::AK_ISA {
namespace {

// Products: C[M][32] (+)= A[M][K]·B[K][32], K in units, B a panel; M a multiple of kTileRows, K of 16. Between its steps a
// product fetches lines of `ahead`.

#if AK_PAIRS == 2
constexpr int64_t kTileRows = 32;

constexpr int64_t fetches(int64_t M, int64_t K) { return M / kTileRows * (K / 16); }

AK_INLINE void product(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B, float* C, int64_t ldc,
                       bool add, Ahead& ahead) {
  tile_product(M, K, A, lda, B, C, ldc, add, ahead);
}
#else
constexpr int64_t kTileRows = W == 16 ? 8 : 4, kTileVectors = 2, kSteps = 4;

// How often product() fetches lines
constexpr int64_t fetches(int64_t M, int64_t K) { return M / kTileRows * (K / kSteps) * (kColumns / (kTileVectors * W)); }

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
  int32_t pair;
  memcpy(&pair, unit, sizeof pair);
  return reinterpret_cast<vf>(_mm512_set1_epi32(pair));
#else
  return splat(*reinterpret_cast<const float_any*>(unit));  // units are written as integers, too
#endif
}

AK_INLINE void tile(int64_t K, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add,
                    Ahead& ahead) {
  vf c[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n) c[m][n] = vf{};
  for (int64_t k0 = 0; k0 < K; k0 += kSteps) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int64_t k = k0; k < k0 + kSteps; ++k) {
      vf b[kTileVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kTileVectors; ++n) b[n] = load(B + k * kColumns + n * W);
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) {
        const vf a = broadcast(A + m * lda + k);
#pragma GCC unroll 2
        for (int n = 0; n < kTileVectors; ++n) c[m][n] = multiply_add(c[m][n], a, b[n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < kTileVectors; ++n) {
      float* to = C + m * ldc + n * W;
      store(to, add ? load(to) + c[m][n] : c[m][n]);  // sums of sums: each is over K units
    }
}

void product(int64_t M, int64_t K, const uint32_t* A_, int64_t lda, const uint32_t* B_, float* C, int64_t ldc, bool add,
             Ahead& ahead) {
  const float *A = reinterpret_cast<const float*>(A_), *B = reinterpret_cast<const float*>(B_);
  for (int n = 0; n < kColumns; n += kTileVectors * W) {
    for (int64_t m = 0; m < M; m += kTileRows) tile(K, A + m * lda, lda, B + n, C + m * ldc + n, ldc, add, ahead);
  }
}
#endif

__attribute__((noinline)) void part_product(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B,
                                            float* C, int64_t ldc, bool add, Ahead& ahead) {
  product(M, K, A, lda, B, C, ldc, add, ahead);
}

// The same of a block's rows: nearly all blocks are whole, and the compiler knows their M.
AK_INLINE void block_product(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B, float* C,
                             int64_t ldc, bool add, Ahead& ahead) {
  if (M == kRows)
    product(kRows, K, A, lda, B, C, ldc, add, ahead);
  else
    part_product(M, K, A, lda, B, C, ldc, add, ahead);
}

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
#if AK_PAIRS
AK_INLINE vf pair_of(vf even, vf odd) {
  const __m512i both = reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even)));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return reinterpret_cast<vf>(_mm512_permutexvar_epi16(order, both));
}
AK_INLINE void pack_pair(uint32_t* to, vf even, vf odd) {
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(pair_of(even, odd)));
}
#endif

// The numbers [kRows][rp] of a block as units along the rows: [rp][row units of a chunk]
void transpose_block(const float* from, int64_t rp, uint32_t* to) {
  for (int64_t i = 0; i < kRows; i += W * U)
    for (int64_t j = 0; j < rp; j += W) {
      vf rows[W];
#pragma GCC unroll 16
      for (int64_t q = 0; q < W; ++q) {
#if AK_PAIRS
        const float* pair = from + (i + 2 * q) * rp + j;
        rows[q] = pair_of(load(pair), load(pair + rp));
#else
        rows[q] = load(from + (i + q) * rp + j);
#endif
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) store(reinterpret_cast<float*>(to + (j + q) * (kChunk / U) + i / U), rows[q]);
    }
}

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
