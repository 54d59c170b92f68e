// SPDX-License-Identifier: Apache-2.0
//
// All buffers of an operator from one allocation. The same code that takes the
// buffers runs twice: on an arena without memory to count the bytes, then on
// the allocated one.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdci {

class Arena {
 public:
  explicit Arena(void* memory = nullptr)
      : memory_(static_cast<unsigned char*>(memory)) {}

  /// Room for `count` values, on a cache line of its own.
  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory_ ? reinterpret_cast<T*>(memory_ + offset) : nullptr;
  }

  /// A copy of an arena hands out the same memory as the original: for buffers
  /// that are not needed at the same time. The original has to know of what
  /// was taken from a copy.
  void include(const Arena& copy) {
    most_ = std::max(most_, copy.bytes());
  }

  int64_t bytes() const {
    return std::max(used_, most_);
  }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
  int64_t most_ = 0;
};

/// Asks for large pages where there is much memory: it is fresh, and clearing it
/// in small pages takes longer than some passes over the points.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + bytes) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

} // namespace kdci
