// Threads for the CPU's kernels: those of torch's OpenMP, which wait for work and have their cores.
#pragma once

#include <atomic>
#include <system_error>
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

// body(), which throws nothing, on up to `threads` threads at once
template <class Body>
void on_threads(int threads, const Body& body) {
  if (threads <= 1) return body();
  if (const Parallel parallel = openmp())
    return parallel([](void* data) { (*static_cast<const Body*>(data))(); }, const_cast<Body*>(&body), unsigned(threads),
                    0);
  std::vector<std::thread> others;
  try {
    others.reserve(size_t(threads));
    while (int(others.size()) < threads - 1) others.emplace_back(body);
  } catch (const std::system_error&) {  // no more threads are to be had: these do it all
  }
  body();
  for (auto& thread : others) thread.join();
}

}  // namespace adapterkern
