// SPDX-License-Identifier: Apache-2.0
//
// Products of tiles, for the covariance, its subspace and the projection.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

template <typename T>
struct SubspaceKernels {
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
  /// rest is left undefined. `depth` is a multiple of
  /// 12.
  void (*inner_products)(
      const T* a,
      const T* b,
      int64_t num_tiles,
      int64_t depth,
      double* products);
};

KDCI_DECLARE_PER_TYPE(SubspaceKernels, subspace_kernels)

} // namespace kdci
