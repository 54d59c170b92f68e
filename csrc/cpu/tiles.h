// SPDX-License-Identifier: Apache-2.0
//
// What passes over points in tiles share (see simd/layout.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd/layout.h"

namespace kdci {

/// Copies the columns of matrix [depth, count] into groups of 6 columns; a
/// group takes depth * 6 values, the last one depth * (as many as are left).
template <typename T>
void pack_columns(const T* matrix, int64_t depth, int64_t count, T* columns) {
  for (int64_t first = 0; first < count; first += group_columns) {
    const int64_t width = std::min(group_columns, count - first);
    for (int64_t k = 0; k < depth; ++k) {
      std::copy_n(matrix + k * count + first, width, columns);
      columns += width;
    }
  }
}

/// Copies a point out of tiles; its coordinates become `stride` apart.
template <typename T>
void copy_point(
    const T* tiles,
    int64_t depth,
    int64_t row,
    T* point,
    int64_t stride) {
  const T* from =
      tiles + row / tile_points * depth * tile_points + row % tile_points;
  for (int64_t k = 0; k < depth; ++k) {
    point[k * stride] = from[k * tile_points];
  }
}

/// Tiles per thread at least, for a pass that multiplies every point with
/// `columns` columns: some 20 us of work.
inline int64_t tile_grain(int64_t depth, int64_t columns) {
  return std::max<int64_t>(
      1, (1 << 21) / (tile_points * depth * std::max<int64_t>(columns, 1)));
}

} // namespace kdci
