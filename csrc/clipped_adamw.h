// Clipped AdamW: the arithmetic and the order of summation, one source for the CUDA kernels and their CPU twin.
//
// Two passes over a table of tensors that is cut into tiles of kTile elements:
//
//   sum_squares   slot[tile] = Σ (g·inv_scale)²; the last block to finish adds the slots and writes Scalars
//   update        m = β1·m + (1-β1)·ĝ    v = β2·v + (1-β2)·ĝ²    p -= lr·(wd·p + m / bc1 / (√v / √bc2 + eps))
//                 with ĝ = scale·g, scale = ±inv_scale·min(1, max_norm / (norm + 1e-6)) and bc = 1 - βᵗ
//
// A tile's squares add up in two fp32 terms, because many GPUs have one fp64 unit for 64 of fp32; the slots, few, in fp64.
// The order is fixed: element e of a tile adds to lane e % kLanes, lanes fold in a tree, and slots likewise. The norm is
// therefore the same to the bit on every device, grid and thread count. Both sides compile without contraction
// (-ffp-contract=off, -fmad=false): the update is bound by memory, and all instruction sets then agree.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __CUDACC__
#define AK_INLINE __host__ __device__ __forceinline__
#else
#define AK_INLINE inline __attribute__((always_inline))
#endif

namespace adapterkern {

constexpr int kTile = 4096;      // elements; one warp takes one tile
constexpr int kLanes = 128;      // partial sums of a tile: 32 threads × 4 adjacent elements
constexpr int kSlotLanes = 256;  // partial sums over the slots: the threads of one block

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// What a parameter is stored as. "Main" is what AdamW updates; "rounded" is written from it in the same pass.
enum class Kind : uint8_t {
  kFloat32,         // main, gradient: fp32
  kBf16Master,      // main: fp32 master weights; gradient, rounded (the parameter): bf16
  kFp16Master,      // main: fp32 master weights; gradient, rounded (the parameter): fp16
  kBf16Stochastic,  // main, gradient: bf16, rounded stochastically
};

struct Tensor {
  void* main;         // [count]
  void* grad;         // [count], set to zero by update() if clear_grads
  float* exp_avg;     // [count]
  float* exp_avg_sq;  // [count]
  void* rounded;      // [count] a master's parameter, read and written; or null
  float* step;        // [1] updates done so far, as torch.optim.AdamW keeps it
  int64_t count;
  uint32_t first_tile;
  uint16_t group;
  Kind kind;
};

struct Group {
  const float* lr_tensor;            // [1] read at run time, so that a captured graph follows a schedule; or null
  const float* weight_decay_tensor;  // [1], or null
  float lr, weight_decay;
  float one_minus_beta1, beta2, one_minus_beta2;
  float log_beta1, log_beta2;
  float eps;
  float sign;  // -1 to maximize
};

// Optional inputs of the norm pass; every pointer may be null.
struct Clip {
  const float* grad_scale;  // [1] what the loss was multiplied by
  const float* found_inf;   // [1] non-zero: skip this step
  const float* max_norm_tensor;
  float max_norm;           // infinity: no clipping
};

// All that the two passes share. It stays on the device; the host reads it only on request.
struct Scalars {
  double sum_squares;
  float norm;
  float scale;           // gradient multiplier: unscaling and clipping in one
  float skipped;         // 1: a gradient was not finite, or found_inf was set; nothing is updated
  unsigned blocks_done;  // CUDA: counts K1's blocks, always back at 0
};
static_assert(sizeof(Scalars) == 24, "adapterkern/optim/backends.py views these fields by their offset");

// ---- element types ----

AK_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

AK_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

AK_INLINE float to_float(float x) { return x; }
AK_INLINE float to_float(Bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }

AK_INLINE float to_float(Float16 x) {
  // Multiplying by 2¹¹² moves the exponent bias from 15 to 127 and normalizes subnormals; infinity and NaN need theirs set.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = float_bits(bits_float(magnitude) * 0x1p112f);
  return bits_float((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | uint32_t(x.bits & 0x8000) << 16);
}

AK_INLINE void from_float(float x, Bfloat16& out) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

AK_INLINE void from_float(float x, Float16& out) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffff;
  // Below 2⁻¹⁴ fp16 is subnormal: adding ½ lets fp32's own rounding place the last bit. Otherwise rebias and round to even.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  out.bits = uint16_t(half | (bits >> 16 & 0x8000));
}

// A 32-bit finalizer: every input bit flips each output bit with probability near one half.
AK_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Rounds up with probability equal to the fraction that truncation would drop. The random bits are a function of
// (seed, step, tensor, element) alone: the same run gives the same bits on every device.
AK_INLINE void from_float_stochastic(float x, uint32_t random, Bfloat16& out) {
  const uint32_t bits = float_bits(x);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  out.bits = uint16_t((finite ? bits + (random & 0xffff) : bits) >> 16);
}

// ---- the sum of squares ----

// A sum hi + lo: what rounding takes from hi is kept in lo. Of a tile's squares it is good to 2⁻³⁶, in practice to 2⁻⁴⁷.
struct TwoTerms { float hi, lo; };

AK_INLINE double add(double a, double b) { return a + b; }

AK_INLINE TwoTerms add(TwoTerms a, TwoTerms b) {
  const float hi = a.hi + b.hi, added = hi - a.hi;
  const float lost = (a.hi - (hi - added)) + (b.hi - added);  // exact, whichever is larger: Knuth's TwoSum
  return {hi, lost + (a.lo + b.lo)};
}

AK_INLINE double total(TwoTerms sum) { return double(sum.hi) + sum.lo; }

// x², exact unless lo underflows. Without an FMA instruction it goes through fp64, where x² is exact too: the same bits.
template <bool kFma>
AK_INLINE TwoTerms square(float x) {
  const float hi = x * x;
  return {hi, kFma ? fmaf(x, x, -hi) : float(double(x) * x - hi)};
}

// Whether fp32's range held a tile's sum: no square overflowed (that leaves infinity or NaN), and what underflowed, up to
// 2⁻¹⁵⁰ per element, is below 2⁻⁴⁷ of the sum. Otherwise (a tile of zeros, too) it is added up again, in fp64.
AK_INLINE bool in_range(double sum) { return sum >= 0x1p-90 && sum < 0x1p128; }

// ---- scalars ----

AK_INLINE float inverse(const float* grad_scale) { return grad_scale ? float(1.0 / double(*grad_scale)) : 1.0f; }

// From the sum of squares to everything update() reads. A non-finite norm means a non-finite gradient: squares of
// floats cannot overflow fp64.
AK_INLINE void finish(const Clip& clip, Scalars& s) {
  const double norm = sqrt(s.sum_squares);
  const double max_norm = clip.max_norm_tensor ? *clip.max_norm_tensor : clip.max_norm;
  const double coefficient = max_norm / (norm + 1e-6);
  s.norm = float(norm);
  s.scale = inverse(clip.grad_scale) * float(coefficient < 1.0 ? coefficient : 1.0);
  s.skipped = !(s.sum_squares <= 1.7976931348623157e308) || (clip.found_inf && *clip.found_inf != 0.0f) ? 1.0f : 0.0f;
}

// ---- the update ----

struct Step {
  float grad_scale;
  bool from_gradient;  // m is g + weight·(g - m), not m + weight·(g - m)
  float weight, beta2, one_minus_beta2;
  float decay;                        // lr·wd
  float size;                         // lr / bc1
  float inv_sqrt_correction2, eps;    // 1 / √bc2
  uint32_t key;                       // of the random bits
};

AK_INLINE Step make_step(const Group& group, const Scalars& s, float t, uint32_t seed, uint32_t ordinal) {
  const float lr = group.lr_tensor ? *group.lr_tensor : group.lr;
  const float weight_decay = group.weight_decay_tensor ? *group.weight_decay_tensor : group.weight_decay;
  // 1 - βᵗ = -expm1(t·ln β) keeps fp32's full precision where 1 - powf(β, t) would cancel.
  const float correction1 = -expm1f(t * group.log_beta1), correction2 = -expm1f(t * group.log_beta2);
  // As torch.lerp: where g weighs more than m, m + (g - m) would lose a g that is small beside m.
  const bool from_gradient = group.one_minus_beta1 >= 0.5f;
  const float weight = from_gradient ? group.one_minus_beta1 - 1.0f : group.one_minus_beta1;
  return {s.scale * group.sign, from_gradient, weight, group.beta2, group.one_minus_beta2, lr * weight_decay,
          lr / correction1, 1.0f / sqrtf(correction2), group.eps, mix(mix(mix(seed) ^ uint32_t(t)) ^ ordinal)};
}

AK_INLINE float updated(const Step& s, float p, float g, float& m, float& v) {
  g *= s.grad_scale;
  m = (s.from_gradient ? g : m) + s.weight * (g - m);
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  // Decay and step are added first: rounding 1 - lr·wd to fp32 would lose a small decay.
  return p - (s.decay * p + s.size * (m / (sqrtf(v) * s.inv_sqrt_correction2 + s.eps)));
}

struct Nothing {};

// One element of each kind: what is stored where. `index` counts within the tensor.
struct Float32 {
  using Main = float;
  using Gradient = float;
  using Rounded = Nothing;
  static AK_INLINE void apply(const Step& s, uint32_t, float& p, float g, float& m, float& v, Nothing&) {
    p = updated(s, p, g, m, v);
  }
};

template <typename Low>
struct Master {
  using Main = float;
  using Gradient = Low;
  using Rounded = Low;
  static AK_INLINE void apply(const Step& s, uint32_t, float& p, Low g, float& m, float& v, Low& rounded) {
    Low expected;
    from_float(p, expected);
    // A parameter that is not its rounded master was written since the last step (load_state_dict, a swapped average):
    // what was written holds.
    p = updated(s, expected.bits == rounded.bits ? p : to_float(rounded), to_float(g), m, v);
    from_float(p, rounded);
  }
};

struct Bf16Stochastic {
  using Main = Bfloat16;
  using Gradient = Bfloat16;
  using Rounded = Nothing;
  static AK_INLINE void apply(const Step& s, uint32_t index, Bfloat16& p, Bfloat16 g, float& m, float& v, Nothing&) {
    from_float_stochastic(updated(s, to_float(p), to_float(g), m, v), mix(mix(index) ^ s.key), p);
  }
};

// Calls f with the element rule of `kind`: the only place where a run-time kind becomes a type.
template <typename F>
AK_INLINE void dispatch(Kind kind, F&& f) {
  switch (kind) {
    case Kind::kFloat32: return f(Float32{});
    case Kind::kBf16Master: return f(Master<Bfloat16>{});
    case Kind::kFp16Master: return f(Master<Float16>{});
    case Kind::kBf16Stochastic: return f(Bf16Stochastic{});
  }
}

// ---- the table ----

struct Table {
  std::vector<Tensor> tensors;
  int64_t tiles = 0;

  // An empty tensor takes a tile too, because its step is counted there.
  void add(Tensor t) {
    t.first_tile = uint32_t(tiles);
    tiles += t.count ? (t.count + kTile - 1) / kTile : 1;
    tensors.push_back(t);
  }
};

namespace cpu {
void sum_squares(const Table&, const Clip&, double* slots, Scalars*, int threads);
void finish(const Clip&, Scalars*);
void update(const Table&, const std::vector<Group>&, const Scalars*, bool clear_grads, uint32_t seed, int threads);
}  // namespace cpu

// Each returns nullptr, or CUDA's error message.
namespace cuda {
const char* sum_squares(const Table&, const Clip&, double* slots, Scalars*, int device, void* stream);
const char* finish(const Clip&, Scalars*, int device, void* stream);
const char* update(const Table&, const std::vector<Group>&, const Scalars*, bool clear_grads, uint32_t seed, bool early,
                   int device, void* stream);
const char* unavailable(int device);
bool launches_early(int device);
}  // namespace cuda

}  // namespace adapterkern
