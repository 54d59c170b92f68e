// SPDX-License-Identifier: Apache-2.0
//
// Points in tiles (see simd/layout.h), and what passes over them share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "simd/layout.h"

namespace kdci {

/// Points in tiles. Of a matrix the columns are the points,
/// of a block of vectors their entries.
template <typename T>
struct Tiles {
  Tiles(Arena& arena, int64_t points, int64_t depth)
      : points(points),
        depth(depth),
        num_tiles((points + tile_points - 1) / tile_points),
        length(num_tiles * depth * tile_points),
        data(arena.take<T>(length)) {}

  /// [depth, 64]
  T* tile(int64_t index) const {
    return data + index * depth * tile_points;
  }

  /// Points in a tile.
  int64_t tile_size(int64_t index) const {
    return std::min(tile_points, points - index * tile_points);
  }

  /// Coordinate k of a point.
  T* at(int64_t k, int64_t point) const {
    return tile(point / tile_points) + k * tile_points + point % tile_points;
  }

  int64_t points;
  int64_t depth;
  int64_t num_tiles;
  int64_t length; // with what fills up the last tile
  T* data;        // [num_tiles, depth, 64]
};

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
