// The product of pairs of bf16 by AMX: see product() in adapter_cpu_products.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "adapter_cpu_ahead.h"

namespace adapterkern::cpu::amx {
namespace {

#ifdef AK_EMULATE_TILES
// In place of the instructions, on machines that have AVX512-BF16 and no AMX: for tests
struct Tile {
  uint32_t unit[16][16];
};
thread_local Tile emulated[8];

inline void emulate_load(Tile& tile, const void* from, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) memcpy(tile.unit[i], static_cast<const char*>(from) + i * stride, 64);
}
inline void emulate_store(const Tile& tile, void* to, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * stride, tile.unit[i], 64);
}
inline float half_of(uint32_t unit, bool upper) {
  const uint32_t bits = upper ? unit & 0xffff0000u : unit << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void emulate_product(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      memcpy(&sum, &c.unit[m][n], 4);
      for (int k = 0; k < 16; ++k)
        for (int upper = 0; upper < 2; ++upper) sum += half_of(a.unit[m][k], upper) * half_of(b.unit[k][n], upper);
      memcpy(&c.unit[m][n], &sum, 4);
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadd(tile, from, stride) emulate_load(emulated[tile], from, stride)
#define _tile_stored(tile, to, stride) emulate_store(emulated[tile], to, stride)
#define _tile_zero(tile) memset(&emulated[tile], 0, sizeof(Tile))
#define _tile_dpbf16ps(c, a, b) emulate_product(emulated[c], emulated[a], emulated[b])
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#endif

// Eight tiles of 16 rows of 64 bytes. In memory, and not written here: gcc 12 tells the compiler of 8 of the 64 bytes
// that _tile_loadconfig reads, so that stores to the others are dropped.
alignas(64) constexpr uint8_t kTiles[64] = {1, 0, 0, 0, 0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,   // palette 1
                                            64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  // bytes per row
                                            0, 0, 0, 0, 0, 0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
                                            16, 16, 16, 16, 16, 16, 16, 16};                          // rows

inline void configure_tiles() { _tile_loadconfig(kTiles); }
inline void release_tiles() { _tile_release(); }

// M a multiple of 32, K of 16
inline void tile_product(int64_t M, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B, float* C, int64_t ldc,
                         bool add, Ahead& ahead) {
  for (int64_t m = 0; m < M; m += 32) {
    float *c0 = C + m * ldc, *c1 = c0 + 16 * ldc;
    if (add) {
      _tile_loadd(0, c0, ldc * 4);
      _tile_loadd(1, c0 + 16, ldc * 4);
      _tile_loadd(2, c1, ldc * 4);
      _tile_loadd(3, c1 + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < K; k += 16) {
      const uint32_t *a = A + m * lda + k, *b = B + k * 32;
      ahead.fetch();
      _tile_loadd(4, a, lda * 4);
      _tile_loadd(5, a + 16 * lda, lda * 4);
      _tile_loadd(6, b, 128);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, b + 16, 128);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c0, ldc * 4);
    _tile_stored(1, c0 + 16, ldc * 4);
    _tile_stored(2, c1, ldc * 4);
    _tile_stored(3, c1 + 16, ldc * 4);
  }
}

}  // namespace
}  // namespace adapterkern::cpu::amx
