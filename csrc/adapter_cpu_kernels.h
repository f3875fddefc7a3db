// The adapter's kernels, compiled once per instruction set: see adapter_cpu.h. Each translation unit defines AK_ISA (a
// namespace), AK_WIDTH (floats per vector) and AK_PAIRS: 0 for products of floats, 1 for pairs of bf16 by AVX512-BF16,
// 2 for pairs of bf16 by AMX.
#include "adapter_cpu_norm.h"
#include "adapter_cpu_parameters.h"
#include "adapter_cpu_philox.h"
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

static int64_t upto(int64_t a, int64_t b) { return a < b ? a : b; }

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
    float* mask;          // rp, what multiplies a row of h
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
    s.mask = arena.take<float>(rank(w));
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

  // A block: the numbers of its rows in the call's tensors, and the gate of each
  struct Block {
    int64_t rows, number[kRows];
    float gate[kRows];
    Block(Rows at, const int64_t* order, const float* gates) : rows(at.end - at.begin) {
      for (int64_t i = 0; i < rows; ++i) {
        number[i] = order ? order[at.begin + i] : at.begin + i;
        gate[i] = gates ? gates[number[i]] : 1.0f;
      }
    }
    // How many rows products have; those beyond `rows` mean nothing
    int64_t multiplied() const { return padded(rows, kTileRows); }
  };

  // sums[rows][rp] = (x − mean)·B, summed over d; and, unless `dots` is null, dots[rows] = x·b_up
  static void from_rows(const E* x, int64_t stride, const Block& block, const float* mean, const Weights& w,
                        const uint32_t* B, const Scratch& s, Ahead ahead, float* dots = nullptr) {
    const int64_t rp = rank(w), units = width(w) / U, many = block.multiplied();
    for (int64_t k = 0; k < units; k += kDepth) {
      const int64_t depth = units - k < kDepth ? units - k : kDepth;
      for (int64_t i = 0; i < many; ++i) {
        uint32_t* to = s.row_units + i * kDepth;
        if (i >= block.rows) {
          memset(to, 0, size_t(depth) * 4);
          continue;
        }
        const E* from = x + block.number[i] * stride + k * U;
        const vf mu = splat(mean ? mean[i] : 0.0f);
        const int64_t left = w.d - k * U, whole = left < depth * U ? left / (2 * W) * (2 * W) : depth * U;
        int64_t n = 0;
        for (; n < whole; n += 2 * W) pack(to + n / U, load(from + n) - mu, load(from + n + W) - mu);
        for (; n < depth * U; n += 2 * W) {
          float lanes[2 * W];
          for (int64_t j = 0; j < 2 * W; ++j) lanes[j] = n + j < left ? to_float(from[n + j]) - mu[0] : 0.0f;
          pack(to + n / U, load(lanes), load(lanes + W));
        }
        if (dots) dots[i] += dot(from, w.up_bias + k * U, left < depth * U ? left : depth * U);
      }
      for (int64_t j = 0; j < rp; j += kColumns)
        block_product(many, depth, s.row_units, kDepth, B + j * units + k * kColumns, s.sums + j, rp, k > 0, ahead);
    }
  }

  static float dot(const E* a, const float* b, int64_t n) {
    vf total = {};
    for (int64_t i = 0; i < n; i += W) total += load_upto(a + i, n - i) * load_upto(b + i, n - i);
    return sum(total);
  }

  // The rows of a block, or none, for from_rows() to fetch while it reads a block of `many` rows
  static Ahead block_ahead(const void* x, int64_t stride, const int64_t* order, Rows following, int64_t many,
                           const Weights& w) {
    return Ahead(x, order, following, w.d * kSize, stride * kSize, rank(w) / kColumns * fetches(many, width(w) / U));
  }

  // What multiplies the units of a row of h before its gate: 1, or what dropout says
  static void mask_row(const Drop& drop, int64_t number, int64_t rp, float* mask) {
    if (drop.threshold) dropout(drop, drop.rows ? drop.rows[number] : number, rp, mask);
  }
  static void no_mask(int64_t rp, float* mask) {
    for (int64_t j = 0; j < rp; ++j) mask[j] = 1;
  }

  static void forward(const Forward& f, const Weights& w, Rows at, Rows following, char* base) {
    const int64_t d = w.d, r = w.r, rp = rank(w), ru = rank_units(w), wide = width(w);
    const Block block(at, f.order, f.gate);
    const int64_t rows = block.rows, many = block.multiplied();
    const E *x = static_cast<const E*>(f.x), *residual = static_cast<const E*>(f.residual);
    E* y = static_cast<E*>(f.y);
    Scratch s;
    lay(s, base, w, -1);
    no_mask(rp, s.mask);
    float mean[kRows], rstd[kRows];
    const bool norm = w.norm_weight != nullptr;
    for (int64_t i = 0; i < rows; ++i)
      if (norm)
        statistics(x + block.number[i] * f.x_stride, d, f.eps, mean[i], rstd[i]);
      else
        rstd[i] = 1;
    from_rows(x, f.x_stride, block, norm ? mean : nullptr, w, w.down_k, s,
              block_ahead(x, f.x_stride, f.order, following, many, w));
    memset(s.h, 0, size_t(kRows * ru) * 4);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = block.number[i];
      const vf gate = splat(block.gate[i]);
      mask_row(f.drop, t, rp, s.mask);
      for (int64_t j = 0; j < rp; j += 2 * W) {
        vf h[2], slope;
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          Z kept[W];
          store(kept, load(s.sums + i * rp + j + q * W) * rstd[i] + load(w.c + j + q * W));
          if (f.z) store_upto(static_cast<Z*>(f.z) + t * r + j + q * W, load(kept), r - j - q * W);
          activate(f.activation, load(kept), h[q], slope);
          h[q] = h[q] * load(s.mask + j + q * W) * gate;
        }
        pack(s.h + i * ru + j / U, h[0], h[1]);
      }
      if (f.mean) f.mean[t] = mean[i], f.rstd[t] = rstd[i];
    }
    for (int64_t n0 = 0; n0 < wide; n0 += kPanelColumns) {
      const int64_t n1 = wide - n0 < kPanelColumns ? wide - n0 : kPanelColumns;
      Ahead ahead(y + n0, f.order, at, n1 * kSize, d * kSize, n1 / kColumns * fetches(many, ru));
      for (int64_t n = 0; n < n1; n += kColumns)
        block_product(many, ru, s.h, ru, w.up_n + (n0 + n) * ru, s.out + n, kForwardStride, false, ahead);
      const int64_t last = d - n0 < n1 ? d - n0 : n1;
      for (int64_t i = 0; i < rows; ++i) {
        const E* from = residual + block.number[i] * f.residual_stride + n0;
        E* to = y + block.number[i] * d + n0;
        const float *branch = s.out + i * kForwardStride, *up_bias = w.up_bias + n0;
        const vf gate = splat(block.gate[i]);
        int64_t n = 0;
        for (; n + W <= last; n += W) store(to + n, load(from + n) + (load(branch + n) + gate * load(up_bias + n)));
        if (n < last) {
          const int64_t left = last - n;
          const vf bias = load_part(up_bias + n, left);
          store_upto(to + n, load_part(from + n, left) + (load(branch + n) + gate * bias), left);
        }
      }
    }
  }

  static void backward_rows(const Backward& b, const Gradients& g, Rows at, Rows following, char* base) {
    const Weights& w = g.w;
    const int64_t r = w.r, rp = rank(w), ru = rank_units(w), first = at.begin - g.rows.begin;
    const Block block(at, b.order, b.gate);
    Scratch s;
    lay(s, base, w, 0);
    no_mask(rp, s.mask);
    float d_gate[kRows] = {};
    from_rows(static_cast<const E*>(b.dy), b.dy_stride, block, nullptr, w, w.up_k, s,
              block_ahead(b.dy, b.dy_stride, b.order, following, block.multiplied(), w), b.d_gate ? d_gate : nullptr);
    float* sums = g.sums + first / kRows * rp;
    memset(sums, 0, size_t(rp) * 4);
    for (int64_t i = 0; i < kRows; ++i) {
      uint32_t* dz_row = g.dz_rows + (first + i) * ru;
      if (i >= block.rows) {
        memset(dz_row, 0, size_t(ru) * 4);
        memset(s.dz + i * rp, 0, size_t(rp) * 4);
        memset(s.hs + i * rp, 0, size_t(rp) * 4);
        g.kappa[first + i] = 0;
        continue;
      }
      const int64_t t = block.number[i];
      const float rho = b.rstd[t];
      const vf gate = splat(block.gate[i]);
      mask_row(b.drop, t, rp, s.mask);
      vf c2 = {}, d_gate_of_h = {};
      for (int64_t j = 0; j < rp; j += W) {
        const vf z = load_upto(static_cast<const Z*>(b.z) + t * r + j, r - j), mask = load(s.mask + j);
        vf h, slope;
        activate(b.activation, z, h, slope);
        const vf dh = load(s.sums + i * rp + j), dz = dh * gate * mask * slope;
        h *= mask;
        d_gate_of_h += dh * h;
        c2 += dz * (z - load(w.c + j));
        store(sums + j, load(sums + j) + dz);
        store(s.dz + i * rp + j, dz * rho);
        store(s.hs + i * rp + j, h * gate);
      }
      for (int64_t j = r; j < rp; ++j) s.hs[i * rp + j] = 0;
      for (int64_t j = 0; j < rp; j += 2 * W)
        pack(dz_row + j / U, load(s.dz + i * rp + j), load(s.dz + i * rp + j + W));
      g.kappa[first + i] = w.norm_weight ? rho * rho * sum(c2) / float(w.d) : 0;
      if (b.d_gate) b.d_gate[t] = sum(d_gate_of_h) + d_gate[i];
    }
    const int64_t to = first / kChunk * rp * (kChunk / U) + first % kChunk / U;
    transpose_block(s.dz, rp, g.dz_cols + to);
    transpose_block(s.hs, rp, g.h_cols + to);
  }

  static void backward_cols(const Backward& b, const Gradients& g, int64_t begin, int64_t end, char* base) {
    const Weights& w = g.w;
    const int64_t d = w.d, rp = rank(w), ru = rank_units(w), columns = end - begin, row_units = kChunk / U;
    const bool down = g.d_down_weight != nullptr, up = g.d_up_weight != nullptr;
    Scratch s;
    lay(s, base, w, columns);
    memset(s.up_bias, 0, size_t(columns) * 4);
    if (g.rows.begin == g.rows.end) {  // otherwise the first chunk sets them
      memset(s.G, 0, size_t(rp * columns) * 4);
      memset(s.U_, 0, size_t(rp * columns) * 4);
    }
    for (int64_t t0 = g.rows.begin; t0 < g.rows.end; t0 += kChunk) {
      const int64_t chunk = (t0 - g.rows.begin) / kChunk, t1 = upto(t0 + kChunk, g.rows.end);
      const bool add = chunk > 0;
      for (int64_t c0 = begin; c0 < end; c0 += kSlice) {
        const int64_t slice = upto(kSlice, end - c0);
        for (int64_t t = t0; t < t1; t += kRows) {
          const Rows at{t, upto(t + kRows, t1)};
          const Block block(at, b.order, b.gate);
          const int64_t first = t - g.rows.begin, many = block.multiplied();
          if (b.dx) {
            Ahead dx_ahead(static_cast<E*>(b.dx) + c0, b.order, at, slice * kSize, d * kSize,
                           slice / kColumns * fetches(many, ru));
            for (int64_t n = 0; n < slice; n += kColumns)
              block_product(many, ru, g.dz_rows + first * ru, ru, w.down_n + (c0 + n) * ru, s.out + n, kBackwardStride, false,
                      dx_ahead);
          }
          const bool whole = block.rows == kRows && c0 + slice <= d;
          const auto run = b.residual ? (whole ? rows_of_slice<true, true> : rows_of_slice<false, true>)
                                      : (whole ? rows_of_slice<true, false> : rows_of_slice<false, false>);
          run(b, g, block, first, (t - t0) / U, c0, slice, s, c0 - begin);
        }
        const int64_t depth = padded(t1 - t0, kRows) / U, fetched = slice / kColumns * fetches(rp, depth);
        // The next slice, of these rows or of the next chunk's
        const bool more = c0 + kSlice < end;
        const int64_t c1 = more ? c0 + kSlice : begin, t2 = more ? t0 : t1;
        const Rows next{t2, upto(t2 + kChunk, g.rows.end)};
        const int64_t bytes = upto(kSlice, end - c1) * kSize;
        Ahead x_ahead(static_cast<const E*>(b.x) + c1, b.order, next, bytes, b.x_stride * kSize, fetched);
        Ahead dy_ahead(static_cast<const E*>(b.dy) + c1, b.order, next, bytes, b.dy_stride * kSize, fetched);
        for (int64_t n = 0; n < slice; n += kColumns) {
          const int64_t panel = (c0 - begin + n) * rp;
          if (down)
            product(rp, depth, g.dz_cols + chunk * rp * row_units, row_units, s.x_units + n * row_units, s.G + panel,
                    kColumns, add, x_ahead);
          if (up)
            product(rp, depth, g.h_cols + chunk * rp * row_units, row_units, s.dy_units + n * row_units, s.U_ + panel,
                    kColumns, add, dy_ahead);
        }
      }
    }
    const int64_t last = upto(end, d);
    if (down) parameters_down(g, begin, last, s.G, rp);
    if (up) parameters_up(g, begin, last, s.U_, rp);
    if (g.d_up_bias && begin < last) memcpy(g.d_up_bias + begin, s.up_bias, size_t(last - begin) * sizeof(float));
  }

  // dx of a block of rows in a slice, and x − μ and dy as units along the rows. kWhole: all rows and columns are there.
  template <bool kWhole, bool kResidual>
  static void rows_of_slice(const Backward& b, const Gradients& g, const Block& block, int64_t first, int64_t unit,
                            int64_t c0, int64_t slice, const Scratch& s, int64_t column) {
    const int64_t d = g.w.d;
    const float *kappa = g.kappa + first, *out = s.out;
    float bias[kSlice] = {};  // a sum of sums, each over a block
    uint32_t *const x_units = s.x_units + unit * kColumns, *const dy_units = s.dy_units + unit * kColumns;
    for (int64_t i = 0; i < kRows; i += U) {
      const E *x[U] = {}, *dy[U] = {};
      E* dx[U] = {};
      vf mean[U] = {}, gate[U] = {};
      for (int64_t q = 0; q < U; ++q) {
        if (!kWhole && i + q >= block.rows) continue;
        const int64_t t = block.number[i + q];
        x[q] = static_cast<const E*>(b.x) + t * b.x_stride + c0;
        dy[q] = static_cast<const E*>(b.dy) + t * b.dy_stride + c0;
        dx[q] = b.dx ? static_cast<E*>(b.dx) + t * d + c0 : nullptr;
        mean[q] = splat(b.mean[t]), gate[q] = splat(block.gate[i + q]);
      }
      for (int64_t n = 0; n < slice; n += W) {
        const int64_t left = kWhole ? W : d - c0 - n;
        vf xs[2] = {}, dys[2] = {}, total = load(bias + n);
#pragma GCC unroll 2
        for (int64_t q = 0; q < U; ++q) {
          if (!kWhole && (i + q >= block.rows || left <= 0)) continue;
          xs[q] = (kWhole ? load(x[q] + n) : load_upto(x[q] + n, left)) - mean[q];
          dys[q] = kWhole ? load(dy[q] + n) : load_upto(dy[q] + n, left);
          total += gate[q] * dys[q];
          if (!dx[q]) continue;
          const vf branch = load(out + (i + q) * kBackwardStride + n) - splat(kappa[i + q]) * xs[q];
          const vf grad = kResidual ? branch : dys[q] + branch;
          if (kWhole)
            store(dx[q] + n, grad);
          else
            store_upto(dx[q] + n, grad, left);
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
                         Of<E, Z>::backward_cols, sum_rows<E>,             norm_rows<E>,
                         norm_backward<E>};

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
