// An RMSNorm that reads y, in the adapter's forward by clusters of thread blocks: n = w·ρ·y, ρ = 1/√(mean(y²) + eps).
//
// It is one exchange more. The emit warps send each row's Σy², of the rounded y, to all blocks, and once a tile later,
// when all have come, multiply what they left in x's buffer, which only then is free.
//
// The sums of squares of round n may overwrite those of round n − kKept: a block sends them with the h of round n, so after
// every emit warp has said that it took that of round n − kAhead, and has made the norm of n − kKept.
#pragma once
#include "adapter_cluster_tiles.h"

namespace adapterkern::cluster {

template <class K>
struct Norming : Projecting<K> {
  using Base = Projecting<K>;
  using Base::blocks, Base::columns, Base::first, Base::lane, Base::pair_of_lane, Base::rank, Base::row_of_lane, Base::warp;

  typename K::Shared& s;
  const Forward& p;

  AK_DEVICE explicit Norming(const Forward& p)
      : Base(p), s(*reinterpret_cast<typename K::Shared*>(shared())), p(p) {}

  AK_DEVICE bool norms() const { return p.next.n != nullptr; }
  AK_DEVICE uint32_t square_bytes() const { return uint32_t((blocks - 1) * kRows * sizeof(float)); }

  // The warp's sums of squares of 16 rows from `row` on.
  AK_DEVICE void keep_squares(float (&squares)[2], int row, int slot) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      squares[j] += exchange(squares[j], 1);
      squares[j] += exchange(squares[j], 2);
      if (pair_of_lane == 0) put(&s.squares_of_warp[slot][warp - 4][row + j * 8 + row_of_lane], squares[j]);
    }
  }

  // By the first emit warp: the sums of the block's columns to the other blocks. The block's own warps see them after the
  // next sync_threads().
  AK_DEVICE void send_squares(int n) {
    const int slot = n % K::kKept;
    float total = 0;
    for (int i = 0; i < 4; ++i) total += get(&s.squares_of_warp[n % kAhead][i][lane]);
    put(&s.squares[slot][rank][lane], total);
    fence_async();
    sync_warp();
    if (lane < blocks && lane != rank)
      copy_to_block(s.squares[slot][rank], s.squares[slot][rank], kRows * sizeof(float), &s.squared[slot], lane);
  }

  // The norm of the tile of `rows` rows from `first_row` on, which was round n, over the warp's columns.
  AK_DEVICE void norm(int64_t first_row, int rows, int begin, int n) {
    const int slot = n % K::kKept, buffer = n % K::kBuffers, own = begin + lane % K::kNormers * 8;
    if (blocks > 1) {
      wait_for_blocks(&s.squared[slot], parity(n, K::kKept));
      if (warp == 4 && lane == 0) arrive_expecting(&s.squared[slot], square_bytes());
    }
    float factors[8];  // of the lane's columns, read again for each tile: registers are scarcer than reads of L1
#pragma unroll
    for (int i = 0; i < 8; ++i) factors[i] = own < columns ? p.next.weight[first + own + i] : 0;
    float squares = 0;  // of the lane's row
    for (int b = 0; b < blocks; ++b) squares += get(&s.squares[slot][b][lane]);
    const float rstd = 1 / sqrtf(squares / p.d + p.next.eps);
    if (rank == 0 && warp == 4 && p.next.rstd && lane < rows) p.next.rstd[first_row + lane] = rstd;
#pragma unroll 2
    for (int row = lane / K::kNormers; row < kRows; row += 32 / K::kNormers) {
      const float by = from_lane(rstd, row);
      if (row >= rows || own >= columns) continue;
      uint32_t v[4];
      get_words(v, &s.x[buffer][row * K::kXPitch + own]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pair y = unpack(v[i]);
        v[i] = pack(y.x * by * factors[2 * i], y.y * by * factors[2 * i + 1]);
      }
      write_words(p.next.n + (first_row + row) * p.d + first + own, v);
    }
    sync_warp();
    if (lane == 0) arrive(&s.stored[buffer]);  // the tile is not read again
  }
};

}  // namespace adapterkern::cluster
