// The CUDA kernels: warps on tiles, four adjacent elements per thread, the table in the kernel's own parameters.
//
// K1 (sum_squares_kernel) reads every gradient once; the last block to finish adds the slots in a fixed order. K2
// (update_kernel) walks the tiles backwards: the gradients that K1 read last are still in L2 and are read first. It marks
// everything else that it touches for early eviction: with plain loads, p, m and v would push out all but the last 2.5 M
// gradients of a 50 MB L2.
// Two launches for up to kMany tensors; more go in chunks, which changes no bit of the result.
//
// From sm_90 on, K2 may be launched early (programmatic dependent launch): its blocks start where K1 leaves room, find
// their tensors and load their first elements. Only what K1 writes (steps, scalars) and whatever K2 writes waits for K1:
// K1 itself is launched normally, so that all that came before it, gradients and the last K2 among them, is complete. K2
// never triggers, so that what follows it waits for all of it, a further chunk's K2 included.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "clipped_adamw.h"

namespace adapterkern::cuda {
namespace {

constexpr int kThreads = kSlotLanes;
constexpr int kWarps = kThreads / 32;
constexpr int kShare = 1024;  // K2's elements per warp: 8 turns of 128, so that 3 M parameters still fill a large GPU
constexpr int kShares = kTile / kShare;
constexpr int kFew = 100, kMany = 400;

// Consecutive tensors of the table that fit into a kernel's parameters (32,764 bytes since CUDA 12.1). Every launch copies
// all of a chunk: 7.8 KB with room for kFew tensors, 31 KB for kMany.
template <int kTensors>
struct Chunk {
  static constexpr int kGroups = kTensors / 4;
  Tensor tensors[kTensors];  // .group counts within the chunk
  Group groups[kGroups];
  int count;
  uint32_t first_tensor, first_tile, tiles;
};
static_assert(sizeof(Chunk<kMany>) + sizeof(Clip) + 64 <= 32764, "a chunk must fit the kernel parameters");

// Lets the next kernel of the stream start, if it is launched early. It must call wait_for_previous_kernel().
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Until the kernels before this one are complete and what they wrote can be read; no wait if it was launched normally.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The tensor that owns `tile`: the last one that starts at or before it.
template <typename Chunk>
__device__ __forceinline__ int owner(const Chunk& chunk, uint32_t tile) {
  int low = 0, high = chunk.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (chunk.tensors[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T at[4];
};

template <>
struct Quad<Nothing> {
  Nothing at[4];
};

template <typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return uintptr_t(p) % sizeof(Quad<T>) == 0;
}
__device__ __forceinline__ bool aligned(const Nothing*) { return true; }

template <typename T>
using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;  // as wide as a Quad<T>, for the cache-hinted accesses

// `wide`: one access for four aligned elements. Otherwise the first `n` of them, one by one, and zeros.
template <bool kStream, typename T>
__device__ __forceinline__ Quad<T> load(const T* p, bool wide, int n) {
  Quad<T> q{};
  if (wide) {
    const auto* from = reinterpret_cast<const Word<T>*>(p);
    const Word<T> word = kStream ? __ldcs(from) : *from;
    memcpy(&q, &word, sizeof q);
    return q;
  }
  for (int i = 0; i < 4; ++i)
    if (i < n) q.at[i] = p[i];
  return q;
}

template <bool kStream>
__device__ __forceinline__ Quad<Nothing> load(const Nothing*, bool, int) {
  return {};
}

template <typename T>
__device__ __forceinline__ void store(T* p, const Quad<T>& q, bool wide, int n) {
  if (wide) {
    Word<T> word;
    memcpy(&word, &q, sizeof q);
    __stcs(reinterpret_cast<Word<T>*>(p), word);
    return;
  }
  for (int i = 0; i < 4; ++i)
    if (i < n) p[i] = q.at[i];
}
__device__ __forceinline__ void store(Nothing*, const Quad<Nothing>&, bool, int) {}

__device__ __forceinline__ double exchange(double sum, int offset) { return __shfl_xor_sync(~0u, sum, offset); }
__device__ __forceinline__ TwoTerms exchange(TwoTerms sum, int offset) {
  return {__shfl_xor_sync(~0u, sum.hi, offset), __shfl_xor_sync(~0u, sum.lo, offset)};
}

__device__ __forceinline__ void add_square(double& sum, float x) { sum += double(x) * x; }
__device__ __forceinline__ void add_square(TwoTerms& sum, float x) { sum = add(sum, square<true>(x)); }

// The sum of a tile's squares, in every thread of the warp: add() commutes. kFull: the tile is full and aligned. A warp
// then keeps kBatch loads in flight, 4 KiB. Otherwise the two blocks per SM that 8 M parameters give would not cover the
// latency of device memory.
template <typename Sum, bool kFull, typename Grad>
__device__ Sum tile_squares(const Grad* grad, int n, float inv_scale) {
  constexpr int kBatch = kFull ? 8 : 1;
  const bool wide = kFull || aligned(grad);
  Sum lane[4] = {};
  for (int e = 4 * (threadIdx.x % 32); e < (kFull ? kTile : n); e += kBatch * kLanes) {
    Quad<Grad> g[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) g[j] = load<false>(grad + e + j * kLanes, kFull || (wide && e + 4 <= n), n - e);
    if constexpr (kFull) __syncwarp();  // keeps ptxas from moving each load back to its use, to save registers
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      for (int i = 0; i < 4; ++i) add_square(lane[i], to_float(g[j].at[i]) * inv_scale);  // absent elements add 0
  }
  Sum sum = add(add(lane[0], lane[1]), add(lane[2], lane[3]));
  for (int offset = 16; offset; offset /= 2) sum = add(sum, exchange(sum, offset));
  return sum;
}

// Three blocks per SM: with room for four ptxas spills on sm_80.
template <typename Chunk>
__global__ void __launch_bounds__(kThreads, 3) sum_squares_kernel(const __grid_constant__ Chunk chunk, const Clip clip,
                                                                  double* slots, Scalars* scalars, bool last_chunk) {
  let_next_kernel_start();
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index < chunk.tiles) {
    const uint32_t tile = chunk.first_tile + index;
    const Tensor& t = chunk.tensors[owner(chunk, tile)];
    const int64_t begin = int64_t(tile - t.first_tile) * kTile;
    const int n = int(min(int64_t(kTile), t.count - begin));
    dispatch(t.kind, [&](auto rule) {
      using Grad = typename decltype(rule)::Gradient;
      const Grad* grad = static_cast<const Grad*>(t.grad) + begin;
      const float inv_scale = inverse(clip.grad_scale);
      double sum = total(n == kTile && aligned(grad) ? tile_squares<TwoTerms, true>(grad, n, inv_scale)
                                                     : tile_squares<TwoTerms, false>(grad, n, inv_scale));
      if (!in_range(sum)) sum = tile_squares<double, false>(grad, n, inv_scale);
      if (threadIdx.x % 32 == 0) slots[tile] = sum;
    });
    if (begin == 0 && threadIdx.x % 32 == 0) *t.step += 1;  // update() takes it back if the step is skipped
  }
  if (!last_chunk) return;

  __shared__ bool last_block;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last_block = atomicAdd(&scalars->blocks_done, 1) == gridDim.x - 1;
  __syncthreads();
  if (!last_block) return;

  __shared__ double lane[kSlotLanes];
  __threadfence();
  const uint32_t tiles = chunk.first_tile + chunk.tiles;
  double sum = 0;
  for (uint32_t tile = threadIdx.x; tile < tiles; tile += kSlotLanes) sum += __ldcg(slots + tile);
  lane[threadIdx.x] = sum;
  for (int half = kSlotLanes / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lane[threadIdx.x] += lane[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    scalars->blocks_done = 0;
    scalars->sum_squares = lane[0];
    adapterkern::finish(clip, *scalars);
  }
}

__global__ void finish_kernel(const Clip clip, Scalars* scalars) {
  if (threadIdx.x == 0) adapterkern::finish(clip, *scalars);
}

template <typename Rule>
struct Pointers {
  typename Rule::Main* main;
  typename Rule::Gradient* grad;
  float *exp_avg, *exp_avg_sq;
  typename Rule::Rounded* rounded;

  __device__ Pointers(const Tensor& t, int64_t begin)
      : main(static_cast<typename Rule::Main*>(t.main) + begin),
        grad(static_cast<typename Rule::Gradient*>(t.grad) + begin),
        exp_avg(t.exp_avg + begin),
        exp_avg_sq(t.exp_avg_sq + begin),
        rounded(static_cast<typename Rule::Rounded*>(t.rounded) + begin) {}

  __device__ bool all_aligned() const {
    return aligned(main) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) && aligned(rounded);
  }
};

// Four adjacent elements of everything that K2 reads.
template <typename Rule>
struct Elements {
  Quad<typename Rule::Main> main;
  Quad<typename Rule::Gradient> grad;
  Quad<float> exp_avg, exp_avg_sq;
  Quad<typename Rule::Rounded> rounded;

  __device__ void read(const Pointers<Rule>& at, int e, bool wide, int n) {
    main = load<true>(at.main + e, wide, n - e);
    grad = load<true>(at.grad + e, wide, n - e);
    exp_avg = load<true>(at.exp_avg + e, wide, n - e);
    exp_avg_sq = load<true>(at.exp_avg_sq + e, wide, n - e);
    rounded = load<true>(at.rounded + e, wide, n - e);
  }
};

// `ready(s)` waits for K1 and sets s; false: the step is skipped. Only a full share is read from before: registers.
template <bool kFull, typename Rule, typename Ready>
__device__ void update_share(const Pointers<Rule>& at, uint32_t begin, int n, Ready ready) {
  const int first = 4 * (threadIdx.x % 32);
  Elements<Rule> x{};
  if (kFull) x.read(at, first, true, n);
  Step s;
  if (!ready(s)) return;
  const bool all_aligned = kFull || at.all_aligned();
  for (int e = first; e < (kFull ? kShare : n); e += kLanes) {
    const bool wide = kFull || (all_aligned && e + 4 <= n);
    if (!kFull || e != first) x.read(at, e, wide, n);
    for (int i = 0; i < 4; ++i)
      Rule::apply(s, begin + e + i, x.main.at[i], x.grad.at[i], x.exp_avg.at[i], x.exp_avg_sq.at[i], x.rounded.at[i]);
    store(at.main + e, x.main, wide, n - e);
    store(at.exp_avg + e, x.exp_avg, wide, n - e);
    store(at.exp_avg_sq + e, x.exp_avg_sq, wide, n - e);
    store(at.rounded + e, x.rounded, wide, n - e);
  }
}

template <typename Grad>
__device__ void clear_share(Grad* grad, int n) {
  const bool wide = aligned(grad);
  for (int e = 4 * (threadIdx.x % 32); e < n; e += kLanes) store(grad + e, Quad<Grad>{}, wide && e + 4 <= n, n - e);
}

template <typename Chunk>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Chunk chunk, const Scalars* scalars,
                                                          bool clear_grads, uint32_t seed) {
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32, last = chunk.tiles * kShares - 1;
  if (index > last) return;
  const uint32_t tile = chunk.first_tile + (last - index) / kShares;
  const int ordinal = owner(chunk, tile);
  const Tensor& t = chunk.tensors[ordinal];
  const int64_t begin = int64_t(tile - t.first_tile) * kTile + (last - index) % kShares * kShare;
  const int n = int(min(int64_t(kShare), t.count - begin));  // <= 0 past the tensor's end
  const auto ready = [&](Step& step) {
    wait_for_previous_kernel();
    const Scalars s = *scalars;
    if (s.skipped == 0)
      step = make_step(chunk.groups[t.group], s, *t.step, seed, chunk.first_tensor + ordinal);
    else if (begin == 0 && threadIdx.x % 32 == 0)
      *t.step -= 1;
    return s.skipped == 0;
  };
  dispatch(t.kind, [&](auto rule) {
    const Pointers<decltype(rule)> at(t, begin);
    if (n == kShare && at.all_aligned())
      update_share<true>(at, uint32_t(begin), n, ready);
    else
      update_share<false>(at, uint32_t(begin), n, ready);
    if (clear_grads) clear_share(at.grad, n);
  });
}

// Fills `chunk` with tensors, starting at `first`; returns the start of the next chunk. K1 needs no groups: null.
template <typename Chunk>
size_t fill(Chunk& chunk, const Table& table, const std::vector<Group>* groups, size_t first) {
  chunk.count = 0;
  chunk.first_tensor = uint32_t(first);
  chunk.first_tile = table.tensors[first].first_tile;
  int local = 0;
  size_t i = first;
  for (; i < table.tensors.size() && chunk.count < int(std::size(chunk.tensors)); ++i) {
    Tensor t = table.tensors[i];
    if (i == first || t.group != table.tensors[i - 1].group) {
      local = i == first ? 0 : local + 1;
      if (local == Chunk::kGroups) break;
      if (groups) chunk.groups[local] = (*groups)[t.group];
    }
    t.group = uint16_t(local);
    chunk.tensors[chunk.count++] = t;
  }
  chunk.tiles = uint32_t((i < table.tensors.size() ? table.tensors[i].first_tile : table.tiles) - chunk.first_tile);
  return i;
}

// Calls f(chunk, last) for each chunk, until one returns an error.
template <int kTensors, typename F>
cudaError_t for_each_chunk_of(const Table& table, const std::vector<Group>* groups, F f) {
  Chunk<kTensors> chunk;
  cudaError_t error = cudaSuccess;
  for (size_t first = 0; first < table.tensors.size() && error == cudaSuccess;) {
    first = fill(chunk, table, groups, first);
    error = f(chunk, first == table.tensors.size());
  }
  return error;
}

template <typename F>
cudaError_t for_each_chunk(const Table& table, const std::vector<Group>* groups, F f) {
  const size_t count = table.tensors.size();
  const bool few = count <= kFew && (!count || table.tensors.back().group < Chunk<kFew>::kGroups);  // in their groups' order
  return few ? for_each_chunk_of<kFew>(table, groups, f) : for_each_chunk_of<kMany>(table, groups, f);
}

// Makes `device` current for one launch, then restores the caller's.
struct DeviceGuard {
  int previous = 0;
  explicit DeviceGuard(int device) {
    cudaGetDevice(&previous);
    cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(previous); }
};

const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// One thread for each lane of `warps` warps. `early`: the kernel may start before the previous one is complete.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), uint32_t warps, void* stream, bool early, Args&&... args) {
  cudaLaunchAttribute serialization{};
  serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  serialization.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.attrs = &serialization;
  config.numAttrs = early;
  config.gridDim = dim3((warps + kWarps - 1) / kWarps);
  config.blockDim = dim3(kThreads);
  config.stream = cudaStream_t(stream);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace

const char* sum_squares(const Table& table, const Clip& clip, double* slots, Scalars* scalars, int device,
                        void* stream) {
  const DeviceGuard guard(device);
  return describe(for_each_chunk(table, nullptr, [&](const auto& chunk, bool last) {
    return launch(sum_squares_kernel<std::decay_t<decltype(chunk)>>, chunk.tiles, stream, false, chunk, clip, slots,
                  scalars, last);
  }));
}

const char* finish(const Clip& clip, Scalars* scalars, int device, void* stream) {
  const DeviceGuard guard(device);
  return describe(launch(finish_kernel, 1, stream, false, clip, scalars));
}

const char* update(const Table& table, const std::vector<Group>& groups, const Scalars* scalars, bool clear_grads,
                   uint32_t seed, bool early, int device, void* stream) {
  const DeviceGuard guard(device);
  return describe(for_each_chunk(table, &groups, [&](const auto& chunk, bool) {
    return launch(update_kernel<std::decay_t<decltype(chunk)>>, chunk.tiles * kShares, stream, early, chunk, scalars,
                  clear_grads, seed);
  }));
}

const char* unavailable(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, update_kernel<Chunk<kMany>>);
  cudaGetLastError();  // a missing driver or architecture is an answer here, not an error for the next caller
  return describe(error);
}

bool launches_early(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes{};
  int driver = 0;
  // Code for sm_80 that runs on a newer device does not wait. Older drivers do not capture such launches in graphs.
  return cudaFuncGetAttributes(&attributes, update_kernel<Chunk<kMany>>) == cudaSuccess &&
         attributes.ptxVersion >= 90 && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
}

}  // namespace adapterkern::cuda
