// Preparation of the parameters, rows of A, then columns of both matrices: a part of adapter_cpu_kernels.h.
#pragma once

#include "adapter_cpu_products.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

void prepare_rows(const Weights& w, int64_t begin, int64_t end, float* means) {
  for (int64_t j = begin; j < end; ++j) {
    vf a = {}, b = {};
    for (int64_t n = 0; n < w.d; n += W) {
      if (!w.norm_weight) break;
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
  for (int64_t i = 0; i < kSquare; i += W)
    for (int64_t j = 0; j < kSquare; j += W) {
      vf rows[W];
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) rows[q] = load(from[i + q] + j);
      transpose(rows);
#pragma GCC unroll 16
      for (int q = 0; q < W; ++q) store(to[j + q] + i, rows[q]);
    }
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
        const float *down = w.down_weight + (j0 + j) * w.d + n0, mean = means[j0 + j];
        if (!w.norm_weight) {
          memcpy(rows[j], down, size_t(left) * sizeof(float));
          continue;
        }
        const float* gamma = w.norm_weight + n0;
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

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
