// The adapter on a CPU: forward and backward over raw pointers, without torch. The equations and their letters are those
// of adapterkern/ops/reference.py.
//
// One algorithm (adapter_cpu_kernels.h) is compiled once per instruction set; adapter_cpu.cpp chooses one at run time,
// and shares the rows, or the columns, among threads.
//
//   prepare        A = W_down·diag(γ), its rows centered (which takes c1 out of dx), and W_up, both in the two layouts
//                  that the products read; c = W_down·β + b_down. Without LayerNorm A = W_down as it is, c = b_down, and
//                  below μ = 0, ρ = 1, κ = 0
//   forward        a block of rows: statistics; z = ρ(x − μ)·Aᵀ + c; h; y = x + g·(h·W_upᵀ + b_up), or the residual + …
//   backward_rows  a block of rows: dh = g·dy·W_up; dz; κ = ρ²·c2; dg; what the products over T read: ρ·dz and g·h
//   backward_cols  a range of columns: dx = dy + ρ·dz·A − κ(x − μ), without dy if there was a residual;
//                  G = (ρ·dz)ᵀ·(x − μ); U = (g·h)ᵀ·dy; the parameters
//
// A forward may have a sum before its adapter and an RMSNorm behind it (adapter_cpu_norm.h). Both are made of a block of
// rows while it is in the caches.
//
// A call has one adapter, or several, each with its rows. Rows are read and written where they lie: a block has rows of
// one adapter, `order` says which, and all blocks of all adapters are shared among the threads.
//
// While a product multiplies, it fetches what the next block, or the next slice, reads and this one writes
// (adapter_cpu_ahead.h): its multiplications are most of the time, and nothing else then waits for memory.
//
// Products have fp32 sums. Their operands are "units" of 4 bytes along the summed dimension: a float, or a pair of bf16.
// Numbers of rows are padded to kRows, of columns to kColumns, r to kRank, with zeros, in the packed operands alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adapterkern::cpu {

enum class Isa : int { kNone = -1, kAvx2 = 0, kAvx512 = 1, kAvx512Bf16 = 2, kAmx = 3 };
enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum class Activation : int { kSilu = 0, kGelu = 1, kRelu = 2, kTanh = 3, kIdentity = 4 };

constexpr int64_t kRows = 32;      // of a block
constexpr int64_t kColumns = 32;   // of a panel
constexpr int64_t kRank = 32;      // r is padded to a multiple of it
constexpr int64_t kChunk = 128;    // rows between two readings of a slice's G and U
constexpr int64_t kSlice = 256;    // columns of a slice

static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The six parameters, fp32 and contiguous, and what prepare() makes of them for products in one dtype.
struct Weights {
  int64_t d, r;
  const float *norm_weight, *norm_bias;  // both null: no LayerNorm
  const float *down_weight, *down_bias, *up_weight, *up_bias;
  uint32_t* down_k;  // A:    [rp / 32][d units][32], for z
  uint32_t* down_n;  // A:    [d / 32][r units][32], for dx
  uint32_t* up_k;    // W_up: [rp / 32][d units][32], for dh
  uint32_t* up_n;    // W_up: [d / 32][r units][32], for y
  float* c;          // (rp)
};

// Dropout on h, by Philox4x32-10 (adapter_cpu_philox.h): unit j of row t stays if its word is at least the threshold.
struct Drop {
  uint64_t seed;
  uint32_t threshold;   // rate·2³²; 0: no dropout
  float kept;           // what multiplies the units that stay, 1/(1 − rate)
  const int64_t* rows;  // (T), the number that each row has for its mask; null: its own
};

// The rows of a call's tensors. Those at positions [begin, end) of `order`, one adapter's, are rows order[begin], …
struct Rows {
  int64_t begin, end;
};

// What all adapters of a call share
struct Forward {
  int64_t x_stride, residual_stride;  // of rows, in elements; y is contiguous
  const void* x;           // (T, d)
  const void* residual;    // (T, d); x itself in a plain call
  void* y;                 // (T, d), may be x
  void* z;                 // (T, r), null unless it is kept
  float *mean, *rstd;      // (T), likewise
  const int64_t* order;    // (T), null: rows are where their positions say
  const float* gate;       // (T), null: 1
  Drop drop;
  float eps;
  Activation activation;
};

struct Backward {
  int64_t x_stride, dy_stride;
  const void *x, *dy, *z;
  const float *mean, *rstd;
  const int64_t* order;
  const float* gate;
  Drop drop;
  Activation activation;
  bool residual;  // there was one: dx lacks dy
  void* dx;       // (T, d) contiguous; null: not wanted
  float* d_gate;  // (T), likewise
};

// What a forward may have around its adapter: the sum s = x + added, which is Forward::x then, and n, the RMSNorm of y.
struct Around {
  int64_t x_stride, added_stride;
  const void *x, *added;  // (T, d); both null: no sum
  void* s;                // (T, d) contiguous
  const float* weight;    // (d), of the RMSNorm
  float eps;
  void* n;      // (T, d) contiguous
  float* rstd;  // (T), of the RMSNorm; null unless it is kept
};

// The backward of that RMSNorm
struct NormBackward {
  int64_t dn_stride, y_stride;
  const void *dn, *y;  // (T, d)
  const float *weight, *rstd;
  void* dy;  // (T, d) contiguous
};

// One adapter of a forward
struct Adapter {
  Weights w;
  Rows rows;
};

// One adapter of a backward
struct Gradients {
  Weights w;
  Rows rows;
  float *d_norm_weight, *d_norm_bias, *d_down_weight, *d_down_bias;    // all four or none; without LayerNorm two
  float *d_up_weight, *d_up_bias;                                      // each may be null
  // Memory between the two passes, of sizes(), for T rows, those of this adapter
  uint32_t* dz_rows;  // ρ·dz, [T padded][r units], for dx
  uint32_t* dz_cols;  // ρ·dz, [chunk][rp][row units of a chunk], for G
  uint32_t* h_cols;   // g·h, the same, for U
  float* kappa;       // (T padded)
  float* sums;        // Σ dz of each block, [blocks][rp]
  float* s;           // Σ dz, (rp)
};

struct Sizes {
  int64_t packed, rows, cols, blocks;  // units of one packed matrix; of dz_rows; of dz_cols and h_cols; blocks of rows
};

// What one instruction set offers for a dtype of the stream, a dtype of z, and products of floats or of pairs of bf16.
struct Kernels {
  bool pairs;  // whether units are pairs of bf16
  size_t (*forward_scratch)(const Weights&);
  size_t (*backward_scratch)(const Weights&, int64_t columns);
  void (*prepare_rows)(const Weights&, int64_t begin, int64_t end, float* means);
  void (*prepare_columns)(const Weights&, int64_t begin, int64_t end, const float* means);
  void (*enter)();
  void (*leave)();
  // A block of an adapter's rows, and the block that this thread is likely to take next
  void (*forward)(const Forward&, const Weights&, Rows block, Rows following, char* scratch);
  void (*backward_rows)(const Backward&, const Gradients&, Rows block, Rows following, char* scratch);
  // Columns, multiples of kColumns
  void (*backward_cols)(const Backward&, const Gradients&, int64_t begin, int64_t end, char* scratch);
  // A block of rows of d numbers
  void (*sum_rows)(const Around&, Rows block, int64_t d);
  void (*norm_rows)(const Around&, const void* y, Rows block, int64_t d);
  void (*norm_backward)(const NormBackward&, Rows block, int64_t d);
};

namespace avx2 { const Kernels* kernels(Dtype stream, Dtype z); }
namespace avx512 { const Kernels* kernels(Dtype stream, Dtype z); }
namespace avx512bf16 { const Kernels* kernels(Dtype stream, Dtype z); }
namespace amx { const Kernels* kernels(Dtype stream, Dtype z); }

// adapter_cpu.cpp

// The best instruction set of this machine.
Isa best_isa();
// Whether this build has it: an older compiler may not know it.
bool is_built(Isa isa);
// The kernels of an instruction set, or of the next lower one if it has none for these dtypes; null if there are none.
const Kernels* find_kernels(Isa isa, Dtype stream, Dtype compute);
Sizes sizes(const Kernels&, int64_t rows, int64_t d, int64_t r);
void prepare(const Kernels&, const Weights&, int threads);
// `around` may be null; with it rows are where their positions say.
void forward(const Kernels&, const Forward&, const std::vector<Adapter>&, const Around* around, int threads);
void backward(const Kernels&, const Backward&, const std::vector<Gradients>&, int threads);
void norm_backward(const Kernels&, const NormBackward&, int64_t rows, int64_t d, int threads);
// The numbers of all rows, those without an adapter first (index −1), then those of each of n adapters, each in order;
// index[i] is of `each` rows. Returns the n + 2 positions where those of each begin and end, or none if an index is
// not in [−1, n).
std::vector<int64_t> sort_rows(const int64_t* index, int64_t count, int64_t each, int64_t n, int64_t* order);
// Rows of `bytes` bytes from one tensor to another, or zeros if `from` is null
void copy_rows(const int64_t* order, int64_t rows, const char* from, int64_t stride, char* to, int64_t bytes, int threads);

}  // namespace adapterkern::cpu
