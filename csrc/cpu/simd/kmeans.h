// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of Lloyd's iterations.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

/// A pass of assignment, over all tiles.
///
/// The slack of a point is a lower bound of how much nearer its own centre is
/// than any other. Centres that move use it up (Hamerly, SDM 2010); a point
/// that has some left keeps its label unseen.
template <typename T>
struct Assignment {
  const T* tiles; // [num_tiles, depth, 64]
  int64_t n;
  int64_t depth;
  int64_t num_centers;
  const T* columns; // packed centres c
  // |c|^2 / 2 - x.c is compared first, in half the time of squared differences.
  // Where `bias` is null these are compared at once, and there is no slack.
  const T* bias; // [K]: |c|^2 / 2
  // Or null: -c * pair_scale rounded to 16-bit integers, packed in pairs of
  // coordinates 2k, 2k + 1; lengths are at most 2^15 then.
  const uint32_t* pairs; // [(depth + 1) / 2, K]
  float pair_scale;
  int32_t column_bits; // 2^m - 1 >= K - 1: all bits that a column's index has
  T largest_center;    // |c| at most
  const T* drift;      // [K]: of a point's slack, by label; null at first
  T* slack;            // [num_tiles * 64]
  int64_t* labels;     // [n], -1 at first
  // What labels that change add to the sums of the clusters' points, times
  // sum_scale and rounded, and to their sizes: integers, so that the order of
  // the points does not matter. May be null.
  int64_t* sums;   // [K, depth]
  int64_t* counts; // [K]
  double sum_scale;
};

template <typename T>
struct KmeansKernels {
  /// Sum of the squares of a tile's values.
  double (*square_sum)(const T* tile, int64_t depth);

  /// Assigns the points of tiles [begin, end) to their nearest centres, ties to
  /// the lowest index, and returns how many labels changed. `scratch` has room
  /// for assign_scratch(depth, K) values; it is not used without a bias.
  int64_t (*assign_scratch)(int64_t depth, int64_t num_centers);
  int64_t (*assign_tiles)(
      const Assignment<T>& task,
      int64_t begin,
      int64_t end,
      T* scratch);

  /// Squared distances of the points of tiles [begin, end) to their own
  /// centres [depth, K], from differences; and each tile's sum.
  void (*own_distances)(
      const T* tiles,
      int64_t depth,
      int64_t begin,
      int64_t end,
      int64_t n,
      const T* centers,
      int64_t num_centers,
      const int64_t* labels,
      T* distances,
      double* sums);
};

KDCI_DECLARE_PER_TYPE(KmeansKernels, kmeans_kernels)

} // namespace kdci
