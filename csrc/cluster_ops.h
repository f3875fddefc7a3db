// What a kernel by clusters is made of, one instruction each: copies into, out of and between the shared memories of a
// cluster, barriers that count bytes, products of a warp. Compiled by a C++ compiler, the same names run on the host, a
// fiber per thread: tests/ops/host_cluster/host_ops.h.
//
// Two kinds of access meet in shared memory. Threads read and write it by the generic proxy, bulk copies by the
// asynchronous one. What threads have written a bulk copy sees only after fence_async(), executed by the writers before
// the barrier that precedes the copy. What a copy has brought a thread sees once its own wait() on the copy's barrier
// has returned. What threads have only read a copy may overwrite after any barrier.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "host_ops.h"
#else

#define AK_DEVICE __device__ __forceinline__

namespace adapterkern::cluster {

using Barrier = uint64_t;
struct Pair { float x, y; };

extern __shared__ __align__(128) unsigned char shared_memory[];

AK_DEVICE unsigned char* shared() { return shared_memory; }
// A place in the block's own shared memory; bytes may be added to it.
using Address = uint32_t;
AK_DEVICE Address address(const void* p) { return Address(__cvta_generic_to_shared(p)); }
// Asked for again, a place is read again instead of kept in a register.
AK_DEVICE int thread_index() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  __builtin_assume(r < 1024);  // without it each division by a power of two handles a sign
  return int(r);
}

// Place in the cluster, and the cluster's in the grid.
AK_DEVICE int cluster_rank() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return int(r); }
AK_DEVICE int cluster_size() { uint32_t r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return int(r); }
AK_DEVICE unsigned cluster_index() { uint32_t r; asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(r)); return r; }
AK_DEVICE unsigned cluster_count() { uint32_t r; asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(r)); return r; }

// Barriers of threads: the warp, `threads` threads of the block that name the same `id`, the cluster.
AK_DEVICE void sync_warp() { __syncwarp(); }
AK_DEVICE void sync_threads(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
AK_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same number, of which the compiler knows nothing: what depends on it stays where it is written.
AK_DEVICE int opaque(int v) { asm volatile("" : "+r"(v)); return v; }

AK_DEVICE bool any_in_warp(bool value) { return __any_sync(~0u, value); }
AK_DEVICE float exchange(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
AK_DEVICE float from_lane(float v, int lane) { return __shfl_sync(~0u, v, lane); }

// The previous kernel is over, and the next one may be set up (programmatic dependent launch).
AK_DEVICE void follow() { asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory"); }

// A warp group's registers per thread, of those that the block was launched with.
template <int N> AK_DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> AK_DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// A barrier in shared memory. A phase is over after `count` arrivals and all the bytes that they announced.
AK_DEVICE void init(Barrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(count) : "memory");
}
AK_DEVICE void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
AK_DEVICE void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}
AK_DEVICE void arrive_expecting(Barrier* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. What other blocks have sent is seen after wait_for_blocks(), which empties L1.
AK_DEVICE void wait(Barrier* b, int parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(address(b)), "r"(parity) : "memory");
}
AK_DEVICE void wait_for_blocks(Barrier* b, int parity) {
  asm volatile(
      "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(address(b)), "r"(parity) : "memory");
}

// Bulk copies, of multiples of 16 bytes between addresses that are multiples of 16. Those into shared memory, whose bytes
// count for a barrier beside the destination; those out of it, in groups of the thread that issued them.
AK_DEVICE void copy_in(void* to, const void* from, uint32_t bytes, Barrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)) : "memory");
}
AK_DEVICE void copy_out(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(to), "r"(address(from)), "r"(bytes) : "memory");
}
AK_DEVICE void close_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
AK_DEVICE void wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
AK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The place that corresponds to p in the shared memory of block `rank`.
AK_DEVICE uint32_t in_block(const void* p, int rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address(p)), "r"(rank));
  return r;
}
// To block `rank`; the bytes count for its barrier b.
AK_DEVICE void copy_to_block(void* to, const void* from, uint32_t bytes, Barrier* b, int rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(in_block(to, rank)), "r"(address(from)), "r"(bytes), "r"(in_block(b, rank)) : "memory");
}
AK_DEVICE void store_in_block(void* to, uint32_t v, uint32_t w, Barrier* b, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];"
               ::"r"(in_block(to, rank)), "r"(v), "r"(w), "r"(in_block(b, rank)) : "memory");
}

// Threads' own accesses to shared memory. What copies have brought is read by get().
AK_DEVICE float get(const float* p) { return *p; }
AK_DEVICE uint32_t get(const uint32_t* p) { return *p; }
AK_DEVICE void get_words(uint32_t v[4], const uint16_t* p) {  // 16 bytes, at a multiple of 16
  const uint4 w = *reinterpret_cast<const uint4*>(p);
  v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
}
AK_DEVICE void put(float* p, float v) { *p = v; }
AK_DEVICE void put(Pair* p, Pair v) { *reinterpret_cast<float2*>(p) = float2{v.x, v.y}; }
AK_DEVICE void put(uint16_t* p, uint16_t v) { *p = v; }

// Four 8×8 matrices of 16-bit numbers: lane 8j + i has the address of row i of the j-th; v[j] are lane's two elements.
AK_DEVICE void load_matrices(uint32_t v[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}
// The same, each transposed: v[j] are two elements of a column.
AK_DEVICE void load_transposed(uint32_t v[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}
AK_DEVICE void store_transposed(Address row, const uint32_t v[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(row), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
AK_DEVICE void store_matrices(Address row, const uint32_t v[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(row), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}

// c += a·b of a warp, 16×16 by 16×8 in bf16, c in fp32.
AK_DEVICE void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

AK_DEVICE uint32_t bits(float v) { return __float_as_uint(v); }
// Two numbers in bf16, the first in the lower half of a word; rounded to nearest even.
AK_DEVICE Pair unpack(uint32_t v) { return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)}; }
AK_DEVICE uint32_t pack(float a, float b) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
AK_DEVICE uint32_t subtract(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

AK_DEVICE uint32_t read_word(const uint16_t* p) { return __ldg(reinterpret_cast<const uint32_t*>(p)); }
AK_DEVICE void write_words(uint16_t* p, const uint32_t v[4]) {
  *reinterpret_cast<uint4*>(p) = uint4{v[0], v[1], v[2], v[3]};
}
AK_DEVICE uint32_t read_half(const uint16_t* p) { return __ldg(p); }

}  // namespace adapterkern::cluster
#endif
