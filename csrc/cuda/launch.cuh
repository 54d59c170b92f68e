// SPDX-License-Identifier: Apache-2.0
//
// Launching kernels, and carving workspaces out of one allocation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kdci::cuda {

/// Threads in a block.
constexpr int kThreads = 256;

/// Most blocks of a launch; kernels loop over their work items, so fewer
/// blocks than items are right too.
constexpr int64_t kMaxBlocks = 1 << 20;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int64_t smallest(int64_t a, int64_t b) {
  return a < b ? a : b;
}

constexpr int64_t largest(int64_t a, int64_t b) {
  return a < b ? b : a;
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(
        std::string(what) + ": " + cudaGetErrorString(status));
  }
}

/// Queues `kernel(args...)` on `stream`, with one block for each of `items`.
template <typename... Params, typename... Args>
void launch(
    void (*kernel)(Params...),
    int64_t items,
    int threads,
    cudaStream_t stream,
    Args... args) {
  if (items <= 0) {
    return;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(items < kMaxBlocks ? items : kMaxBlocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), "kernel launch");
}

/// Hands out consecutive, aligned pieces of a block of memory. Built on a null
/// pointer it only counts, so that one function describes a workspace both
/// when its size is asked for and when it is used.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const size_t begin = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  int64_t used() const {
    return static_cast<int64_t>(used_);
  }

 private:
  char* base_;
  size_t used_ = 0;
};

} // namespace kdci::cuda
