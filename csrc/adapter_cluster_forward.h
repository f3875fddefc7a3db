// The adapter's forward by clusters of thread blocks, for cards that have them: x is read once, y written once.
//
//     y = x + h·W_upᵀ + b_up     h = act(z)     z = ρ(x·Aᵀ − μ·rowsum(A)) + c
//
// A cluster holds tiles of 32 rows. Each of its blocks owns up to kColumns columns of them, and keeps its columns of A and
// W_up in registers, as fragments of the products, for the whole launch. Only (32, R) partial products and h travel
// between the blocks. So that several tiles are under way at once, each step of a tile has warps of its own:
//
//     load      one warp    x's rows, by bulk copies into one of kBuffers buffers
//     project   4 warps     partial products and moments of the block's columns, sent to the blocks that finish them
//     reduce    2 warps     of 32/C of the tile's rows: sums in the order of the blocks, z, h, which go to all blocks
//     emit      4 warps     x + h·W_upᵀ + b_up over the block's columns, in x's buffer
//     store     one warp    y's rows, by bulk copies out of that buffer, which then is free
//
// An RMSNorm that reads y is one exchange more of the emit warps (adapter_cluster_norm.h).
//
// Rounds. Every tile with an adapter is one round of the exchange; its buffers are kAhead deep. A block sends the partial
// products of round n once its own emit warps have used the h of round n − kAhead. Then every block has reduced that round, so
// that the buffers of round n are free in all of them, and so are those that round's copies were read from. No other
// signal goes back.
//
// A block's columns of a row whose mean is more than 16 times its standard deviation are multiplied again as x − s, with
// s that mean, rounded as x is; the reduction takes the columns' moments and s from each block. Squares come from a
// product of x by itself, of which only the diagonal is used: it costs fewer instructions than unpacking x.
#pragma once
#include "adapter_cluster_norm.h"

namespace adapterkern::cluster {

template <int R_, int kColumns_, int kBuffers_>
struct ForwardConfig : Products<R_, kColumns_> {
  using P = Products<R_, kColumns_>;
  static constexpr int kThreads = 384, kBuffers = kBuffers_;
  static constexpr int kTogether = P::R > 64 ? 1 : 2;  // halves of a tile in one pass over the columns
  static constexpr int kLoaded = P::R > 64 ? 1 : 2;    // steps of x in registers; at 128 there is no room for two
  static constexpr int kEmitted = P::kColumns / 4;     // columns of an emit warp
  static constexpr int kNormers = kEmitted / 8;        // lanes of an emit warp that norm a row together
  static constexpr int kKept = 3;                      // rounds of sums of squares

  struct Shared {
    uint16_t x[kBuffers][kRows * P::kXPitch];
    uint16_t h[kAhead][kRows * P::kHPitch];
    float sent[kAhead][kRows * P::kSumPitch];      // partial products; then mean, squared deviations and s of the columns
    float received[kAhead][kRows * P::kSumPitch];  // the same of this block's rows, from each block
    Pair moments[kAhead][2][kRows];                // Σx and Σx², of half of the columns each
    float bias[P::kColumns];
    float own_row_sums[2][P::kSums];  // of A's columns, one for each of two adapters
    float row_sums[2][kMaxBlocks * P::kSums];
    float squares_of_warp[kAhead][4][kRows];  // Σy² of an emit warp's columns
    float squares[kKept][kMaxBlocks][kRows];  // of each block's
    Barrier loaded[kBuffers], emitted[kBuffers], stored[kBuffers];
    Barrier summed[kAhead], hidden[kAhead], taken[kAhead], weighed[2], squared[kKept];
  };
};

template <class K>
struct Block : Norming<K> {
  using Base = Norming<K>;
  using Base::across, Base::blocks, Base::columns, Base::first, Base::keep_squares, Base::lane, Base::matrix, Base::norm;
  using Base::norms, Base::owned, Base::p, Base::pair_of_lane, Base::put_products, Base::rank, Base::row_of_lane, Base::s;
  using Base::send_products, Base::send_squares, Base::split, Base::square_bytes, Base::sum_bytes, Base::warp;
  using typename Base::Fragments;
  using Base::Base;

  AK_DEVICE uint32_t hidden_bytes() const { return kRows * K::R * sizeof(uint16_t); }
  AK_DEVICE uint32_t weight_bytes() const { return uint32_t(blocks * K::kSums * sizeof(float)); }

  AK_DEVICE void start() {
    if (thread_index() == 0) {
      for (int i = 0; i < K::kBuffers; ++i) {
        init(&s.loaded[i], 1), init(&s.emitted[i], 8);
        init(&s.stored[i], norms() ? 5 : 1);  // the emit warps read y once more
      }
      for (int i = 0; i < K::kKept; ++i) init(&s.squared[i], 1);
      for (int i = 0; i < kAhead; ++i) init(&s.summed[i], 1), init(&s.hidden[i], 1), init(&s.taken[i], 4);
      for (int i = 0; i < 2; ++i) init(&s.weighed[i], 1);
      fence_init();
      for (int i = 0; i < kAhead; ++i)
        arrive_expecting(&s.summed[i], sum_bytes()), arrive_expecting(&s.hidden[i], hidden_bytes());
      for (int i = 0; i < 2; ++i) arrive_expecting(&s.weighed[i], weight_bytes());
      if (blocks > 1)
        for (int i = 0; i < K::kKept; ++i) arrive_expecting(&s.squared[i], square_bytes());
    }
    // Columns that x lacks: their weights are 0, and 0 times what lies there must be 0.
    const int absent = K::kColumns - columns;
    for (int i = thread_index(); i < K::kBuffers * kRows * absent; i += K::kThreads)
      put(&s.x[i / (kRows * absent)][i / absent % kRows * K::kXPitch + columns + i % absent], uint16_t(0));
    sync_warp();  // the cluster's barrier takes whole warps
    sync_cluster();  // no byte arrives before its barrier is there
    follow();
  }

  AK_DEVICE void load() {
    Tiles tile(p);
    for (int i = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers;
      if (i >= K::kBuffers) wait(&s.stored[buffer], parity(i - K::kBuffers, K::kBuffers));
      sync_warp();  // every lane has seen the phase
      if (lane == 0) arrive_expecting(&s.loaded[buffer], uint32_t(tile.rows * columns) * 2);
      if (lane < tile.rows)
        copy_in(&s.x[buffer][lane * K::kXPitch], p.x + tile.at(lane) * p.stride + first, columns * 2,
                &s.loaded[buffer]);
    }
  }

  AK_DEVICE void store() {
    Tiles tile(p);
    for (int i = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers;
      wait(&s.emitted[buffer], parity(i, K::kBuffers));
      if (lane < tile.rows)
        copy_out(p.y + tile.at(lane) * p.d + first, &s.x[buffer][lane * K::kXPitch], columns * 2);
      close_group();
      wait_read();
      sync_warp();
      if (lane == 0) arrive(&s.stored[buffer]);
    }
  }

  // One pass over the columns of tile x by a project warp: partial products and moments, less `shift` of a lane's row,
  // into the buffers of round n.
  template <bool kShifted>
  AK_DEVICE void multiply_columns(const Fragments& a, const uint16_t* x, float shift, int n) {
    const int slot = n % kAhead, begin = split() * K::kSteps * 16;
    const uint32_t ones = pack(1, 1);
    float totals[4] = {}, squares[2][4] = {};  // of half of the rows and of the columns; of squares only the diagonal
#pragma unroll 1
    for (int m0 = 0; m0 < 2; m0 += K::kTogether) {
      float products[K::kTogether][K::kOwn / 8][4] = {};
      const Address from = matrix(x + m0 * 16 * K::kXPitch + begin, K::kXPitch);
      uint32_t by_row[K::kTogether][2];
#pragma unroll
      for (int m = 0; m < K::kTogether; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float of_row = kShifted ? from_lane(shift, (m0 + m) * 16 + j * 8 + row_of_lane) : 0;
          by_row[m][j] = pack(of_row, of_row);
        }
      // Loaded a step before they are multiplied: one warp per scheduler has nothing else to do while they come.
      uint32_t steps[K::kLoaded][K::kTogether][4];
      const auto load_step = [&](int k) {
#pragma unroll
        for (int m = 0; m < K::kTogether; ++m)
          load_matrices(steps[k % K::kLoaded][m], from + (m * 16 * K::kXPitch + k * 16) * 2);
      };
      if (K::kLoaded > 1) load_step(0);
#pragma unroll
      for (int k = 0; k < K::kSteps; ++k) {
        if (k + K::kLoaded - 1 < K::kSteps) load_step(k + K::kLoaded - 1);
        if (kShifted && begin + k * 16 >= columns) continue;  // absent columns stay 0
#pragma unroll
        for (int m = 0; m < K::kTogether; ++m) {
          uint32_t(&v)[4] = steps[k % K::kLoaded][m];
          if (kShifted)
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = subtract(v[j], by_row[m][j % 2]);
#pragma unroll
          for (int i = 0; i < K::kOwn / 8; ++i) multiply(products[m][i], v, a[k][i][0], a[k][i][1]);
          if (k % (K::kAcross / 2) * 2 + m0 + m == across()) {
            multiply(totals, v, ones, ones);
            multiply(squares[0], v, v[0], v[2]);
            multiply(squares[1], v, v[1], v[3]);
          }
        }
      }
      if (m0 == 0 && !kShifted && n >= kAhead) wait(&s.taken[slot], parity(n - kAhead, kAhead));
#pragma unroll
      for (int m = 0; m < K::kTogether; ++m) put_products(s.sent[slot], (m0 + m) * 16, products[m]);
    }
    if (pair_of_lane == row_of_lane / 2 * 2) {  // holds the diagonal
      const int odd = row_of_lane % 2;
      Pair* to = &s.moments[slot][warp / 2][across() % 2 * 16 + row_of_lane];
      put(to, Pair{totals[0], odd ? squares[0][1] : squares[0][0]});
      put(to + 8, Pair{totals[2], odd ? squares[1][3] : squares[1][2]});
    }
    fence_async();
    sync_threads(1, 128);
  }

  // Mean and squared deviations of a lane's row, over the block's columns, less s.
  AK_DEVICE Pair moments_of_row(int n) const {
    const Pair a = s.moments[n % kAhead][0][lane], b = s.moments[n % kAhead][1][lane];
    const float total = a.x + b.x, squares = a.y + b.y;
    const float mean = total / columns;
    return {mean, fmaxf(squares - mean * total, 0)};
  }

  AK_DEVICE void load_down(Fragments& a, int adapter) const {
    const int64_t row = int64_t(adapter) * K::R + across() * K::kOwn + row_of_lane;
    const uint16_t* from = p.a + row * p.padded_d + first + split() * K::kSteps * 16 + pair_of_lane;
    const int present = (columns - split() * K::kSteps * 16) / 16;
#pragma unroll
    for (int k = 0; k < K::kSteps; ++k)
#pragma unroll
      for (int n = 0; n < K::kOwn / 8; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          a[k][n][j] = k < present ? read_word(from + int64_t(n * 8) * p.padded_d + k * 16 + j * 8) : 0;
  }

  // The row sums of A's columns, to be sent with the products of round n.
  AK_DEVICE void keep_row_sums(const Fragments& a, int place, int n) {
    if (n >= kAhead) wait(&s.taken[n % kAhead], parity(n - kAhead, kAhead));
#pragma unroll
    for (int i = 0; i < K::kOwn / 8; ++i) {
      float total = 0;
#pragma unroll
      for (int k = 0; k < K::kSteps; ++k)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Pair v = unpack(a[k][i][j]);
          total += v.x + v.y;
        }
      total += exchange(total, 1);
      total += exchange(total, 2);
      if (pair_of_lane == 0) put(&s.own_row_sums[place][split() * K::R + across() * K::kOwn + i * 8 + row_of_lane], total);
    }
  }

  AK_DEVICE void project() {
    Fragments a;
    int held = -1, adapters = 0;  // in registers; how many have been
    Tiles tile(p);
    for (int i = 0, n = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers, place = adapters % 2;
      const bool other = tile.adapter >= 0 && tile.adapter != held;
      if (other) {
        load_down(a, held = tile.adapter);
        keep_row_sums(a, place, n);
        ++adapters;
      }
      wait(&s.loaded[buffer], parity(i, K::kBuffers));
      if (tile.adapter >= 0) {
        multiply_columns<false>(a, s.x[buffer], 0, n);
        Pair moments = moments_of_row(n);
        float shift = 0;
        const float variance = moments.y / columns;  // a NaN or an infinity is of squares that overflow
        const bool far = lane < tile.rows && !(moments.x * moments.x <= 256 * variance && variance <= 1e37f);
        if (any_in_warp(far)) {  // in all four warps, or in none
          if (far) shift = unpack(pack(moments.x, 0)).x;
          sync_threads(1, 128);  // all have read the moments
          multiply_columns<true>(a, s.x[buffer], shift, n);
          moments = moments_of_row(n);
        }
        if (warp == 0) send(moments, shift, n, other ? place : -1);
        ++n;
      }
      sync_warp();  // every lane has seen the phase
      if (lane == 0) arrive(&s.emitted[buffer]);  // x is not read again
    }
  }

  // By the first project warp: each block's rows of the round's partial products, with the moments and the shift of this
  // block's columns; and the row sums in `place`, if it is one.
  AK_DEVICE void send(Pair moments, float shift, int n, int place) {
    const int slot = n % kAhead;
    float* to = &s.sent[slot][lane * K::kSumPitch + K::kSums];
    put(to, moments.x + shift), put(to + 1, moments.y), put(to + 2, shift);
    fence_async();
    sync_warp();
    if (lane >= blocks) return;
    send_products(s.received[slot], s.sent[slot], &s.summed[slot]);
    if (place >= 0)
      copy_to_block(&s.row_sums[place][rank * K::kSums], s.own_row_sums[place], K::kSums * 4, &s.weighed[place], lane);
  }

  // Thread t of 64 has four adapter dimensions, of every 64·4/R-th row of those that the block owns.
  AK_DEVICE void reduce() {
    constexpr int kAbreast = 64 * 4 / K::R;
    const int t = thread_index() - (K::kThreads - 64), dim = t % (K::R / 4) * 4, rows = owned();
    float c[4] = {};
    int held = -1, adapters = 0, place = 0;
    Tiles tile(p);
    for (int i = 0, n = 0; tile.next(); ++i) {
      if (tile.adapter < 0) {
        for (int row = t / (K::R / 4); row < rows; row += kAbreast) save(tile, rank * rows + row, dim, {}, 0, 0);
        continue;
      }
      const int slot = n % kAhead;
      wait_for_blocks(&s.summed[slot], parity(n, kAhead));
      if (t == 0) arrive_expecting(&s.summed[slot], sum_bytes());
      if (tile.adapter != held) {
        held = tile.adapter;
        place = adapters % 2;
        wait_for_blocks(&s.weighed[place], parity(adapters, 2));
        if (t == 0) arrive_expecting(&s.weighed[place], weight_bytes());
        ++adapters;
        for (int j = 0; j < 4; ++j) c[j] = p.c[int64_t(held) * K::R + dim + j];
      }
      sync_threads(2, 64);  // a warp without rows would not hold up the next phases until it has seen these
      for (int row = t / (K::R / 4); row < rows; row += kAbreast) {
        const float* from = &s.received[slot][row * K::kSumPitch];
        const int step = rows * K::kSumPitch;
        // Means relative to the first block's, so that equal ones leave nothing.
        const float base = get(from + K::kSums);
        float offset = 0, squares = 0, u[4] = {};
        for (int b = 0; b < blocks; ++b) offset += columns_of(b) * (get(from + b * step + K::kSums) - base);
        offset /= p.d;
        for (int b = 0; b < blocks; ++b) {
          const float* sums = from + b * step;
          const float away = get(sums + K::kSums) - base - offset, shift = get(sums + K::kSums + 2) - base - offset;
          squares += get(sums + K::kSums + 1) + columns_of(b) * away * away;
#pragma unroll
          for (int k = 0; k < K::kSplits; ++k)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              u[j] += get(sums + k * K::R + dim + j) +
                      shift * get(&s.row_sums[place][b * K::kSums + k * K::R + dim + j]);
        }
        const float rstd = 1 / sqrtf(squares / p.d + p.eps);
        uint32_t z[2], h[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          z[j] = pack(rstd * u[2 * j] + c[2 * j], rstd * u[2 * j + 1] + c[2 * j + 1]);
          const Pair rounded = unpack(z[j]);
          h[j] = pack(activate(p.activation, rounded.x), activate(p.activation, rounded.y));
        }
        for (int b = 0; b < blocks; ++b)
          store_in_block(&s.h[slot][(rank * rows + row) * K::kHPitch + dim], h[0], h[1], &s.hidden[slot], b);
        save(tile, rank * rows + row, dim, z, base + offset, rstd);
      }
      ++n;
    }
  }

  AK_DEVICE float columns_of(int block) const { return float(min(p.columns, p.d - block * p.columns)); }

  AK_DEVICE void save(const Tiles& tile, int row, int dim, const uint32_t (&z)[2], float mean, float rstd) const {
    if (!p.z || row >= tile.rows) return;
    uint16_t* to = p.z + tile.at(row) * p.r + dim;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (dim + j < p.r) to[j] = uint16_t(z[j / 2] >> j % 2 * 16);
    if (dim == 0) p.mean[tile.at(row)] = mean, p.rstd[tile.at(row)] = rstd;
  }

  AK_DEVICE void emit() {
    uint32_t w[K::R / 16][K::kEmitted / 8][2];
    const int begin = (warp - 4) * K::kEmitted;
    int held = -1;
    Tiles tile(p);
    int n = 0;
    for (int i = 0; tile.next(); ++i) {
      const int buffer = i % K::kBuffers;
      if (tile.adapter >= 0) {
        if (tile.adapter != held) load_up(w, held = tile.adapter, begin);
        const int slot = n % kAhead;
        wait_for_blocks(&s.hidden[slot], parity(n, kAhead));
        if (warp == 4 && lane == 0) arrive_expecting(&s.hidden[slot], hidden_bytes());
        wait(&s.loaded[buffer], parity(i, K::kBuffers));
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
          uint32_t h[K::R / 16][4];
#pragma unroll
          for (int k = 0; k < K::R / 16; ++k)
            load_matrices(h[k], matrix(&s.h[slot][m * 16 * K::kHPitch], K::kHPitch) + k * 32);
          float squares[2] = {};  // of rows row_of_lane and row_of_lane + 8
          const Address rows = matrix(&s.x[buffer][m * 16 * K::kXPitch + begin], K::kXPitch);
          uint32_t parts[K::kLoaded][4];  // of x, loaded before the products of the part before
          if (K::kLoaded > 1) load_matrices(parts[0], rows);
#pragma unroll
          for (int n2 = 0; n2 < K::kEmitted / 16; ++n2) {
            if (const int next = n2 + K::kLoaded - 1; next < K::kEmitted / 16)
              load_matrices(parts[next % K::kLoaded], rows + next * 32);
            if (begin + n2 * 16 >= columns) continue;
            uint32_t(&v)[4] = parts[n2 % K::kLoaded];
            float y[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float* b = &s.bias[begin + n2 * 16 + half * 8 + pair_of_lane];
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const Pair x = unpack(v[half * 2 + j]);
                y[half][j * 2] = x.x + b[0], y[half][j * 2 + 1] = x.y + b[1];
              }
#pragma unroll
              for (int k = 0; k < K::R / 16; ++k)
                multiply(y[half], h[k], w[k][n2 * 2 + half][0], w[k][n2 * 2 + half][1]);
#pragma unroll
              for (int j = 0; j < 2; ++j) v[half * 2 + j] = pack(y[half][j * 2], y[half][j * 2 + 1]);
            }
            store_matrices(rows + n2 * 32, v);
            if (norms())
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const Pair kept = unpack(v[i]);
                squares[i % 2] += kept.x * kept.x + kept.y * kept.y;
              }
          }
          if (norms()) keep_squares(squares, m * 16, slot);
        }
        fence_async();  // the tile leaves by bulk copies
        leave(buffer);
        if (norms()) {
          sync_threads(3, 128);
          if (warp == 4) send_squares(n);
          if (n) norm(tile.row - kRows, kRows, begin, n - 1);  // the tile before this one
        }
        if (lane == 0) arrive(&s.taken[slot]);
        ++n;
      } else {
        wait(&s.loaded[buffer], parity(i, K::kBuffers));  // y is x, as it came
        leave(buffer);
      }
    }
    if (norms() && n) {
      sync_threads(3, 128);
      norm(tile.row - tile.rows, tile.rows, begin, n - 1);
    }
  }

  AK_DEVICE void leave(int buffer) {
    sync_warp();
    if (lane == 0) arrive(&s.emitted[buffer]);
  }

  AK_DEVICE void load_up(uint32_t (&w)[K::R / 16][K::kEmitted / 8][2], int adapter, int begin) {
    const int64_t column = int64_t(adapter) * p.padded_d + first + begin + row_of_lane;
    const uint16_t* from = p.w + column * K::R + pair_of_lane;
    const int present = (columns - begin) / 8;
#pragma unroll
    for (int n = 0; n < K::kEmitted / 8; ++n)
#pragma unroll
      for (int k = 0; k < K::R / 16; ++k)
#pragma unroll
        for (int j = 0; j < 2; ++j) w[k][n][j] = n < present ? read_word(from + n * 8 * K::R + k * 16 + j * 8) : 0;
    for (int i = lane; i < K::kEmitted; i += 32)
      put(&s.bias[begin + i], begin + i < columns ? p.bias[int64_t(adapter) * p.padded_d + first + begin + i] : 0);
    sync_warp();  // before others of the warp read the bias
  }
};

// Each role finds its place anew: what all of them kept would not fit beside the weights.
template <class K>
AK_DEVICE void forward(const Forward& p) {
  Block<K>(p).start();
  const int warp = thread_index() / 32;
  if (warp < 4) {
    take_registers<208>();
    Block<K>(p).project();
  } else if (warp < 8) {
    take_registers<208>();
    Block<K>(p).emit();
  } else {
    give_registers<88>();
    if (warp == 8)
      Block<K>(p).load();
    else if (warp == 9)
      Block<K>(p).store();
    else
      Block<K>(p).reduce();
  }
  sync_warp();  // the cluster's barrier takes whole warps
  sync_cluster();  // no block ends while another may still write into its shared memory
}

}  // namespace adapterkern::cluster
