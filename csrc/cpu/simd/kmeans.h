// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of k-means++ and Lloyd's iterations.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

template <typename T>
struct KmeansKernels {
  /// Sum of the squares of a tile's values.
  double (*square_sum)(const T* tile, int64_t depth);

  /// One round of k-means++ over tiles [begin, end). Lowers nearest[i], the
  /// squared distance of point i to the chosen centres, by the centre `chosen`
  /// [depth] unless it is null; then writes for each tile the potentials
  /// sums[tile * candidates + c] that the packed candidates would leave, or
  /// with candidates = 0 the potential sums[tile] itself.
  void (*seed_tiles)(
      const T* tiles,
      int64_t depth,
      int64_t begin,
      int64_t end,
      T* nearest,
      const T* chosen,
      const T* columns,
      int64_t candidates,
      double* sums);

  /// Assigns the points of tiles [begin, end) to their nearest centres (ties:
  /// the lowest index). Where `bias` is null the columns are the centres;
  /// else they are -c and bias = |c|^2 / 2, and bias - x.c is compared, in half
  /// the time but blind to differences that rounding of the products hides.
  /// Old labels go to `previous`; bit i of moved[tile] says that point i
  /// changed.
  void (*assign_tiles)(
      const T* tiles,
      int64_t depth,
      int64_t begin,
      int64_t end,
      int64_t n,
      const T* columns,
      const T* bias,
      int64_t num_centers,
      int64_t* labels,
      int32_t* previous,
      uint64_t* moved);

  /// Adds coordinates [first, last) of all n points to sums [depth, K] of
  /// their clusters.
  void (*add_points)(
      const T* tiles,
      int64_t depth,
      int64_t first,
      int64_t last,
      int64_t n,
      const int64_t* labels,
      int64_t num_centers,
      double* sums);

  /// Carries the moved points' coordinates [first, last) over to their new
  /// clusters.
  void (*move_points)(
      const T* tiles,
      int64_t depth,
      int64_t first,
      int64_t last,
      int64_t n,
      const int64_t* labels,
      const int32_t* previous,
      const uint64_t* moved,
      int64_t num_centers,
      double* sums);

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
