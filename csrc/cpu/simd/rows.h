// SPDX-License-Identifier: Apache-2.0
//
// Passes over the rows of features: statistics, centring, sums.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

template <typename T>
struct RowsKernels {
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

  /// The same for `count` <= 64 rows, as a tile [d][64]: those of the numbers
  /// index[count], or the first ones if it is null. `shift` has room for 16
  /// values past its d.
  void (*center_tile)(
      const T* rows,
      const int64_t* index,
      int64_t count,
      int64_t d,
      const T* rows_end,
      const T* shift,
      T scale,
      T* tile);

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

KDCI_DECLARE_PER_TYPE(RowsKernels, rows_kernels)

} // namespace kdci
