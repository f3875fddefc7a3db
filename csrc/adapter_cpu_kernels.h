// The adapter's kernels, compiled once per instruction set: see adapter_cpu.h. Each translation unit defines AK_ISA (a
// namespace), AK_WIDTH (floats per vector) and AK_PAIRS: 0 for products of floats, 1 for pairs of bf16 by AVX512-BF16,
// 2 for pairs of bf16 by AMX.
#include "adapter_cpu_preparation.h"
#include "adapter_cpu_products.h"
#include "adapter_cpu_vectors.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

class Arena {  // memory of a thread, cut into arrays on cache lines
 public:
  explicit Arena(char* base) : base_(reinterpret_cast<uintptr_t>(base)) {}  // null: only counts
  template <class T>
  T* take(int64_t n) {
    const uintptr_t at = base_ + used_;
    used_ += size_t(padded(n * int64_t(sizeof(T)), 64)) + 64;  // not a power of two apart
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
};

// A row of sums, C, and the numbers of columns between its rows: not a power of two, so that rows lie in several sets
constexpr int64_t kPanelColumns = 128, kForwardStride = kPanelColumns + 16, kBackwardStride = kSlice + 16;
constexpr int64_t kDepth = 128;  // units of a row that are packed at a time

template <class E, class Z>
struct Of {
  static constexpr int64_t kSize = int64_t(sizeof(E));
  static int64_t rank(const Weights& w) { return padded(w.r, kRank); }
  static int64_t rank_units(const Weights& w) { return rank(w) / U; }
  static int64_t width(const Weights& w) { return padded(w.d, kColumns); }

  struct Scratch {
    uint32_t* row_units;  // kRows × kDepth
    float* sums;          // kRows × rp
    uint32_t* h;          // kRows × r units
    float* out;           // kRows × kBackwardStride
    float* dz;            // kRows × rp, then h, of a block
    float* hs;
    uint32_t *x_units, *dy_units;  // row units of a chunk × kSlice
    float *G, *U_, *up_bias;       // rp × columns, twice; columns
  };
  static size_t lay(Scratch& s, char* base, const Weights& w, int64_t columns) {
    Arena arena(base);
    s.row_units = arena.take<uint32_t>(kRows * kDepth);
    s.sums = arena.take<float>(kRows * rank(w));
    s.h = arena.take<uint32_t>(kRows * rank(w));
    s.out = arena.take<float>(kRows * kBackwardStride);
    if (columns < 0) return arena.used();
    s.dz = arena.take<float>(kRows * rank(w));
    s.hs = arena.take<float>(kRows * rank(w));
    s.x_units = arena.take<uint32_t>(kChunk / U * kSlice);
    s.dy_units = arena.take<uint32_t>(kChunk / U * kSlice);
    s.G = arena.take<float>(rank(w) * columns);
    s.U_ = arena.take<float>(rank(w) * columns);
    s.up_bias = arena.take<float>(columns);
    return arena.used();
  }
  static size_t forward_scratch(const Weights& w) {
    Scratch s;
    return lay(s, nullptr, w, -1);
  }
  static size_t backward_scratch(const Weights& w, int64_t columns) {
    Scratch s;
    return lay(s, nullptr, w, columns);
  }

  // sums[kRows][rp] = (x − mean)·B, summed over d; rows from `rows` on are 0
  static void from_rows(const E* x, int64_t stride, int64_t rows, const float* mean, const Weights& w, const uint32_t* B,
                        const Scratch& s, Ahead ahead) {
    const int64_t rp = rank(w), units = width(w) / U;
    for (int64_t k = 0; k < units; k += kDepth) {
      const int64_t depth = units - k < kDepth ? units - k : kDepth;
      for (int64_t i = 0; i < kRows; ++i) {
        uint32_t* to = s.row_units + i * kDepth;
        if (i >= rows) {
          memset(to, 0, size_t(depth) * 4);
          continue;
        }
        const E* from = x + i * stride + k * U;
        const vf mu = splat(mean ? mean[i] : 0.0f);
        const int64_t left = w.d - k * U, whole = left < depth * U ? left / (2 * W) * (2 * W) : depth * U;
        int64_t n = 0;
        for (; n < whole; n += 2 * W) pack(to + n / U, load(from + n) - mu, load(from + n + W) - mu);
        for (; n < depth * U; n += 2 * W) {
          float lanes[2 * W];
          for (int64_t j = 0; j < 2 * W; ++j) lanes[j] = n + j < left ? to_float(from[n + j]) - mu[0] : 0.0f;
          pack(to + n / U, load(lanes), load(lanes + W));
        }
      }
      for (int64_t j = 0; j < rp; j += kColumns)
        product(kRows, depth, s.row_units, kDepth, B + j * units + k * kColumns, s.sums + j, rp, k > 0,
                ahead);
    }
  }

  static int64_t rows_from(int64_t t, int64_t end) { return end - t < kRows ? end - t : kRows; }

  // The rows of a block, if there is such a block, for from_rows() to fetch
  static Ahead block_ahead(const void* x, int64_t stride, int64_t block, int64_t end, const Weights& w) {
    const int64_t t = block * kRows;
    if (t >= end) return {};
    return Ahead(static_cast<const E*>(x) + t * stride, rows_from(t, end), w.d * kSize, stride * kSize,
                 rank(w) / kColumns * fetches(kRows, width(w) / U));
  }

  static void forward(const Forward& f, int64_t block, int64_t following, char* base) {
    const Weights& w = f.w;
    const int64_t d = w.d, r = w.r, rp = rank(w), ru = rank_units(w), wide = width(w);
    const int64_t t = block * kRows, rows = rows_from(t, f.rows);
    const E* x = static_cast<const E*>(f.x) + t * f.x_stride;
    const E* residual = static_cast<const E*>(f.residual) + t * f.residual_stride;
    E* y = static_cast<E*>(f.y) + t * d;
    Scratch s;
    lay(s, base, w, -1);
    float mean[kRows], rstd[kRows];
    const bool norm = w.norm_weight != nullptr;
    for (int64_t i = 0; i < rows; ++i)
      if (norm)
        statistics(x + i * f.x_stride, d, f.eps, mean[i], rstd[i]);
      else
        rstd[i] = 1;
    from_rows(x, f.x_stride, rows, norm ? mean : nullptr, w, w.down_k, s, block_ahead(f.x, f.x_stride, following, f.rows, w));
    memset(s.h, 0, size_t(kRows * ru) * 4);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < rp; j += 2 * W) {
        vf h[2], slope;
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          Z kept[W];
          store(kept, load(s.sums + i * rp + j + q * W) * rstd[i] + load(w.c + j + q * W));
          if (f.z) store_upto(static_cast<Z*>(f.z) + (t + i) * r + j + q * W, load(kept), r - j - q * W);
          activate(f.activation, load(kept), h[q], slope);
        }
        pack(s.h + i * ru + j / U, h[0], h[1]);
      }
      if (f.mean) f.mean[t + i] = mean[i], f.rstd[t + i] = rstd[i];
    }
    for (int64_t n0 = 0; n0 < wide; n0 += kPanelColumns) {
      const int64_t n1 = wide - n0 < kPanelColumns ? wide - n0 : kPanelColumns;
      Ahead ahead(y + n0, rows, n1 * kSize, d * kSize, n1 / kColumns * fetches(kRows, ru));
      for (int64_t n = 0; n < n1; n += kColumns)
        product(kRows, ru, s.h, ru, w.up_n + (n0 + n) * ru, s.out + n, kForwardStride, false, ahead);
      const int64_t last = d - n0 < n1 ? d - n0 : n1;
      for (int64_t i = 0; i < rows; ++i) {
        const E* from = residual + i * f.residual_stride + n0;
        E* to = y + i * d + n0;
        const float* branch = s.out + i * kForwardStride;
        int64_t n = 0;
        for (; n + W <= last; n += W) store(to + n, load(from + n) + (load(branch + n) + load(w.up_bias + n0 + n)));
        if (n < last) {
          const int64_t left = last - n;
          const vf bias = load_part(w.up_bias + n0 + n, left);
          store_upto(to + n, load_part(from + n, left) + (load(branch + n) + bias), left);
        }
      }
    }
  }

  static void backward_rows(const Backward& b, int64_t block, int64_t following, char* base) {
    const Weights& w = b.w;
    const int64_t r = w.r, rp = rank(w), ru = rank_units(w), t = block * kRows, rows = rows_from(t, b.rows);
    Scratch s;
    lay(s, base, w, 0);
    from_rows(static_cast<const E*>(b.dy) + t * b.dy_stride, b.dy_stride, rows, nullptr, w, w.up_k, s,
              block_ahead(b.dy, b.dy_stride, following, b.rows, w));
    float* sums = b.sums + block * rp;
    memset(sums, 0, size_t(rp) * 4);
    for (int64_t i = 0; i < kRows; ++i) {
      uint32_t* dz_row = b.dz_rows + (t + i) * ru;
      if (i >= rows) {
        memset(dz_row, 0, size_t(ru) * 4);
        memset(s.dz + i * rp, 0, size_t(rp) * 4);
        memset(s.hs + i * rp, 0, size_t(rp) * 4);
        b.kappa[t + i] = 0;
        continue;
      }
      const float rho = b.rstd[t + i];
      vf c2 = {};
      for (int64_t j = 0; j < rp; j += W) {
        const vf z = load_upto(static_cast<const Z*>(b.z) + (t + i) * r + j, r - j);
        vf h, slope;
        activate(b.activation, z, h, slope);
        const vf dz = load(s.sums + i * rp + j) * slope;
        c2 += dz * (z - load(w.c + j));
        store(sums + j, load(sums + j) + dz);
        store(s.dz + i * rp + j, dz * rho);
        store(s.hs + i * rp + j, h);
      }
      for (int64_t j = r; j < rp; ++j) s.hs[i * rp + j] = 0;
      for (int64_t j = 0; j < rp; j += 2 * W)
        pack(dz_row + j / U, load(s.dz + i * rp + j), load(s.dz + i * rp + j + W));
      b.kappa[t + i] = w.norm_weight ? rho * rho * sum(c2) / float(w.d) : 0;
    }
    const int64_t to = t / kChunk * rp * (kChunk / U) + t % kChunk / U;
    transpose_block(s.dz, rp, b.dz_cols + to);
    transpose_block(s.hs, rp, b.h_cols + to);
  }

  // The numbers [kRows][rp] of a block as units along the rows: [rp][row units of a chunk]
  static void transpose_block(const float* from, int64_t rp, uint32_t* to) {
    for (int64_t i = 0; i < kRows; i += W * U)
      for (int64_t j = 0; j < rp; j += W) {
        vf rows[W];
#pragma GCC unroll 16
        for (int64_t q = 0; q < W; ++q) {
#if AK_PAIRS
          const float* pair = from + (i + 2 * q) * rp + j;
          rows[q] = pair_of(load(pair), load(pair + rp));
#else
          rows[q] = load(from + (i + q) * rp + j);
#endif
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int q = 0; q < W; ++q) store(reinterpret_cast<float*>(to + (j + q) * (kChunk / U) + i / U), rows[q]);
      }
  }

  static void backward_cols(const Backward& b, int64_t begin, int64_t end, char* base) {
    const Weights& w = b.w;
    const int64_t d = w.d, rp = rank(w), ru = rank_units(w), columns = end - begin, row_units = kChunk / U;
    const bool down = b.d_down_weight != nullptr, up = b.d_up_weight != nullptr;
    Scratch s;
    lay(s, base, w, columns);
    memset(s.up_bias, 0, size_t(columns) * 4);
    if (b.rows == 0) {  // otherwise the first chunk sets them
      memset(s.G, 0, size_t(rp * columns) * 4);
      memset(s.U_, 0, size_t(rp * columns) * 4);
    }
    for (int64_t t0 = 0; t0 < b.rows; t0 += kChunk) {
      const int64_t chunk = t0 / kChunk, t1 = b.rows - t0 < kChunk ? b.rows : t0 + kChunk;
      for (int64_t c0 = begin; c0 < end; c0 += kSlice) {
        const int64_t slice = end - c0 < kSlice ? end - c0 : kSlice;
        for (int64_t t = t0; t < t1; t += kRows) {
          const int64_t rows = rows_from(t, t1);
          if (b.dx) {
            Ahead dx_ahead(static_cast<E*>(b.dx) + t * d + c0, rows, slice * kSize, d * kSize,
                           slice / kColumns * fetches(kRows, ru));
            for (int64_t n = 0; n < slice; n += kColumns)
              product(kRows, ru, b.dz_rows + t * ru, ru, w.down_n + (c0 + n) * ru, s.out + n, kBackwardStride, false,
                      dx_ahead);
          }
          const bool whole = rows == kRows && c0 + slice <= d;
          const auto run = b.residual ? (whole ? rows_of_slice<true, true> : rows_of_slice<false, true>)
                                      : (whole ? rows_of_slice<true, false> : rows_of_slice<false, false>);
          run(b, t, rows, (t - t0) / U, c0, slice, s, c0 - begin);
        }
        const int64_t depth = padded(t1 - t0, kRows) / U, fetched = slice / kColumns * fetches(rp, depth);
        // The next slice, of these rows or of the next chunk's
        const bool more = c0 + kSlice < end;
        const int64_t c1 = more ? c0 + kSlice : begin, t2 = more ? t0 : t1;
        const int64_t rows = b.rows - t2 < kChunk ? b.rows - t2 : kChunk;
        const int64_t bytes = (end - c1 < kSlice ? end - c1 : kSlice) * kSize;
        Ahead x_ahead(static_cast<const E*>(b.x) + t2 * b.x_stride + c1, rows, bytes, b.x_stride * kSize, fetched);
        Ahead dy_ahead(static_cast<const E*>(b.dy) + t2 * b.dy_stride + c1, rows, bytes, b.dy_stride * kSize, fetched);
        for (int64_t n = 0; n < slice; n += kColumns) {
          const int64_t panel = (c0 - begin + n) * rp;
          if (down)
            product(rp, depth, b.dz_cols + chunk * rp * row_units, row_units, s.x_units + n * row_units, s.G + panel,
                    kColumns, t0 > 0, x_ahead);
          if (up)
            product(rp, depth, b.h_cols + chunk * rp * row_units, row_units, s.dy_units + n * row_units, s.U_ + panel,
                    kColumns, t0 > 0, dy_ahead);
        }
      }
    }
    if (down) parameters_down(b, begin, end < d ? end : d, s, rp);
    for (int64_t n = begin; n < end && n < d; ++n) {
      if (b.d_up_bias) b.d_up_bias[n] = s.up_bias[n - begin];
      if (up)
        for (int64_t j = 0; j < w.r; ++j) b.d_up_weight[n * w.r + j] = s.U_[at(n - begin, rp) + j * kColumns];
    }
  }

  // Where column n of G and U begins, in panels [columns / 32][rp][32]
  static int64_t at(int64_t n, int64_t rp) { return n / kColumns * kColumns * rp + n % kColumns; }

  // dx of a block of rows in a slice, and x − μ and dy as units along the rows. kWhole: all rows and columns are there.
  template <bool kWhole, bool kResidual>
  static void rows_of_slice(const Backward& b, int64_t t, int64_t rows, int64_t unit, int64_t c0, int64_t slice,
                            const Scratch& s, int64_t column) {
    const int64_t d = b.w.d, x_stride = b.x_stride, dy_stride = b.dy_stride;
    const E* x = static_cast<const E*>(b.x) + t * x_stride + c0;
    const E* dy = static_cast<const E*>(b.dy) + t * dy_stride + c0;
    E* const dx = b.dx ? static_cast<E*>(b.dx) + t * d + c0 : nullptr;
    const float *mean = b.mean + t, *kappa = b.kappa + t, *out = s.out;
    float bias[kSlice] = {};  // a sum of sums, each over a block
    uint32_t *const x_units = s.x_units + unit * kColumns, *const dy_units = s.dy_units + unit * kColumns;
    for (int64_t i = 0; i < kRows; i += U) {
      for (int64_t n = 0; n < slice; n += W) {
        const int64_t left = kWhole ? W : d - c0 - n;
        vf xs[2] = {}, dys[2] = {}, total = load(bias + n);
#pragma GCC unroll 2
        for (int64_t q = 0; q < U; ++q) {
          if (!kWhole && (i + q >= rows || left <= 0)) continue;
          xs[q] = (kWhole ? load(x + (i + q) * x_stride + n) : load_upto(x + (i + q) * x_stride + n, left)) -
                  splat(mean[i + q]);
          dys[q] = kWhole ? load(dy + (i + q) * dy_stride + n) : load_upto(dy + (i + q) * dy_stride + n, left);
          total += dys[q];
          if (!dx) continue;
          const vf branch = load(out + (i + q) * kBackwardStride + n) - splat(kappa[i + q]) * xs[q];
          const vf grad = kResidual ? branch : dys[q] + branch;
          if (kWhole)
            store(dx + (i + q) * d + n, grad);
          else
            store_upto(dx + (i + q) * d + n, grad, left);
        }
        store(bias + n, total);
        const int64_t to = n / kColumns * kColumns * (kChunk / U) + n % kColumns + i / U * kColumns;
#if AK_PAIRS
        pack_pair(x_units + to, xs[0], xs[1]);
        pack_pair(dy_units + to, dys[0], dys[1]);
#else
        store(reinterpret_cast<float*>(x_units) + to, xs[0]);
        store(reinterpret_cast<float*>(dy_units) + to, dys[0]);
#endif
      }
    }
    for (int64_t n = 0; n < slice; n += W) store(s.up_bias + column + n, load(s.up_bias + column + n) + load(bias + n));
  }

  static void parameters_down(const Backward& b, int64_t begin, int64_t end, const Scratch& s, int64_t rp) {
    const Weights& w = b.w;
    for (int64_t n0 = begin; n0 < end; n0 += kColumns) {
      const int64_t many = end - n0 < kColumns ? end - n0 : kColumns;
      const float* G = s.G + (n0 - begin) * rp;
      if (!w.norm_weight) {
        for (int64_t j = 0; j < w.r; ++j)
          memcpy(b.d_down_weight + j * w.d + n0, G + j * kColumns, size_t(many) * sizeof(float));
        continue;
      }
      const float *gamma = w.norm_weight + n0, *beta = w.norm_bias + n0;
      float d_gamma[kColumns] = {}, d_beta[kColumns] = {};
      for (int64_t j = 0; j < w.r; ++j, G += kColumns) {
        const float *down = w.down_weight + j * w.d + n0, sj = b.s[j];
        float* to = b.d_down_weight + j * w.d + n0;
        for (int64_t n = 0; n < many; ++n) {
          d_gamma[n] += G[n] * down[n];
          d_beta[n] += sj * down[n];
          to[n] = G[n] * gamma[n] + sj * beta[n];
        }
      }
      memcpy(b.d_norm_weight + n0, d_gamma, size_t(many) * sizeof(float));
      memcpy(b.d_norm_bias + n0, d_beta, size_t(many) * sizeof(float));
    }
  }
};

void enter() {
#if AK_PAIRS == 2
  configure_tiles();
#endif
}
void leave() {
#if AK_PAIRS == 2
  release_tiles();
#endif
}

template <class E, class Z>
constexpr Kernels kOf = {kPairs,          Of<E, Z>::forward_scratch, Of<E, Z>::backward_scratch,
                         prepare_rows,    prepare_columns,           enter,
                         leave,           Of<E, Z>::forward,         Of<E, Z>::backward_rows,
                         Of<E, Z>::backward_cols};

}  // namespace

const Kernels* kernels(Dtype stream, Dtype z) {
#if AK_PAIRS
  if (z != Dtype::kBfloat16) return nullptr;
#else
  if (z == Dtype::kFloat32) switch (stream) {
      case Dtype::kFloat32: return &kOf<float, float>;
      case Dtype::kBfloat16: return &kOf<bf16, float>;
      case Dtype::kFloat16: return &kOf<fp16, float>;
    }
#endif
  switch (stream) {
    case Dtype::kFloat32: return &kOf<float, bf16>;
    case Dtype::kBfloat16: return &kOf<bf16, bf16>;
    case Dtype::kFloat16: return &kOf<fp16, bf16>;
  }
  return nullptr;
}

}  // namespace adapterkern::cpu::AK_ISA
