// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of the confounder dictionary.
//
// Points are stored in tiles of 64, coordinate by coordinate: coordinate k of
// point i is tiles[(i / 64 * depth + k) * 64 + i % 64], so that a register
// holds one coordinate of many points. The last tile is filled up with zeros.
//
// Columns (directions to project on, centres) are packed by `pack_columns` in
// groups of 6: group g is [depth][6] (the last one as wide as is left), which
// with 64 points fills the registers of AVX-512.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

constexpr int64_t tile_points = 64;
constexpr int64_t group_columns = 6;

template <typename T>
struct KmeansKernels {
  /// Adds the sums of the columns of rows [n, d] to `sum` and widens
  /// [low, high] to the columns' range. Nothing is read past `rows_end`.
  void (*column_stats)(
      const T* rows,
      int64_t n,
      int64_t d,
      const T* rows_end,
      double* sum,
      T* low,
      T* high);

  /// centered = rows * scale - shift, [n, d], rows `stride` apart.
  void (*center_rows)(
      const T* rows,
      int64_t n,
      int64_t d,
      const T* shift,
      T scale,
      T* centered,
      int64_t stride);

  /// The same for `count` <= 64 rows, as a tile [d][64]. `shift` has room for
  /// 16 values past its d.
  void (*center_tile)(
      const T* rows,
      int64_t count,
      int64_t d,
      const T* rows_end,
      const T* shift,
      T scale,
      T* tile);

  /// projected [q][64] = packed columns [depth, q] ^T * tile [depth][64], for
  /// the first `count` points of the tile and perhaps some more.
  void (*project_tile)(
      const T* tile,
      int64_t count,
      int64_t depth,
      const T* columns,
      int64_t q,
      T* projected);

  /// Rows [first, last) of X^T X for `count` <= 64 of its columns, from
  /// `column` on, as rows of a tile; X [n, d] has rows `stride` apart. They
  /// are added to the tile if it is `accumulated`.
  void (*add_products)(
      const T* rows,
      int64_t n,
      int64_t stride,
      int64_t first,
      int64_t last,
      int64_t column,
      int64_t count,
      T* tile,
      bool accumulated);

  /// products [depth, depth] = sum over all points of a_i b_j, for j <= i; the
  /// rest is left undefined. `depth` is a multiple of 4.
  void (*inner_products)(
      const T* a,
      const T* b,
      int64_t num_tiles,
      int64_t depth,
      double* products);

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

  /// Adds columns [first, last) of rows [n, d] to sums [K, d] of their
  /// clusters.
  void (*add_rows)(
      const T* rows,
      int64_t n,
      int64_t d,
      int64_t first,
      int64_t last,
      const int64_t* labels,
      double* sums);
};

KDCI_DECLARE_PER_LEVEL(KmeansKernels<float>, kmeans_kernels_float)
KDCI_DECLARE_PER_LEVEL(KmeansKernels<double>, kmeans_kernels_double)

template <typename T>
const KmeansKernels<T>& kmeans_kernels();
template <>
inline const KmeansKernels<float>& kmeans_kernels<float>() {
  return kmeans_kernels_float();
}
template <>
inline const KmeansKernels<double>& kmeans_kernels<double>() {
  return kmeans_kernels_double();
}

} // namespace kdci
