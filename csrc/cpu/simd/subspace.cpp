// SPDX-License-Identifier: Apache-2.0
#include "subspace.h"

#include "tile.h"

namespace kdci::KDCI_SIMD {
namespace {

template <typename T>
void project_tile(
    const T* tile,
    int64_t count,
    int64_t depth,
    const T* columns,
    int64_t q,
    T* projected) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(q, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int vectors = decltype(size)::value;
      constexpr int width = decltype(group)::value;
      Block<T, width, vectors> block = {};
      accumulate<false, T, width, vectors>(
          tile + i, depth, columns + first * depth, block);
      T* target = projected + first * tile_points + i;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          store(target + c * tile_points + v * lanes<T>, block[c][v]);
        }
      }
    });
  });
}

template <typename T>
void add_products(
    const T* rows,
    int64_t n,
    int64_t stride,
    int64_t first,
    int64_t last,
    int64_t column,
    int64_t count,
    T* tile,
    bool accumulated) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(
        last - first, [&](auto group, int64_t offset) KDCI_ALWAYS_INLINE {
          constexpr int vectors = decltype(size)::value;
          constexpr int width = decltype(group)::value;
          Block<T, width, vectors> block = {};
          accumulate<false, T, width, vectors>(
              rows + column + i,
              n,
              rows + first + offset,
              block,
              stride,
              stride);
          T* target = tile + (first + offset) * tile_points + i;
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              T* to = target + c * tile_points + v * lanes<T>;
              store(to, accumulated ? load(to) + block[c][v] : block[c][v]);
            }
          }
        });
  });
}

/// Sums of products of coordinates i..i+rows of `a` and j..j+columns of `b`.
template <int rows, int columns, typename T>
KDCI_INLINE void inner_block(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    double* products,
    int64_t stride) {
  Vec<T> sums[rows][columns] = {};
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t lane = 0; lane < tile_points; lane += lanes<T>) {
      const int64_t at = tile * depth * tile_points + lane;
      Vec<T> right[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        right[c] = load(b + at + c * tile_points);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const Vec<T> left = load(a + at + r * tile_points);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
          sums[r][c] += left * right[c];
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < lanes<T>; ++j) {
        sum += sums[r][c][j];
      }
      products[r * stride + c] = sum;
    }
  }
}

template <typename T>
void inner_products(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    double* products) {
  constexpr int rows = vector_bytes == 64 ? 6 : 3;
  constexpr int columns = 4;
  for (int64_t i = 0; i < depth; i += rows) {
    for (int64_t j = 0; j < i + rows; j += columns) {
      inner_block<rows, columns>(
          a + i * tile_points,
          b + j * tile_points,
          num_tiles,
          depth,
          products + i * depth + j,
          depth);
    }
  }
}

template <typename T>
constexpr SubspaceKernels<T> table = {
    project_tile<T>,
    add_products<T>,
    inner_products<T>,
};

} // namespace

extern const SubspaceKernels<float> subspace_kernels_float = table<float>;
extern const SubspaceKernels<double> subspace_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
