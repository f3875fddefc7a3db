// The sum before an adapter, and the RMSNorm behind it, of a block of rows: a part of adapter_cpu_kernels.h.
//
//   forward    s = x + added      n = w·(ρ·y)        ρ = 1/sqrt(mean(y²) + eps)
//   backward   dy = ρ(g − ρ·y·mean(g·ρ·y))      g = w·dn
//
// s, y and n are rounded; between y and n nothing is.
#pragma once

#include "adapter_cpu_vectors.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

template <class E>
const E* row_of(const void* base, int64_t t, int64_t stride) {
  return static_cast<const E*>(base) + t * stride;
}
template <class E>
E* row_of(void* base, int64_t t, int64_t stride) {
  return static_cast<E*>(base) + t * stride;
}

template <class E>
void sum_rows(const Around& a, Rows block, int64_t d) {
  for (int64_t t = block.begin; t < block.end; ++t) {
    const E *x = row_of<E>(a.x, t, a.x_stride), *added = row_of<E>(a.added, t, a.added_stride);
    E* s = row_of<E>(a.s, t, d);
    int64_t i = 0;
    for (; i + W <= d; i += W) store(s + i, load(x + i) + load(added + i));
    if (i < d) store_upto(s + i, load_part(x + i, d - i) + load_part(added + i, d - i), d - i);
  }
}

template <class E>
void norm_rows(const Around& a, const void* y_, Rows block, int64_t d) {
  for (int64_t t = block.begin; t < block.end; ++t) {
    const E* y = row_of<E>(y_, t, d);
    vf squares[2] = {}, two[2];
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W) {
      load_two(y + i, two);
      squares[0] += two[0] * two[0];
      squares[1] += two[1] * two[1];
    }
    for (; i < d; i += W) {
      two[0] = load_upto(y + i, d - i);
      squares[0] += two[0] * two[0];
    }
    const float rho = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / float(d) + a.eps);
    if (a.rstd) a.rstd[t] = rho;
    E* n = row_of<E>(a.n, t, d);
    for (i = 0; i + W <= d; i += W) store(n + i, load(y + i) * rho * load(a.weight + i));
    if (i < d) store_upto(n + i, load_part(y + i, d - i) * rho * load_part(a.weight + i, d - i), d - i);
  }
}

template <class E>
void norm_backward(const NormBackward& b, Rows block, int64_t d) {
  for (int64_t t = block.begin; t < block.end; ++t) {
    const E *y = row_of<E>(b.y, t, b.y_stride), *dn = row_of<E>(b.dn, t, b.dn_stride);
    E* to = row_of<E>(b.dy, t, d);
    vf products[2] = {};
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W)
#pragma GCC unroll 2
      for (int64_t q = 0; q < 2; ++q) {
        const int64_t at = i + q * W;
        products[q] += load(b.weight + at) * load(dn + at) * load(y + at);
      }
    for (; i < d; i += W)
      products[0] += load_upto(b.weight + i, d - i) * load_upto(dn + i, d - i) * load_upto(y + i, d - i);
    const float rho = b.rstd[t], mean = rho * sum(products[0] + products[1]) / float(d);
    const auto grad = [&](vf weight, vf dn_, vf y_) { return rho * (weight * dn_ - rho * y_ * mean); };
    for (i = 0; i + W <= d; i += W) store(to + i, grad(load(b.weight + i), load(dn + i), load(y + i)));
    if (const int64_t left = d - i; left > 0)
      store_upto(to + i, grad(load_part(b.weight + i, left), load_part(dn + i, left), load_part(y + i, left)), left);
  }
}

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
