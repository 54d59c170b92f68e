// SPDX-License-Identifier: Apache-2.0
//
// All buffers of an operator from one allocation. The same code that takes the
// buffers runs twice: on an arena without memory to count the bytes, then on
// the allocated one.
#pragma once

#include <algorithm>
#include <cstdint>

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

} // namespace kdci
