// SPDX-License-Identifier: Apache-2.0
//
// A team is the blocks of one launch that work on a problem together: the
// cluster they are in, or the whole grid. Steps of an algorithm share their
// work out by `rank()` and `size()`, and `sync()` stands between a step and the
// next one that needs all of its results, so each step is written once for
// every kind of team.
#pragma once

#include <cooperative_groups.h>

#include "launch.cuh"

namespace kdci::cuda {

/// Dynamic shared memory of the block.
extern __shared__ __align__(16) char dynamic_shared[];

/// The blocks of a thread-block cluster (at most 8, so that every device with
/// clusters has room for them). They read each other's shared memory. Devices
/// before sm_90 have no clusters: there the team is one block.
class ClusterTeam {
 public:
  static constexpr int kMaxBlocks = 8;

  __device__ int rank() const {
    return static_cast<int>(blockIdx.x);
  }
  __device__ int size() const {
    return static_cast<int>(gridDim.x);
  }
  /// All blocks have come here, and see what the others wrote to shared and
  /// global memory.
  __device__ void sync() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }
  /// Where block `rank` leaves `count` values for the others: in its dynamic
  /// shared memory, at the place that `shared` is at in this block's.
  template <typename T>
  __device__ T* box(T* shared, T*, int64_t, int rank) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (gridDim.x > 1) {
      return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
    }
#endif
    return shared;
  }
};

/// All blocks of a cooperative launch.
class GridTeam {
 public:
  __device__ int rank() const {
    return static_cast<int>(blockIdx.x);
  }
  __device__ int size() const {
    return static_cast<int>(gridDim.x);
  }
  __device__ void sync() const {
    if (gridDim.x > 1) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
    }
  }
  /// Where block `rank` leaves `count` values for the others: in global memory.
  template <typename T>
  __device__ T* box(T*, T* global, int64_t count, int rank) const {
    return global + rank * count;
  }
};

} // namespace kdci::cuda
