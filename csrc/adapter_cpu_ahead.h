// Memory that is fetched while the products multiply: a part of adapter_cpu_kernels.h.
#pragma once

#include <cstdint>

namespace adapterkern::cpu::AK_ISA {
namespace {

// Rows of memory that are read or written soon. Products fetch their lines, a few per fetch(), so that nobody waits for
// them later: the hardware's own prefetching ends with a page, and a block's rows lie a page or more apart.
class Ahead {
 public:
  Ahead() = default;  // nothing
  // `rows` rows of `bytes`, `stride` bytes apart, in `fetches` calls of fetch()
  Ahead(const void* first, int64_t rows, int64_t bytes, int64_t stride, int64_t fetches)
      : at_(static_cast<const char*>(first)), end_(at_ + bytes), rows_(rows), next_row_(stride - bytes), stride_(stride),
        many_((rows * ((bytes + kLine - 1) / kLine) + fetches - 1) / fetches) {}

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < many_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ < end_) continue;
      at_ = end_ + next_row_;
      end_ += stride_;
      --rows_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t rows_ = 0, next_row_ = 0, stride_ = 0, many_ = 0;
};

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
