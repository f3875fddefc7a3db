// What the blocks of a cluster agree on: the sizes of a kernel for one adapter dimension, what lies where in shared memory,
// and which rows come when.
#pragma once
#include "adapter_cluster.h"
#include "cluster_ops.h"

namespace adapterkern::cluster {

constexpr int kRows = 32;     // of a tile
constexpr int kAhead = 2;     // rounds of the exchange under way; of fewer, `moments` would need a barrier more
constexpr int kMaxBlocks = 16;
constexpr int kThreads = 384;

// R: the padded adapter dimension. kColumns: the most columns of a block.
template <int R_, int kColumns_, int kBuffers_>
struct Config {
  static constexpr int R = R_, kColumns = kColumns_, kBuffers = kBuffers_;
  static constexpr int kSplits = R == 16 ? 2 : 1;   // of the columns among the project warps
  static constexpr int kAcross = 4 / kSplits;       // project warps across R
  static constexpr int kOwn = R / kAcross;          // adapter dimensions of a project warp
  static constexpr int kTogether = R > 64 ? 1 : 2;  // halves of a tile in one pass over the columns
  static constexpr int kLoaded = R > 64 ? 1 : 2;    // steps of x in registers; at 128 there is no room for two
  static constexpr int kSums = R * kSplits;         // partial products per row
  static constexpr int kSteps = kColumns / kSplits / 16;
  static constexpr int kEmitted = kColumns / 4;     // columns of an emit warp
  // Pitches: rows of 16-byte units, an odd number of them where matrices are loaded, so that banks do not collide.
  static constexpr int kXPitch = kColumns + 8, kHPitch = R + 8, kSumPitch = kSums + 8;

  struct Shared {
    uint16_t x[kBuffers][kRows * kXPitch];
    uint16_t h[kAhead][kRows * kHPitch];
    float sent[kAhead][kRows * kSumPitch];      // partial products; then mean, squared deviations and s of the columns
    float received[kAhead][kRows * kSumPitch];  // the same of this block's rows, from each block
    Pair moments[kAhead][2][kRows];             // Σx and Σx², of half of the columns each
    float bias[kColumns];
    float own_row_sums[2][kSums];               // of A's columns, one for each of two adapters
    float row_sums[2][kMaxBlocks * kSums];
    Barrier loaded[kBuffers], emitted[kBuffers], stored[kBuffers];
    Barrier summed[kAhead], hidden[kAhead], taken[kAhead], weighed[2];
  };
};

// The tiles of one cluster, in order: an equal share of the rows, cut where a sequence ends.
struct Tiles {
  const Forward& p;
  unsigned row, end;
  int rows, adapter;

  AK_DEVICE explicit Tiles(const Forward& p) : p(p), rows(0), adapter(0) {
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

}  // namespace adapterkern::cluster
