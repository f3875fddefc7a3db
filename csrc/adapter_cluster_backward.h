// The adapter's backward by clusters of thread blocks: dy and x are read once, dx is written once, and what the
// parameters' gradients are made of never leaves registers.
//
//     dh = dy·W_up     dz = dh ⊙ act'(z)     ζ = round(ρ·dz)     h = act(z)
//     dx = dy + ζ·A + x·c2 − (c1 + μ·c2)     c1 = Σᵣ ζ·rowsum(A)/d     c2 = −ρ·Σᵣ ζ·(z − c)/d
//     G  = Σₜ ζᵀ(x − s)     U = Σₜ hᵀ·dy     Σₜ dz     Σₜ (μ − s)·ζ     Σₜ dy
//
// s is 0, and for a row whose mean is more than 16 times its standard deviation that mean, rounded as x is.
// adapterkern/ops/kernels/backward.py makes gradients of the sums of all clusters.
//
// Tiles, blocks, rounds and the exchange are as in the forward (adapter_cluster_forward.h); but a tile is two buffers, of
// dy and of x, and every tile is a round. A block's columns of W_up are in registers, those of A in shared memory. The
// steps of a tile:
//
//     load      one warp    rows of dy and x, by bulk copies; zeros for rows and columns that they lack
//     project   4 warps     partial products dy·W_up and Σₜ dy of the block's columns
//     reduce    2 warps     of 32/C of the tile's rows: ζ, h and two constants per row, which go to all blocks
//     grad      8 warps     G and U of kColumns/8 columns each, in registers for the whole launch; dx in dy's buffer
//     store     one warp    dx's rows, by bulk copies
//
// Of x and dy a grad warp loads each matrix once, transposed: the fragments are right factors of ζᵀ·x and hᵀ·dy, and lie
// as the sums of dxᵀ = Aᵀ·ζᵀ do. Shared memory's bandwidth is the next bound after the card's memory.
#pragma once
#include "adapter_cluster_tiles.h"

namespace adapterkern::cluster {

template <int R_, int kColumns_, int kBuffers_>
struct BackwardConfig : Products<R_, kColumns_> {
  using P = Products<R_, kColumns_>;
  static constexpr int kThreads = 512, kBuffers = kBuffers_;
  static constexpr int kGrad = P::kColumns / 8;       // columns of a grad warp
  static constexpr int kPart = kGrad < 32 ? kGrad : 32;  // of them, at a time in registers

  struct Constants {
    float c2, rest;  // dx = dy + ζ·A + x·c2 + rest
    uint32_t shift, unused;
  };

  struct Shared {
    uint16_t x[kBuffers][kRows * P::kXPitch];  // followed by dy, and ζ by h: add_part() counts on it
    uint16_t dy[kBuffers][kRows * P::kXPitch];
    uint16_t a[P::R * P::kXPitch];
    uint16_t zeta[kAhead][kRows * P::kHPitch];
    uint16_t h[kAhead][kRows * P::kHPitch];
    Constants constants[kAhead][kRows];
    float sent[kAhead][kRows * P::kSumPitch];      // partial products
    float received[kAhead][kRows * P::kSumPitch];  // of this block's rows, from each block; at the end, the blocks' totals
    float totals[2][2][P::R];  // of each reducing warp: Σ dz and Σ (μ − s)·ζ
    Barrier loaded[kBuffers], done[kBuffers], stored[kBuffers];
    Barrier summed[kAhead], hidden[kAhead], taken[kAhead], weighed, ended;
  };
  static_assert(kMaxBlocks * sizeof Shared::totals <= sizeof Shared::received);
};

template <class K>
struct BackwardBlock : Projecting<K> {
  using Base = Projecting<K>;
  using Base::across, Base::blocks, Base::columns, Base::first, Base::lane, Base::matrix, Base::owned;
  using Base::pair_of_lane, Base::put_products, Base::rank, Base::row_of_lane, Base::send_products, Base::split;
  using Base::sum_bytes, Base::warp;
  using Base::matrix_by_rows;
  using typename Base::Fragments;

  typename K::Shared& s;
  const Backward& p;

  AK_DEVICE explicit BackwardBlock(const Backward& p)
      : Base(p), s(*reinterpret_cast<typename K::Shared*>(shared())), p(p) {}

  AK_DEVICE uint32_t hidden_bytes() const { return kRows * (2 * K::R * sizeof(uint16_t) + sizeof(s.constants[0][0])); }

  AK_DEVICE void start() {
    if (thread_index() == 0) {
      for (int i = 0; i < K::kBuffers; ++i) init(&s.loaded[i], 1), init(&s.done[i], 8), init(&s.stored[i], 1);
      for (int i = 0; i < kAhead; ++i) init(&s.summed[i], 1), init(&s.hidden[i], 1), init(&s.taken[i], 8);
      init(&s.weighed, 1), init(&s.ended, 1);
      fence_init();
      for (int i = 0; i < kAhead; ++i)
        arrive_expecting(&s.summed[i], sum_bytes()), arrive_expecting(&s.hidden[i], hidden_bytes());
      arrive_expecting(&s.weighed, uint32_t(K::R * columns) * 2);
      arrive_expecting(&s.ended, uint32_t(blocks * sizeof(s.totals)));
    }
    sync_warp();  // the cluster's barrier takes whole warps
    sync_cluster();  // no byte arrives before its barrier is there
    follow();
  }

  AK_DEVICE void load() {
    for (int i = lane; i < K::R; i += 32)
      copy_in(&s.a[i * K::kXPitch], p.a + int64_t(i) * p.padded_d + first, columns * 2, &s.weighed);
    Tiles tile(p);
    for (int i = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers;
      if (i >= K::kBuffers) wait(&s.stored[buffer], parity(i - K::kBuffers, K::kBuffers));
      put_zeros(buffer, tile.rows);
      sync_warp();  // every lane has seen the phase, and has written its zeros
      if (lane == 0) arrive_expecting(&s.loaded[buffer], uint32_t(tile.rows * columns) * 4);
      if (lane < tile.rows) {
        copy_in(&s.dy[buffer][lane * K::kXPitch], p.dy + tile.at(lane) * p.d + first, columns * 2, &s.loaded[buffer]);
        copy_in(&s.x[buffer][lane * K::kXPitch], p.x + tile.at(lane) * p.stride + first, columns * 2,
                &s.loaded[buffer]);
      }
    }
  }

  // By the loading warp: zeros for what a tile lacks, because 0 times what lies there must be 0. Rows that are absent have
  // ζ = h = 0, and columns that are absent have weights of 0 in W_up; the tile before has left its dx in them.
  AK_DEVICE void put_zeros(int buffer, int rows) {
    const int units = columns / 4, absent = (K::kColumns - columns) / 4;
    for (int i = lane; i < (kRows - rows) * units; i += 32) {
      const int at = (rows + i / units) * K::kXPitch + i % units * 4;
      put(reinterpret_cast<Pair*>(&s.x[buffer][at]), Pair{0, 0});
      put(reinterpret_cast<Pair*>(&s.dy[buffer][at]), Pair{0, 0});
    }
    for (int i = lane; i < kRows * absent; i += 32)
      put(reinterpret_cast<Pair*>(&s.dy[buffer][i / absent * K::kXPitch + columns + i % absent * 4]), Pair{0, 0});
  }

  AK_DEVICE void store() {
    Tiles tile(p);
    for (int i = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers;
      wait(&s.done[buffer], parity(i, K::kBuffers));
      if (p.dx && lane < tile.rows)
        copy_out(p.dx + tile.at(lane) * p.d + first, &s.dy[buffer][lane * K::kXPitch], columns * 2);
      close_group();
      wait_read();
      sync_warp();
      if (lane == 0) arrive(&s.stored[buffer]);
    }
  }

  AK_DEVICE void project() {
    constexpr int kShare = K::kColumns / 4;  // the columns of a warp for Σₜ dy, two per lane
    Fragments w;
    load_up(w);
    float bias[2] = {};
    for (int i = 0, tiles = Tiles(p).count(); i < tiles; ++i) {
      const int buffer = i % K::kBuffers, slot = i % kAhead;
      wait(&s.loaded[buffer], parity(i, K::kBuffers));
      float products[2][K::kOwn / 8][4] = {};
      const Address from = matrix(s.dy[buffer] + split() * K::kSteps * 16, K::kXPitch);
      uint32_t steps[2][2][4];  // loaded a step before they are multiplied
      const auto load_step = [&](int k) {
#pragma unroll
        for (int m = 0; m < 2; ++m) load_matrices(steps[k % 2][m], from + (m * 16 * K::kXPitch + k * 16) * 2);
      };
      load_step(0);
#pragma unroll
      for (int k = 0; k < K::kSteps; ++k) {
        if (k + 1 < K::kSteps) load_step(k + 1);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < K::kOwn / 8; ++n) multiply(products[m][n], steps[k % 2][m], w[k][n][0], w[k][n][1]);
      }
      if (lane < kShare / 2) {
        const uint16_t* column = s.dy[buffer] + warp * kShare + lane * 2;
#pragma unroll 4
        for (int row = 0; row < kRows; ++row) {
          const Pair v = unpack(get(reinterpret_cast<const uint32_t*>(column + row * K::kXPitch)));
          bias[0] += v.x, bias[1] += v.y;
        }
      }
      if (i >= kAhead) wait(&s.taken[slot], parity(i - kAhead, kAhead));
#pragma unroll
      for (int m = 0; m < 2; ++m) put_products(s.sent[slot], m * 16, products[m]);
      fence_async();
      sync_threads(1, 128);
      if (warp == 0 && lane < blocks) send_products(s.received[slot], s.sent[slot], &s.summed[slot]);
    }
    if (const int at = warp * kShare + lane * 2; p.dbias && lane < kShare / 2 && at < columns) {
      float* to = p.dbias + int64_t(cluster_index()) * p.padded_d + first + at;
      to[0] = bias[0], to[1] = bias[1];
    }
  }

  // The right factor's elements of a thread are those of two rows of W_up, which lie R apart.
  AK_DEVICE void load_up(Fragments& w) const {
    const int begin = split() * K::kSteps * 16, present = (columns - begin) / 16;
    const uint16_t* from = p.w + int64_t(first + begin + pair_of_lane) * K::R + across() * K::kOwn + row_of_lane;
#pragma unroll
    for (int k = 0; k < K::kSteps; ++k)
#pragma unroll
      for (int n = 0; n < K::kOwn / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint16_t* at = from + (k * 16 + j * 8) * K::R + n * 8;
          w[k][n][j] = k < present ? read_half(at) | read_half(at + K::R) << 16 : 0;
        }
  }

  struct Row {
    float z[4], mean, rstd;
  };

  // What the forward kept of a row, four of its adapter dimensions; of a row or dimension that is absent, zeros.
  AK_DEVICE Row read_row(const Tiles& tile, int row, int dim) const {
    Row v{};
    if (row >= tile.rows) return v;
    const uint16_t* from = p.z + tile.at(row) * p.r + dim;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (dim + j < p.r) v.z[j] = unpack(read_half(from + j)).x;
    v.mean = p.mean[tile.at(row)], v.rstd = p.rstd[tile.at(row)];
    return v;
  }

  // Thread t of 64 has four adapter dimensions, of every 64·4/R-th row of those that the block owns.
  AK_DEVICE void reduce() {
    constexpr int kShared = K::R / 4, kAbreast = 64 / kShared;  // threads of a row; rows
    const int t = thread_index() - (K::kThreads - 64), dim = t % kShared * 4, rows = owned();
    const int first_row = t / kShared, first_of_warp = t / 32 * (kAbreast / 2);
    float totals[2][4] = {};
    const float per_column = 1.0f / float(p.d);
    Tiles tile(p);
    for (int i = 0; tile.next(); ++i) {
      const int slot = i % kAhead;
      Row own = read_row(tile, rank * rows + first_row, dim);  // on its way while the products come
      wait_for_blocks(&s.summed[slot], parity(i, kAhead));
      if (t == 0) arrive_expecting(&s.summed[slot], sum_bytes());
      sync_threads(2, 64);  // a warp without rows would not hold up the next phases until it has seen these
      for (int of_warp = first_of_warp; of_warp < rows; of_warp += kAbreast) {  // the same for all lanes
        const int row = of_warp - first_of_warp + first_row;
        const bool present = row < rows;
        float dh[4] = {};
        const float* from = &s.received[slot][(present ? row : 0) * K::kSumPitch + dim];
        for (int b = 0; b < blocks; ++b)
#pragma unroll
          for (int k = 0; k < K::kSplits; ++k)
#pragma unroll
            for (int j = 0; j < 4; ++j) dh[j] += get(from + b * rows * K::kSumPitch + k * K::R + j);
        const bool counts = present && rank * rows + row < tile.rows;
        const float away = own.mean * own.rstd, shift = away * away <= 256 ? 0 : unpack(pack(own.mean, 0)).x;
        uint32_t zeta[2], h[2];
        float sums[2] = {};
        const float *c = p.c + opaque(dim), *row_sums = p.row_sums + opaque(dim);  // read again: registers are few
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          dh[j] = counts ? dh[j] * derivative(p.activation, own.z[j]) : 0;
          totals[0][j] += dh[j];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          h[j] = pack(activate(p.activation, own.z[2 * j]), activate(p.activation, own.z[2 * j + 1]));
          zeta[j] = pack(own.rstd * dh[2 * j], own.rstd * dh[2 * j + 1]);
          const Pair v = unpack(zeta[j]);
          totals[1][2 * j] += (own.mean - shift) * v.x, totals[1][2 * j + 1] += (own.mean - shift) * v.y;
          sums[0] += v.x * row_sums[2 * j] + v.y * row_sums[2 * j + 1];
          sums[1] += v.x * (own.z[2 * j] - c[2 * j]) + v.y * (own.z[2 * j + 1] - c[2 * j + 1]);
        }
#pragma unroll
        for (int mask = 1; mask < kShared; mask *= 2)
          sums[0] += exchange(sums[0], mask), sums[1] += exchange(sums[1], mask);
        if (present) {
          const int at = (rank * rows + row) * K::kHPitch + dim;
          for (int b = 0; b < blocks; ++b) {
            store_in_block(&s.zeta[slot][at], zeta[0], zeta[1], &s.hidden[slot], b);
            store_in_block(&s.h[slot][at], h[0], h[1], &s.hidden[slot], b);
          }
          if (dim == 0) send_constants(slot, rank * rows + row, own, sums[0] * per_column, sums[1] * per_column, shift);
        }
        if (of_warp + kAbreast < rows) own = read_row(tile, rank * rows + row + kAbreast, dim);
      }
    }
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float total = totals[which][j];
#pragma unroll
        for (int mask = kShared; mask < 32; mask *= 2) total += exchange(total, mask);
        if (lane < kShared) put(&s.totals[t / 32][which][dim + j], total);
      }
    fence_async();  // they leave by a bulk copy
  }

  AK_DEVICE void send_constants(int slot, int row, const Row& own, float c1, float c2, float shift) {
    typename K::Constants* to = &s.constants[slot][row];
    const float factor = -own.rstd * c2;
    const uint32_t rounded = pack(shift, 0);
    for (int b = 0; b < blocks; ++b) {
      store_in_block(to, bits(factor), bits(-c1 - own.mean * factor), &s.hidden[slot], b);
      store_in_block(&to->shift, rounded, 0, &s.hidden[slot], b);
    }
  }

  using Sums = float[K::R / 16][K::kGrad / 8][4];

  AK_DEVICE void grad() {
    Sums g = {}, u = {};
    const int begin = (warp - 4) * K::kGrad;
    wait(&s.weighed, 0);
    for (int i = 0, tiles = Tiles(p).count(); i < tiles; ++i) {
      const int buffer = i % K::kBuffers, slot = i % kAhead;
      wait_for_blocks(&s.hidden[slot], parity(i, kAhead));
      if (warp == 4 && lane == 0) arrive_expecting(&s.hidden[slot], hidden_bytes());
      wait(&s.loaded[buffer], parity(i, K::kBuffers));
      const bool shifted = any_in_warp(get(&s.constants[slot][lane].shift) != 0);
#pragma unroll 1
      for (int k = 0; k < kRows; k += 16)
#pragma unroll
        for (int part = 0; part < K::kGrad; part += K::kPart) add_part(g, u, buffer, slot, k, begin, part, shifted);
      fence_async();  // the tile leaves by bulk copies
      sync_warp();  // every lane has seen the phases, and has written
      if (lane == 0) arrive(&s.taken[slot]), arrive(&s.done[buffer]);
    }
    const BackwardBlock again(p);  // its place anew: in registers there was no room to keep it
    again.store_sums(p.g, g), again.store_sums(p.u, u);
  }

  // 16 rows from k on and kPart columns from `part` on, of the grad warp's: their part of G and U, and dx.
  AK_DEVICE void add_part(Sums& g, Sums& u, int buffer, int slot, int k, int begin, int part, bool shifted) {
    constexpr int kTiles = K::kPart / 16;
    const int place = k * K::kXPitch + begin + part;
    const Address x = matrix(s.x[buffer] + place, K::kXPitch), dy = x + sizeof(s.x);  // one register for both
    uint32_t of_x[kTiles][4], of_dy[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      load_transposed(of_x[n], x + n * 32);
      load_transposed(of_dy[n], dy + n * 32);
    }
    if (shifted)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto* of_row = &s.constants[slot][k + j * 8 + pair_of_lane];
        const uint32_t shifts = get(&of_row[0].shift) | get(&of_row[1].shift) << 16;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
          of_x[n][j] = subtract(of_x[n][j], shifts), of_x[n][2 + j] = subtract(of_x[n][2 + j], shifts);
      }
    const Address zeta = matrix_by_rows(&s.zeta[slot][k * K::kHPitch], K::kHPitch);
    const Address h = zeta + sizeof(s.zeta);
#pragma unroll
    for (int m = 0; m < K::R / 16; ++m) {
      uint32_t left[4];
      load_transposed(left, zeta + m * 32);
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n)
        multiply(g[m][part / 8 + n], left, of_x[n / 2][n % 2 * 2], of_x[n / 2][n % 2 * 2 + 1]);
      load_transposed(left, h + m * 32);
#pragma unroll
      for (int n = 0; n < 2 * kTiles; ++n)
        multiply(u[m][part / 8 + n], left, of_dy[n / 2][n % 2 * 2], of_dy[n / 2][n % 2 * 2 + 1]);
    }
    if (shifted)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) load_transposed(of_x[n], x + n * 32);

    float dx[kTiles][2][4];  // transposed: columns by rows
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto* of_row = &s.constants[slot][k + j * 8 + pair_of_lane];
      const float c2[2] = {get(&of_row[0].c2), get(&of_row[1].c2)};
      const float rest[2] = {get(&of_row[0].rest), get(&of_row[1].rest)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair v = unpack(of_x[n][half * 2 + j]), own = unpack(of_dy[n][half * 2 + j]);
          dx[n][j][half * 2] = own.x + (v.x * c2[0] + rest[0]);
          dx[n][j][half * 2 + 1] = own.y + (v.y * c2[1] + rest[1]);
        }
    }
    const Address a = matrix_by_rows(s.a + begin + part, K::kXPitch);
#pragma unroll
    for (int m = 0; m < K::R / 16; ++m) {
      uint32_t right[4];
      load_matrices(right, zeta + m * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t left[4];
        load_transposed(left, a + m * 16 * K::kXPitch * 2 + n * 32);
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply(dx[n][j], left, right[j * 2], right[j * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          of_dy[n][half * 2 + j] = pack(dx[n][j][half * 2], dx[n][j][half * 2 + 1]);
      store_transposed(dy + n * 32, of_dy[n]);
    }
  }

  AK_DEVICE void store_sums(float* to, const Sums& sums) const {
    if (!to) return;
    const int begin = (warp - 4) * K::kGrad;
    to += (int64_t(cluster_index()) * K::R + row_of_lane) * p.padded_d + first + begin + pair_of_lane;
#pragma unroll
    for (int m = 0; m < K::R / 16; ++m)
#pragma unroll
      for (int n = 0; n < K::kGrad / 8; ++n)
        if (begin + n * 8 < columns)
#pragma unroll
          for (int j = 0; j < 4; ++j) to[(m * 16 + j / 2 * 8) * int64_t(p.padded_d) + n * 8 + j % 2] = sums[m][n][j];
  }

  // The reducing warps' totals of all blocks, added up by the first block.
  AK_DEVICE void finish() {
    if (thread_index() == 0)
      copy_to_block(s.received[0] + rank * (sizeof(s.totals) / 4), s.totals, sizeof(s.totals), &s.ended, 0);
    const int t = thread_index();
    if (rank > 0 || t >= 2 * K::R) return;
    wait_for_blocks(&s.ended, 0);
    float total = 0;
    for (int b = 0; b < blocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) total += get(s.received[0] + (b * 2 + half) * 2 * K::R + t);
    if (float* to = t < K::R ? p.dz : p.q) to[int64_t(cluster_index()) * K::R + t % K::R] = total;
  }
};

template <class K>
AK_DEVICE void backward(const Backward& p) {
  BackwardBlock<K>(p).start();
  const int warp = thread_index() / 32;
  if (warp < 4) {
    give_registers<104>();
    BackwardBlock<K>(p).project();
  } else if (warp < 12) {
    take_registers<168>();
    BackwardBlock<K>(p).grad();
  } else {
    give_registers<72>();
    if (warp == 12)
      BackwardBlock<K>(p).load();
    else if (warp == 13)
      BackwardBlock<K>(p).store();
    else
      BackwardBlock<K>(p).reduce();
  }
  sync_warp();  // the cluster's barrier takes whole warps
  sync_cluster();  // every round is over, and with it what was received
  BackwardBlock<K>(p).finish();
  sync_warp();  // the cluster's barrier takes whole warps
  sync_cluster();  // no block ends while another may still read its shared memory
}

}  // namespace adapterkern::cluster
