// SPDX-License-Identifier: Apache-2.0
//
// Rows of points in global and in shared memory, read by vectors of 16 bytes.
#pragma once

#include <cstdint>

#include "dictionary.h"
#include "team.cuh"

namespace kdci::cuda {

template <typename A>
struct alignas(16) Vector {
  A v[kVector<A>];
};

template <typename A>
__device__ __forceinline__ Vector<A> load_vector(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

/// Elements from one row to the next in shared memory: an odd number of
/// vectors, so that 8 neighbouring rows meet different banks.
template <typename A>
__host__ __device__ constexpr int64_t shared_stride(int64_t stride) {
  return (stride / kVector<A> | 1) * kVector<A>;
}

/// What lies at an offset of the layout.
template <typename T>
__device__ __forceinline__ T* shared_at(int offset) {
  return reinterpret_cast<T*>(dynamic_shared + offset);
}

/// Copies rows begin, begin + 1, ... or, where `which` is given, those that it
/// lists from there on, into shared memory.
template <typename A>
__device__ void copy_rows(
    const A* from,
    int64_t begin,
    const int64_t* which,
    int64_t rows,
    int64_t stride,
    A* to) {
  const int vectors = static_cast<int>(stride / kVector<A>);
  const int64_t out_stride = shared_stride<A>(stride);
  const int count = static_cast<int>(rows) * vectors;
  for (int e = threadIdx.x; e < count; e += blockDim.x) {
    const int i = e / vectors;
    const int64_t v = e % vectors * kVector<A>;
    const int64_t row = which == nullptr ? begin + i : which[begin + i];
    *reinterpret_cast<Vector<A>*>(to + i * out_stride + v) =
        load_vector(from + row * stride + v);
  }
}

/// The rows that a block of a team has to itself.
struct OwnRows {
  int64_t begin;
  int64_t end;

  __device__ OwnRows(int64_t rows, int64_t rank, int64_t size) {
    const int64_t each = ceil_div(rows, size);
    begin = each * rank < rows ? each * rank : rows;
    end = begin + each < rows ? begin + each : rows;
  }
};

} // namespace kdci::cuda
