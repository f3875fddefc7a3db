// csrc/cluster_ops.h on the host: a cluster of thread blocks, a fiber per thread, in an order drawn at random, with one
// warp that in half of the runs gets a turn only when the others wait. Copies land at a random later time, one warp's only
// when all threads wait; they read their source only then, or some at once, and leave NaN at their destination until they have landed. So a barrier that is
// missing, or waited for too early, shows in the results.
//
// Checked on the way: alignment and bounds of every copy; that the lanes of a warp meet in the same instruction; that what
// a bulk copy reads was written before a fence_async() of the thread that wrote it; that a thread which reads what a copy
// has brought has waited for that copy itself; that no barrier gets more arrivals than its phase takes, and no thread
// misses a phase of one that it waits for; that all threads end, and nothing is under way then.
//
// Not modeled: what a card's caches and proxies delay beyond that, and the time that anything takes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

#define AK_DEVICE inline

namespace adapterkern::cluster {

using std::min;
using Barrier = uint64_t;
struct Pair { float x, y; };

namespace host {

constexpr int kMaxThreads = 1024;

struct Phase { int count = 0, pending = 0; int64_t bytes = 0; unsigned number = 0, place = 0; };
struct Copy { void* to; const void* from; uint32_t bytes; Barrier* barrier; int thread; std::vector<char> value; };
// By which thread, after how many of its fences; or by a copy, in which phase of which barrier of the block.
struct Written { int thread = -1; unsigned fences = 0; int barrier = -1; unsigned phase = 0; };
struct Meeting { int arrived = 0; unsigned number = 0; };
struct Range { const char *begin, *end; };

struct Warp {
  Meeting meeting;
  const char* instruction = nullptr;
  uint32_t words[32][8];
  float sums[32][4];
  const void* rows[32];
};

struct Fiber {
  StackOfFiber stack;
  bool over = false;
  unsigned fences = 0;
  int copies = 0;
  std::vector<unsigned> waited;  // how many phases of each of the block's barriers it knows to be over
};

struct Block {
  std::vector<char> raw;
  char* memory = nullptr;
  std::vector<Written> written;  // of each word
  std::vector<Warp> warps;
  std::unordered_map<int, Meeting> named;
  unsigned barriers = 0;
};

// One cluster.
inline std::vector<Block> blocks;
inline std::vector<Fiber> fibers;
inline std::unordered_map<const Barrier*, Phase> phases;
inline std::vector<Copy> copies;
inline Meeting whole;
inline std::vector<Range> ranges;  // of the device's memory
inline std::mt19937 draw;
inline std::function<void()> kernel;
inline std::string error;
inline void* scheduler;
inline size_t bytes_shared;
inline int threads, current, index, count;
inline int ignored;  // a line of the kernel whose barrier is left out, to see that the tests would notice
inline bool reached;  // whether a thread has come to it
inline bool moved;  // whether anything has happened since the scheduler last looked

inline bool left_out(int line) {
  reached = reached || line == ignored;
  return line == ignored;
}

inline void yield() { fibers[current].stack.leave(scheduler); }
inline void fail(const std::string& what) {
  if (error.empty()) error = what;
  for (;;) yield();
}
inline Block& block() { return blocks[current / threads]; }
inline Warp& warp() { return block().warps[current % threads / 32]; }
inline int lane() { return current % 32; }

template <class Over> void until(Over over) {
  while (!over()) yield();
  moved = true;
}

inline void meet(Meeting& meeting, int size) {
  const unsigned number = meeting.number;
  if (++meeting.arrived == size) {
    meeting.arrived = 0, ++meeting.number, moved = true;
    return;
  }
  until([&] { return meeting.number != number; });
}

// The last lane to come does the work of all.
template <class Work> void together(const char* instruction, Work work) {
  Warp& w = warp();
  if (w.meeting.arrived == 0) w.instruction = instruction;
  if (w.instruction != instruction)
    fail(std::string("lanes of a warp meet in ") + w.instruction + " and in " + instruction);
  if (w.meeting.arrived == 31) work(w);
  meet(w.meeting, 32);
}

inline int owner(const void* p) {  // the block in whose shared memory it lies, or −1
  for (size_t b = 0; b < blocks.size(); ++b)
    if (p >= blocks[b].memory && p < blocks[b].memory + bytes_shared) return int(b);
  return -1;
}

inline void must_be_in_device_memory(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (const Range& range : ranges)
    if (at >= range.begin && at + bytes <= range.end) return;
  fail("an access outside of the tensors");
}

inline void note(const void* p, size_t bytes, Written written) {
  Block& b = blocks[owner(p)];
  const size_t first = (static_cast<const char*>(p) - b.memory) / 4;
  for (size_t i = first; i < first + (bytes + 3) / 4; ++i) b.written[i] = written;
}
inline void note_write(const void* p, size_t bytes, int thread) { note(p, bytes, {thread, fibers[thread].fences, -1, 0}); }

inline void must_have_come(const void* p, size_t bytes) {
  Block& b = blocks[owner(p)];
  const size_t first = (static_cast<const char*>(p) - b.memory) / 4;
  for (size_t i = first; i < first + bytes / 4; ++i)
    if (const Written w = b.written[i]; w.barrier >= 0 && fibers[current].waited[w.barrier] <= w.phase)
      fail("a thread reads what a copy has brought without having waited for it");
}

inline void must_be_fenced(const void* p, size_t bytes) {
  Block& b = blocks[owner(p)];
  const size_t first = (static_cast<const char*>(p) - b.memory) / 4;
  for (size_t i = first; i < first + bytes / 4; ++i)
    if (const Written w = b.written[i]; w.thread >= 0 && fibers[w.thread].fences == w.fences)
      fail("a bulk copy reads what a thread has written without fence_async()");
}

inline void must_be_aligned(const void* to, const void* from, uint32_t bytes) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes % 16 || bytes == 0)
    fail("a bulk copy that is not of 16-byte units");
}

inline void check_phase(Phase& phase) {
  if (phase.pending == 0 && phase.bytes == 0) ++phase.number, phase.pending = phase.count;
}

inline Phase& phase_of(const Barrier* b) {
  const auto found = phases.find(b);
  if (found == phases.end()) fail("a barrier that was not initialized");
  return found->second;
}

inline void land(size_t i) {
  const Copy copy = std::move(copies[i]);
  if (i + 1 < copies.size()) copies[i] = std::move(copies.back());
  copies.pop_back();
  std::memcpy(copy.to, copy.value.empty() ? copy.from : copy.value.data(), copy.bytes);
  if (copy.barrier) {
    Phase& phase = phase_of(copy.barrier);
    note(copy.to, copy.bytes, {-1, 0, int(phase.place), phase.number});
    phase.bytes -= copy.bytes;
    check_phase(phase);
  } else {
    --fibers[copy.thread].copies;
  }
  moved = true;
}

template <class P> P* in_block(P* p, int rank) {
  if (rank < 0 || rank >= int(blocks.size())) fail("a block that is not in the cluster");
  return reinterpret_cast<P*>(blocks[rank].memory + (reinterpret_cast<const char*>(p) - block().memory));
}

inline void start_copy(Copy copy) {
  copy.thread = current;
  if (copy.barrier) std::memset(copy.to, 0xff, copy.bytes);  // NaN
  else ++fibers[current].copies;
  const char* from = static_cast<const char*>(copy.from);
  if (from && draw() % 4 == 0) copy.value.assign(from, from + copy.bytes);
  copies.push_back(std::move(copy));
  moved = true;
}

inline void begin() {
  kernel();
  fibers[current].over = true;
  moved = true;
  for (;;) yield();
}

// Runs `body` for the threads of `size` blocks, of one cluster after another. What went wrong, or nothing.
inline std::string run(int clusters, int size, int threads_, size_t shared, unsigned seed, const std::function<void()>& body) {
  threads = threads_, bytes_shared = shared, count = clusters;
  kernel = body;
  draw.seed(seed);
  error.clear();
  fibers.resize(size_t(size) * threads);
  for (index = 0; index < clusters; ++index) {
    phases.clear(), copies.clear();
    whole = {};
    blocks.clear();
    blocks.resize(size);
    for (Block& b : blocks) {
      b.raw.assign(shared + 128, char(0xff));
      b.memory = b.raw.data() + (128 - uintptr_t(b.raw.data()) % 128) % 128;
      b.written.resize(shared / 4 + 1);
      b.warps.resize(threads / 32);
    }
    for (Fiber& fiber : fibers) {
      fiber.stack.start(begin);
      fiber.over = false, fiber.copies = 0, fiber.fences = 0;
      fiber.waited.assign(64, 0);
    }
    std::vector<int> warps(size * threads / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = int(i);
    int idle = 0;
    const int slow = int(draw() % (2 * warps.size()));  // a warp, or none, whose copies land only once no thread goes on
    const int starved = int(draw() % (2 * warps.size()));  // a warp, or none, that runs only once the others cannot
    while (!warps.empty() && error.empty()) {
      const size_t chosen = draw() % warps.size();
      if (warps[chosen] == starved && warps.size() > 1 && idle < 4 * int(warps.size())) {
        ++idle;
        continue;
      }
      moved = false;
      for (int turns = 1 + draw() % 16; turns && error.empty(); --turns) {
        const int rotation = draw() % 32;
        for (int i = 0; i < 32; ++i) {
          current = warps[chosen] * 32 + (i + rotation) % 32;
          if (!fibers[current].over) fibers[current].stack.enter(&scheduler);
          if (!error.empty()) break;
        }
      }
      for (size_t some = draw() % 2 * (1 + copies.size() / 16); some && !copies.empty(); --some)
        if (const size_t i = draw() % copies.size(); copies[i].thread / 32 != slow || idle > int(warps.size())) land(i);
      bool over = true;
      for (int i = 0; i < 32; ++i) over = over && fibers[warps[chosen] * 32 + i].over;
      if (over) warps[chosen] = warps.back(), warps.pop_back();
      idle = moved ? 0 : idle + 1;
      if (idle > 100 * int(warps.size() + 1)) return "the threads wait for each other";
    }
    if (!error.empty()) return error;
    if (!copies.empty()) return "copies are under way at the end";
  }
  return {};
}

}  // namespace host

inline unsigned char* shared() { return reinterpret_cast<unsigned char*>(host::block().memory); }
using Address = char*;
inline Address address(const void* p) { return const_cast<char*>(static_cast<const char*>(p)); }
inline int thread_index() { return host::current % host::threads; }
inline int cluster_rank() { return host::current / host::threads; }
inline int cluster_size() { return int(host::blocks.size()); }
inline unsigned cluster_index() { return host::index; }
inline unsigned cluster_count() { return host::count; }

inline void sync_warp(int line = __builtin_LINE()) {
  if (!host::left_out(line)) host::together("sync_warp", [](host::Warp&) {});
}
inline void sync_threads(int id, int threads, int line = __builtin_LINE()) {
  if (!host::left_out(line)) host::meet(host::block().named[id], threads);
}
inline void sync_cluster(int line = __builtin_LINE()) {
  if (!host::left_out(line)) host::meet(host::whole, int(host::fibers.size()));
}
inline int opaque(int v) { return v; }
inline bool any_in_warp(bool value) {
  const int l = host::lane();
  host::warp().words[l][0] = value;
  host::together("any_in_warp", [](host::Warp& w) {
    uint32_t any = 0;
    for (auto& words : w.words) any |= words[0];
    for (auto& words : w.words) words[0] = any;
  });
  return host::warp().words[l][0];
}
inline float from_lane(float v, int lane) {
  uint32_t* own = host::warp().words[host::lane()];
  std::memcpy(own, &v, 4);
  own[1] = lane;
  host::together("from_lane", [](host::Warp& w) {
    for (auto& words : w.words) words[2] = w.words[words[1] % 32][0];
  });
  std::memcpy(&v, own + 2, 4);
  return v;
}
inline float exchange(float v, int mask) { return from_lane(v, host::lane() ^ mask); }
inline void follow() {}
template <int N> void take_registers() {}
template <int N> void give_registers() {}

inline void init(Barrier* b, int count) { host::phases[b] = {count, count, 0, 0, host::block().barriers++}; }
inline void fence_init() {}
inline void arrive(Barrier* b) {
  host::Phase& phase = host::phase_of(b);
  if (--phase.pending < 0) host::fail("a barrier with more arrivals than a phase takes");
  host::check_phase(phase);
  host::moved = true;
}
inline void arrive_expecting(Barrier* b, uint32_t bytes) {
  host::phase_of(b).bytes += bytes;
  arrive(b);
}
inline void wait(Barrier* b, int parity, int line = __builtin_LINE()) {
  if (host::left_out(line)) return;
  host::Phase& phase = host::phase_of(b);
  host::until([&] { return int(phase.number & 1) != parity; });
  unsigned& waited = host::fibers[host::current].waited[phase.place];
  if (phase.number > waited + 1) host::fail("a thread has missed a phase of a barrier");
  waited = phase.number;
}
inline void wait_for_blocks(Barrier* b, int parity, int line = __builtin_LINE()) { wait(b, parity, line); }

inline void copy_in(void* to, const void* from, uint32_t bytes, Barrier* b) {
  host::must_be_aligned(to, from, bytes);
  host::must_be_in_device_memory(from, bytes);
  host::start_copy({to, from, bytes, b, 0, {}});
}
inline void copy_out(void* to, const void* from, uint32_t bytes) {
  host::must_be_aligned(to, from, bytes);
  host::must_be_in_device_memory(to, bytes);
  host::must_be_fenced(from, bytes);
  host::start_copy({to, from, bytes, nullptr, 0, {}});
}
inline void close_group() {}
inline void wait_read(int line = __builtin_LINE()) {
  if (host::left_out(line)) return;
  host::Fiber& fiber = host::fibers[host::current];
  host::until([&] { return fiber.copies == 0; });
}
inline void fence_async(int line = __builtin_LINE()) { host::fibers[host::current].fences += !host::left_out(line); }
inline void copy_to_block(void* to, const void* from, uint32_t bytes, Barrier* b, int rank) {
  host::must_be_aligned(to, from, bytes);
  host::must_be_fenced(from, bytes);
  host::start_copy({host::in_block(to, rank), from, bytes, host::in_block(b, rank), 0, {}});
}
inline void store_in_block(void* to, uint32_t v, uint32_t w, Barrier* b, int rank) {
  if (uintptr_t(to) % 8) host::fail("a store that is not aligned");
  std::vector<char> value(8);
  std::memcpy(value.data(), &v, 4), std::memcpy(value.data() + 4, &w, 4);
  host::start_copy({host::in_block(to, rank), nullptr, 8, host::in_block(b, rank), 0, std::move(value)});
}

template <class V> V get(const V* p) {
  host::must_have_come(p, sizeof(V));
  return *p;
}
template <class V> void put(V* p, V v) {
  *p = v;
  host::note_write(p, sizeof v, host::current);
}

namespace host {

// Where lane's j-th word of four matrices begins, and its second half, of rows that start at `rows`.
inline void at_lane(char* halves[2], const void* const* rows, int lane, int j, bool transposed) {
  for (int i = 0; i < 2; ++i) {
    const int row = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
    halves[i] = static_cast<char*>(const_cast<void*>(rows[8 * j + row])) + column * 2;
  }
}

template <bool kTransposed> void load(uint32_t v[4], Address row) {
  Warp& w = warp();
  const int l = lane();
  if (uintptr_t(row) % 16) fail("a matrix that is not aligned");
  must_have_come(row, 16);
  w.rows[l] = row;
  together(kTransposed ? "load_transposed" : "load_matrices", [](Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        char* halves[2];
        at_lane(halves, w.rows, lane, j, kTransposed);
        for (int i = 0; i < 2; ++i) std::memcpy(reinterpret_cast<char*>(&w.words[lane][j]) + 2 * i, halves[i], 2);
      }
  });
  std::memcpy(v, w.words[l], 16);
}

template <bool kTransposed> void store(Address row, const uint32_t v[4]) {
  Warp& w = warp();
  const int l = lane();
  if (uintptr_t(row) % 16) fail("a matrix that is not aligned");
  w.rows[l] = row;
  std::memcpy(w.words[l], v, 16);
  const int first = current - l;
  together(kTransposed ? "store_transposed" : "store_matrices", [first](Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        char* halves[2];
        at_lane(halves, w.rows, lane, j, kTransposed);
        for (int i = 0; i < 2; ++i) {
          std::memcpy(halves[i], reinterpret_cast<const char*>(&w.words[lane][j]) + 2 * i, 2);
          note_write(halves[i], 2, first + lane);
        }
      }
  });
}

}  // namespace host

inline void load_matrices(uint32_t v[4], Address row) { host::load<false>(v, row); }
inline void load_transposed(uint32_t v[4], Address row) { host::load<true>(v, row); }
inline void store_matrices(Address row, const uint32_t v[4]) { host::store<false>(row, v); }
inline void store_transposed(Address row, const uint32_t v[4]) { host::store<true>(row, v); }

inline float of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline Pair unpack(uint32_t v) { return {of_bits(v << 16), of_bits(v & 0xffff0000u)}; }
inline uint32_t rounded(float f) {
  const uint32_t v = bits(f);
  return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
inline uint32_t pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
inline uint32_t subtract(uint32_t a, uint32_t b) {
  const Pair p = unpack(a), q = unpack(b);
  return pack(p.x - q.x, p.y - q.y);
}

inline void multiply(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  host::Warp& w = host::warp();
  const int l = host::lane();
  std::memcpy(w.words[l], a, 16);
  w.words[l][4] = b0, w.words[l][5] = b1;
  std::memcpy(w.sums[l], c, 16);
  host::together("multiply", [](host::Warp& w) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) {
        const Pair p = unpack(w.words[lane][j]);
        float* at = &left[lane / 4 + j % 2 * 8][lane % 4 * 2 + j / 2 * 8];
        at[0] = p.x, at[1] = p.y;
        if (j < 2) {
          const Pair q = unpack(w.words[lane][4 + j]);
          right[lane % 4 * 2 + j * 8][lane / 4] = q.x, right[lane % 4 * 2 + j * 8 + 1][lane / 4] = q.y;
        }
      }
    float sums[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) sums[lane / 4 + j / 2 * 8][lane % 4 * 2 + j % 2] = w.sums[lane][j];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < 32; ++lane)
      for (int j = 0; j < 4; ++j) w.sums[lane][j] = sums[lane / 4 + j / 2 * 8][lane % 4 * 2 + j % 2];
  });
  std::memcpy(c, w.sums[l], 16);
}

inline void get_words(uint32_t v[4], const uint16_t* p) {
  host::must_have_come(p, 16);
  std::memcpy(v, p, 16);
}
inline void write_words(uint16_t* p, const uint32_t v[4]) {
  host::must_be_in_device_memory(p, 16);
  std::memcpy(p, v, 16);
}
inline uint32_t read_word(const uint16_t* p) {
  host::must_be_in_device_memory(p, 4);
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline uint32_t read_half(const uint16_t* p) {
  host::must_be_in_device_memory(p, 2);
  return *p;
}

}  // namespace adapterkern::cluster
