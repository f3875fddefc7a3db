// The parameters' gradients from G and U: a part of adapter_cpu_kernels.h.
#pragma once

#include "adapter_cpu_vectors.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

// Columns [begin, end) of the gradients; G and U begin with column `begin`, in panels [columns / 32][rp][32].

void parameters_down(const Gradients& g, int64_t begin, int64_t end, const float* first, int64_t rp) {
  const Weights& w = g.w;
  for (int64_t n0 = begin; n0 < end; n0 += kColumns) {
    const int64_t many = end - n0 < kColumns ? end - n0 : kColumns;
    const float* G = first + (n0 - begin) * rp;
    if (!w.norm_weight) {
      for (int64_t j = 0; j < w.r; ++j)
        memcpy(g.d_down_weight + j * w.d + n0, G + j * kColumns, size_t(many) * sizeof(float));
      continue;
    }
    const float *gamma = w.norm_weight + n0, *beta = w.norm_bias + n0;
    float d_gamma[kColumns] = {}, d_beta[kColumns] = {};
    for (int64_t j = 0; j < w.r; ++j, G += kColumns) {
      const float *down = w.down_weight + j * w.d + n0, sj = g.s[j];
      float* to = g.d_down_weight + j * w.d + n0;
      for (int64_t n = 0; n < many; ++n) {
        d_gamma[n] += G[n] * down[n];
        d_beta[n] += sj * down[n];
        to[n] = G[n] * gamma[n] + sj * beta[n];
      }
    }
    memcpy(g.d_norm_weight + n0, d_gamma, size_t(many) * sizeof(float));
    memcpy(g.d_norm_bias + n0, d_beta, size_t(many) * sizeof(float));
  }
}

void parameters_up(const Gradients& g, int64_t begin, int64_t end, const float* first, int64_t rp) {
  const int64_t r = g.w.r;
  for (int64_t n = begin; n < end; ++n) {
    const float* U = first + (n - begin) / kColumns * kColumns * rp + (n - begin) % kColumns;
    for (int64_t j = 0; j < r; ++j) g.d_up_weight[n * r + j] = U[j * kColumns];
  }
}

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
