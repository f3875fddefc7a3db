// The adapter's forward and backward in bf16 by clusters of thread blocks: what they take, and their launches. The kernels
// are in adapter_cluster_forward.h and adapter_cluster_backward.h.
#pragma once
#include <cstdint>

namespace adapterkern::cluster {

enum class Activation : int { kIdentity, kSilu, kGelu, kRelu, kTanh };

// The rows that a launch is given.
struct Rows {
  const int64_t* index;  // the adapter of each sequence of `sequence` rows, −1 for none; or null: the first of all rows
  unsigned rows, sequence;
  int d, padded_d, r;
  int columns;  // of a block: a multiple of 16
  Activation activation;
};

// The RMSNorm that reads y: n = weight·ρ·y, ρ = 1/√(mean(y²) + eps).
struct Norm {
  const float* weight;  // (d,)
  uint16_t* n;          // (rows, d), or null: there is none
  float* rstd;          // (rows,), ρ, or null
  float eps;
};

// Pointers as in adapterkern/ops/kernels/weights.py; `a` to `bias` are the prepared weights of n adapters.
struct Forward : Rows {
  const uint16_t* x;  // (rows, d), `stride` elements apart
  const uint16_t* a;     // (n, R, padded_d)
  const float* c;        // (n, R)
  const uint16_t* w;     // (n, padded_d, R)
  const float* bias;     // (n, padded_d)
  uint16_t* y;           // (rows, d)
  uint16_t* z;           // (rows, r), or null with the next two
  float* mean;           // (rows,)
  float* rstd;
  int64_t stride;
  float eps;
  Norm next;  // without an index
};

// Of one adapter for all rows. What is null is not stored; the sums are over the rows of a cluster.
struct Backward : Rows {
  const uint16_t* dy;  // (rows, d)
  const uint16_t* x;   // (rows, d), `stride` elements apart
  const uint16_t* z;   // (rows, r), of the forward, with the next two
  const float* mean;   // (rows,)
  const float* rstd;
  const uint16_t* a;     // (R, padded_d)
  const float* row_sums; // (R,), of a
  const float* c;        // (R,)
  const uint16_t* w;     // (padded_d, R)
  uint16_t* dx;  // (rows, d)
  float* g;      // (clusters, R, padded_d): Σ ζᵀ(x − s)
  float* u;      // (clusters, R, padded_d): Σ hᵀ·dy
  float* dz;     // (clusters, R): Σ dz
  float* q;      // (clusters, R): Σ (μ − s)·ζ, which g has too much
  float* dbias;  // (clusters, padded_d): Σ dy
  int64_t stride;
};

// Which of the two kernels.
enum class Pass : int { kForward, kBackward };

// The columns of one block that the kernel for adapters of padded dimension R has room for; 0 if there is none.
int most_columns(Pass pass, int R);

// How many clusters of `blocks` blocks `device` runs at once; `error` says why if that is none.
int most_clusters(Pass pass, int R, int blocks, int device, const char** error);

// A launch of the kernel for adapters of padded dimension R: how many clusters of how many blocks, where, and when.
struct Grid {
  int R, blocks, clusters, device;
  void* stream;
  bool early;  // may start up while the kernel before it runs
};

// One launch. Returns what went wrong, or null.
const char* forward(const Forward& p, const Grid& grid);
const char* backward(const Backward& p, const Grid& grid);

}  // namespace adapterkern::cluster
