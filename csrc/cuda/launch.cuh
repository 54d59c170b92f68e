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

/// What the current device can do.
struct Device {
  int clusters; // thread-block clusters are there (sm_90 and newer)
  int processors;
  int block_shared;     // bytes of shared memory a block can have
  int processor_shared; // bytes that the blocks of a multiprocessor share
  int reserved_shared;  // of which each block costs so many by itself

  static Device current() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const auto get = [=](cudaDeviceAttr attribute) {
      int value = 0;
      check(
          cudaDeviceGetAttribute(&value, attribute, device),
          "cudaDeviceGetAttribute");
      return value;
    };
    return {
        get(cudaDevAttrClusterLaunch),
        get(cudaDevAttrMultiProcessorCount),
        get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
        get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        get(cudaDevAttrReservedSharedMemoryPerBlock)};
  }
};

/// Whether blocks of `kernel` can be a cluster. Code for older devices that was
/// compiled anew for this one knows nothing of clusters.
template <typename... Params>
bool has_clusters(void (*kernel)(Params...), const Device& device) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return device.clusters != 0 && attributes.ptxVersion >= 90;
}

/// Bytes of dynamic shared memory that a block of `kernel` can have where
/// `blocks` of them are to run side by side on a multiprocessor. The kernel is
/// allowed all that one block alone can have: a limit that changed from launch
/// to launch would fail another host thread's.
template <typename... Params>
int64_t shared_capacity(
    void (*kernel)(Params...),
    const Device& device,
    int blocks) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int64_t each = smallest(
      device.block_shared,
      device.processor_shared / blocks - device.reserved_shared);
  const int64_t fixed = static_cast<int64_t>(attributes.sharedSizeBytes);
  check(
      cudaFuncSetAttribute(
          kernel,
          cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(device.block_shared - fixed)),
      "cudaFuncSetAttribute");
  return largest(0, each - fixed) / 16 * 16;
}

/// The launch of a team of `blocks` blocks: cooperative, so that they all run
/// at once and can wait for each other, or else as one cluster.
struct TeamLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  TeamLaunch(
      bool cooperative,
      int64_t blocks,
      int64_t shared,
      cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    if (blocks == 1) {
      return;
    }
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
  }
  TeamLaunch(const TeamLaunch&) = delete; // config points to attribute
  TeamLaunch& operator=(const TeamLaunch&) = delete;
};

/// `blocks`, or as many fewer as the device can run at once in a team.
template <typename... Params>
int64_t fitting_blocks(
    void (*kernel)(Params...),
    const Device& device,
    bool cooperative,
    int64_t blocks,
    int64_t shared) {
  int fitting = 0;
  if (cooperative) {
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &fitting, kernel, kThreads, static_cast<size_t>(shared)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return largest(1, smallest(blocks, int64_t(fitting) * device.processors));
  }
  // A part of a device may have no room for a large cluster.
  for (; blocks > 1; blocks /= 2) {
    const TeamLaunch launch(false, blocks, shared, nullptr);
    check(
        cudaOccupancyMaxActiveClusters(&fitting, kernel, &launch.config),
        "cudaOccupancyMaxActiveClusters");
    if (fitting > 0) {
      break;
    }
  }
  return blocks;
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
