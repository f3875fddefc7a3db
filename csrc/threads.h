// Threads for the CPU's kernels: those of torch's OpenMP, which wait for work and have their cores.
#pragma once

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace adapterkern {

// What `#pragma omp parallel` calls in the OpenMP library that torch has loaded; null if torch has none of GNU's. Found at
// run time, so that this library needs none, and never a second one with threads of its own.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#ifdef __linux__
// The threads of its pool do not live on in a forked process, which would wait for them for ever.
inline std::atomic<bool> forked{false};
inline const int noticed = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline Parallel openmp() {
#ifdef __linux__
  static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
#else
  return nullptr;
#endif
}

// body(), which throws nothing, on up to `useful` of `threads` threads, torch's number, at once. OpenMP is asked for all of
// them, as by torch: it ends those that a call does not ask for, and torch's next operation would start them anew.
template <class Body>
void on_threads(int threads, int useful, const Body& body) {
  if (useful <= 1) return body();
  if (const Parallel parallel = openmp()) {
    std::atomic<int> places{useful};
    auto take_part = [&] {
      if (places.fetch_sub(1, std::memory_order_relaxed) > 0) body();
    };
    using Part = decltype(take_part);
    return parallel([](void* part) { (*static_cast<Part*>(part))(); }, &take_part, unsigned(threads), 0);
  }
  std::vector<std::thread> others;
  others.reserve(size_t(useful));
  try {
    while (int(others.size()) < useful - 1) others.emplace_back(body);
  } catch (const std::exception&) {  // no more threads, or no memory for them, are to be had: these do it all
  }
  body();
  for (auto& thread : others) thread.join();
}

}  // namespace adapterkern
