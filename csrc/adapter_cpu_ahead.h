// Memory that is fetched while the products multiply: a part of adapter_cpu_kernels.h.
#pragma once

#include "adapter_cpu.h"

namespace adapterkern::cpu::AK_ISA {
namespace {

// Rows of memory that are read or written soon. Products fetch their lines, a few per fetch(), so that nobody waits for
// them later: the hardware's own prefetching ends with a page, and a block's rows lie a page or more apart.
class Ahead {
 public:
  Ahead() = default;  // nothing
  // `bytes` of each row at the positions `rows` of `order`, `stride` bytes apart, in `fetches` calls of fetch()
  Ahead(const void* base, const int64_t* order, Rows rows, int64_t bytes, int64_t stride, int64_t fetches)
      : rows_(rows.end - rows.begin), next_row_(stride - bytes), stride_(stride), base_(static_cast<const char*>(base)) {
    if (rows_ <= 0) return;
    if (order) order_ = order + rows.begin;
    at_ = base_ + (order ? *order_ : rows.begin) * stride;
    end_ = at_ + bytes;
    many_ = (rows_ * ((bytes + kLine - 1) / kLine) + fetches - 1) / fetches;
  }

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < many_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLine;
      if (at_ < end_) continue;
      at_ = end_ + next_row_;
      end_ += stride_;
      if (--rows_ > 0 && __builtin_expect(order_ != nullptr, 0)) {
        at_ = base_ + *++order_ * stride_;
        end_ = at_ + (stride_ - next_row_);
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t rows_ = 0, next_row_ = 0, stride_ = 0, many_ = 0;
  const char* base_ = nullptr;
  const int64_t* order_ = nullptr;
};

}  // namespace
}  // namespace adapterkern::cpu::AK_ISA
