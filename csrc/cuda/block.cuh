// SPDX-License-Identifier: Apache-2.0
//
// What the threads of one block do together. Everything adds up in an order
// that depends on sizes alone, so results repeat bitwise.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace kdci::cuda {

template <typename T>
__device__ __forceinline__ T minimum(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a < b ? b : a;
}

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return maximum(a, b);
  }
};

/// A value with the index it came from; the larger value wins, then the lower
/// index.
template <typename T>
struct Indexed {
  T value;
  int64_t index;
};

/// `op` over `value` of all lanes of a warp, in every lane.
template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

/// `op` over `value` of all threads of the block, in every thread. The block
/// is a multiple of 32 threads. Starts and ends with a barrier.
template <typename T, typename Op>
__device__ T block_reduce(T value, Op op) {
  __shared__ T partial[32];
  value = warp_reduce(value, op);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  T result = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    result = op(result, partial[warp]);
  }
  // The caller may come back here, or overwrite what others still read.
  __syncthreads();
  return result;
}

/// The largest value of the block and the lowest index that has it.
template <typename T>
__device__ Indexed<T> block_argmax(Indexed<T> mine) {
  __shared__ T values[32];
  __shared__ int64_t indices[32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const T value = __shfl_xor_sync(0xffffffffu, mine.value, offset);
    const int64_t index = __shfl_xor_sync(
        0xffffffffu, static_cast<long long>(mine.index), offset);
    if (value > mine.value || (value == mine.value && index < mine.index)) {
      mine = {value, index};
    }
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    values[threadIdx.x / 32] = mine.value;
    indices[threadIdx.x / 32] = mine.index;
  }
  __syncthreads();
  Indexed<T> best = {values[0], indices[0]};
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
    if (values[warp] > best.value ||
        (values[warp] == best.value && indices[warp] < best.index)) {
      best = {values[warp], indices[warp]};
    }
  }
  __syncthreads();
  return best;
}

struct MultiplyAdd {
  template <typename T>
  __device__ T operator()(T sum, T a, T b) const {
    return sum + a * b;
  }
};

struct SquaredDifference {
  template <typename T>
  __device__ T operator()(T sum, T a, T b) const {
    const T difference = a - b;
    return sum + difference * difference;
  }
};

template <typename T, int kDepth, int kSide>
struct TileBuffer {
  T a[kDepth][kSide + 1];
  T b[kDepth][kSide + 1];
};

/// One buffer for all tiles of a size, however many loops a kernel has.
template <typename T, int kDepth, int kSide>
__device__ TileBuffer<T, kDepth, kSide>& tile_buffer() {
  __shared__ TileBuffer<T, kDepth, kSide> buffer;
  return buffer;
}

/// A tile of sum_k combine(a(i, k), b(k, j)) computed by one block of 256
/// threads, 16 x 16, each with `kPer` x `kPer` of the results: thread (y, x)
/// has rows y + 16 i and columns x + 16 j of the tile.
template <typename T, int kPer>
struct Tile {
  static constexpr int kSide = 16 * kPer;
  static constexpr int kDepth = 16;
  // Sums of this many terms are kept in T, longer ones in double.
  static constexpr int kFlush = 256;

  double sum[kPer][kPer];

  static __device__ int thread_row() {
    return threadIdx.x / 16;
  }
  static __device__ int thread_column() {
    return threadIdx.x % 16;
  }

  /// Adds the terms k in [begin, end). `a(i, k)` and `b(k, j)` take absolute
  /// indices below rows, columns and end; `a` is read along k by neighbouring
  /// threads if `a_along_depth`, else along i; the same for `b`.
  template <typename Combine, typename LoadA, typename LoadB>
  __device__ void accumulate(
      int64_t row,
      int64_t column,
      int64_t rows,
      int64_t columns,
      int64_t begin,
      int64_t end,
      bool a_along_depth,
      bool b_along_depth,
      LoadA a,
      LoadB b,
      Combine combine) {
    auto& buffer = tile_buffer<T, kDepth, kSide>();
    auto& tile_a = buffer.a;
    auto& tile_b = buffer.b;
    // What each thread brings of the next depth, while this one is used.
    constexpr int kLoads = kDepth * kSide / 256;
    T next_a[kLoads];
    T next_b[kLoads];
    const auto place = [](int load, bool along_depth, int& k, int& side) {
      const int e = threadIdx.x + 256 * load;
      k = along_depth ? e % kDepth : e / kSide;
      side = along_depth ? e / kDepth : e % kSide;
    };
    const auto fetch = [&](int64_t base) {
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int k;
        int i;
        place(load, a_along_depth, k, i);
        const bool a_inside = row + i < rows && base + k < end;
        next_a[load] = a_inside ? a(row + i, base + k) : T(0);
        place(load, b_along_depth, k, i);
        const bool b_inside = column + i < columns && base + k < end;
        next_b[load] = b_inside ? b(base + k, column + i) : T(0);
      }
    };
    T part[kPer][kPer] = {};
    int pending = 0;
    fetch(begin);
    for (int64_t base = begin; base < end; base += kDepth) {
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int k;
        int i;
        place(load, a_along_depth, k, i);
        tile_a[k][i] = next_a[load];
        place(load, b_along_depth, k, i);
        tile_b[k][i] = next_b[load];
      }
      __syncthreads();
      if (base + kDepth < end) {
        fetch(base + kDepth);
      }
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        T left[kPer];
        T right[kPer];
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          left[i] = tile_a[k][thread_row() + 16 * i];
          right[i] = tile_b[k][thread_column() + 16 * i];
        }
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
#pragma unroll
          for (int j = 0; j < kPer; ++j) {
            part[i][j] = combine(part[i][j], left[i], right[j]);
          }
        }
      }
      __syncthreads();
      pending += kDepth;
      if (pending == kFlush || base + kDepth >= end) {
        pending = 0;
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
#pragma unroll
          for (int j = 0; j < kPer; ++j) {
            sum[i][j] += static_cast<double>(part[i][j]);
            part[i][j] = T(0);
          }
        }
      }
    }
  }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        sum[i][j] = 0;
      }
    }
  }

  /// Calls `store(i, j, sum)` for this thread's part of the tile.
  template <typename Store>
  __device__ void store(
      int64_t row,
      int64_t column,
      int64_t rows,
      int64_t columns,
      Store f) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int64_t r = row + thread_row() + 16 * i;
        const int64_t c = column + thread_column() + 16 * j;
        if (r < rows && c < columns) {
          f(r, c, sum[i][j]);
        }
      }
    }
  }
};

} // namespace kdci::cuda
