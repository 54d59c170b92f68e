// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "simd/layout.h"

namespace kdci {

/// Points in tiles (see simd/layout.h). Of a matrix the columns are the points,
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

} // namespace kdci
