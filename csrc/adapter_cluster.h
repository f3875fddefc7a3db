// The adapter's forward in bf16 by clusters of thread blocks: what it takes, and its launch. The kernel is in
// adapter_cluster_kernel.h.
#pragma once
#include <cstdint>

namespace adapterkern::cluster {

enum class Activation : int { kIdentity, kSilu, kGelu, kRelu, kTanh };

// Pointers as in adapterkern/ops/kernels/weights.py; `a` to `bias` are the prepared weights of n adapters.
struct Forward {
  const uint16_t* x;     // (rows, d), `stride` elements apart
  const int64_t* index;  // the adapter of each sequence of `sequence` rows, −1 for none; or null: the first of all rows
  const uint16_t* a;     // (n, R, padded_d)
  const float* c;        // (n, R)
  const uint16_t* w;     // (n, padded_d, R)
  const float* bias;     // (n, padded_d)
  uint16_t* y;           // (rows, d)
  uint16_t* z;           // (rows, r), or null with the next two
  float* mean;           // (rows,)
  float* rstd;
  int64_t stride;
  unsigned rows, sequence;
  int d, padded_d, r;
  int columns;  // of a block: a multiple of 16
  float eps;
  Activation activation;
};

// The columns of one block that the kernel for adapters of padded dimension R has room for; 0 if there is none.
int most_columns(int R);

// How many clusters of `blocks` blocks `device` runs at once; `error` says why if that is none.
int most_clusters(int R, int blocks, int device, const char** error);

// One launch on `clusters` clusters. Returns what went wrong, or null.
const char* forward(const Forward& p, int R, int blocks, int clusters, int device, void* stream);

}  // namespace adapterkern::cluster
