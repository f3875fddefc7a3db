// What the blocks of a cluster agree on, forward and backward: the sizes of a kernel for one adapter dimension, which
// columns a block has, and which rows come when.
#pragma once
#include "adapter_cluster.h"
#include "cluster_ops.h"

namespace adapterkern::cluster {

constexpr int kRows = 32;     // of a tile
constexpr int kAhead = 2;     // rounds of the exchange under way; of fewer, `moments` would need a barrier more
constexpr int kMaxBlocks = 16;

// How the product of a tile by a (columns, R) matrix is shared by four warps, which hold their parts of the matrix.
template <int R_, int kColumns_>
struct Products {
  static constexpr int R = R_, kColumns = kColumns_;
  static constexpr int kSplits = R == 16 ? 2 : 1;  // of the columns
  static constexpr int kAcross = 4 / kSplits;      // warps across R
  static constexpr int kOwn = R / kAcross;         // adapter dimensions of a warp
  static constexpr int kSums = R * kSplits;        // partial products per row
  static constexpr int kSteps = kColumns / kSplits / 16;
  // Pitches: rows of 16-byte units, an odd number of them where matrices are loaded, so that banks do not collide.
  static constexpr int kXPitch = kColumns + 8, kHPitch = R + 8, kSumPitch = kSums + 8;
};

// A thread's place in its warp, block and cluster.
struct Place {
  int warp, lane, row_of_lane, pair_of_lane;  // the last two: of a fragment
  int rank, blocks, first, columns;           // columns from the first on

  AK_DEVICE explicit Place(const Rows& p)
      : warp(thread_index() / 32),
        lane(thread_index() % 32),
        row_of_lane(lane / 4),
        pair_of_lane(lane % 4 * 2),
        rank(cluster_rank()),
        blocks(cluster_size()),
        first(rank * p.columns),
        columns(min(p.columns, p.d - first)) {}

  // What a lane loads of a 16×16 matrix in shared memory for load_matrices(): in the order of its columns of 8, for a left
  // factor by rows, or a right factor by load_transposed(); or in that of its rows of 8, for the two the other way round.
  AK_DEVICE Address matrix(const uint16_t* from, int pitch) const {
    return address(from + lane % 16 * pitch + lane / 16 * 8);
  }
  AK_DEVICE Address matrix_by_rows(const uint16_t* from, int pitch) const {
    return address(from + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  }

  AK_DEVICE int owned() const { return kRows / blocks; }  // rows of a tile that the block finishes
};

// A block's share of the products, by one of the four warps that make them.
template <class K>
struct Projecting : Place {
  using Fragments = uint32_t[K::kSteps][K::kOwn / 8][2];

  using Place::Place;

  AK_DEVICE int across() const { return warp % K::kAcross; }
  AK_DEVICE int split() const { return warp / K::kAcross; }
  AK_DEVICE uint32_t sum_bytes() const { return uint32_t(kRows * K::kSumPitch * sizeof(float)); }

  // The warp's sums of 16 rows from `row` on, to their place among those of the tile.
  AK_DEVICE void put_products(float* sent, int row, const float (&products)[K::kOwn / 8][4]) const {
#pragma unroll
    for (int n = 0; n < K::kOwn / 8; ++n) {
      float* to = sent + (row + row_of_lane) * K::kSumPitch + split() * K::R + across() * K::kOwn + n * 8 + pair_of_lane;
      const float* v = products[n];
      put(reinterpret_cast<Pair*>(to), Pair{v[0], v[1]});
      put(reinterpret_cast<Pair*>(to + 8 * K::kSumPitch), Pair{v[2], v[3]});
    }
  }

  // By a lane of one warp, if it is the number of a block: that block's rows of the tile's sums.
  AK_DEVICE void send_products(float* received, const float* sent, Barrier* summed) const {
    const int rows = owned();
    copy_to_block(received + rank * rows * K::kSumPitch, sent + lane * rows * K::kSumPitch,
                  uint32_t(rows * K::kSumPitch) * 4, summed, lane);
  }
};

// The tiles of one cluster, in order: an equal share of the rows, cut where a sequence ends.
struct Tiles {
  const Rows& p;
  unsigned row, end;
  int rows, adapter;

  AK_DEVICE explicit Tiles(const Rows& p) : p(p), rows(0), adapter(0) {
    const unsigned share = p.rows / cluster_count(), more = p.rows % cluster_count();
    row = cluster_index() * share + min(cluster_index(), more);
    end = row + share + (cluster_index() < more);
  }

  // The next tile is `rows` rows from `row` on; false after the last.
  AK_DEVICE bool next() {
    row += rows;
    if (row >= end) return false;
    unsigned stop = end;
    if (p.index) {
      const unsigned sequence = row / p.sequence;
      stop = min(stop, (sequence + 1) * p.sequence);
      adapter = int(p.index[sequence]);
    }
    rows = int(min(stop - row, unsigned(kRows)));
    return true;
  }

  // How many there are, before the first next(); without an index.
  AK_DEVICE int count() const { return int((end - row + kRows - 1) / kRows); }

  AK_DEVICE int64_t at(int i) const { return int64_t(row) + i; }
};

// The parity of the phase that ends with the i-th use of a barrier, one of `depth` that are used in turn.
AK_DEVICE int parity(int i, int depth) { return i / depth & 1; }

AK_DEVICE float activate(Activation kind, float z) {
  switch (kind) {
    case Activation::kSilu: return z / (1 + expf(-z));
    case Activation::kGelu: return 0.5f * z * (1 + erff(z * 0.70710678f));
    case Activation::kRelu: return z < 0 ? 0 : z;
    case Activation::kTanh: return tanhf(z);
    default: return z;
  }
}

AK_DEVICE float derivative(Activation kind, float z) {
  switch (kind) {
    case Activation::kSilu: {
      const float s = 1 / (1 + expf(-z));
      return s * (1 + z * (1 - s));
    }
    case Activation::kGelu: return 0.5f * (1 + erff(z * 0.70710678f)) + z * expf(-0.5f * z * z) * 0.39894228f;
    case Activation::kRelu: return z > 0 ? 1 : 0;
    case Activation::kTanh: {
      const float t = tanhf(z);
      return 1 - t * t;
    }
    default: return 1;
  }
}

}  // namespace adapterkern::cluster
