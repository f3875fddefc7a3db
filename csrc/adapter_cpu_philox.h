// The mask of dropout, by Philox4x32-10 (Salmon et al. 2011): a part of adapter_cpu_kernels.h.
//
// The key is the seed. Row t has the counters (j / 4, low half of t, high half of t, 0), and unit j word j % 4 of its one.
#pragma once

#include "adapter_cpu_vectors.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

typedef uint64_t vl __attribute__((vector_size(W * 4)));  // 32 bits in each 64; those above them are arbitrary

#if AK_WIDTH == 16
AK_INLINE vl product_of(vl a, uint64_t b) {
  return reinterpret_cast<vl>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(int64_t(b))));
}
AK_INLINE vu even_lanes(vl a, vl b) {
  return reinterpret_cast<vu>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
AK_INLINE vu odd_lanes(vl a, vl b) {
  return reinterpret_cast<vu>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
constexpr vl kCounters = {0, 4, 1, 5, 2, 6, 3, 7};  // even lanes, then odd lanes, are in order
#else
AK_INLINE vl product_of(vl a, uint64_t b) {
  return reinterpret_cast<vl>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(int64_t(b))));
}
AK_INLINE vu even_lanes(vl a, vl b) {
  return reinterpret_cast<vu>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
AK_INLINE vu odd_lanes(vl a, vl b) {
  return reinterpret_cast<vu>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
constexpr vl kCounters = {0, 2, 1, 3};
#endif

AK_INLINE vf mask_of(vu words, const Drop& drop) {
  const vu threshold = drop.threshold - vu{};
  return reinterpret_cast<vf>(reinterpret_cast<vu>(words >= threshold) & reinterpret_cast<vu>(splat(drop.kept)));
}

// What multiplies the units of a row, mask[rp]: `kept` or 0
void dropout(const Drop& drop, int64_t row, int64_t rp, float* mask) {
  constexpr uint64_t kLow = 0xffffffffu;
  for (int64_t j = 0; j < rp; j += 2 * W) {
    vl c0 = kCounters + uint64_t(j / 4), c1 = (uint64_t(row) & kLow) - vl{}, c2 = (uint64_t(row) >> 32) - vl{}, c3 = {};
    uint32_t k0 = uint32_t(drop.seed), k1 = uint32_t(drop.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const vl p0 = product_of(c0, 0xD2511F53u), p1 = product_of(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const vl low = (c0 & kLow) | c1 << 32, high = (c2 & kLow) | c3 << 32;
    store(mask + j, mask_of(even_lanes(low, high), drop));
    store(mask + j + W, mask_of(odd_lanes(low, high), drop));
  }
}

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
