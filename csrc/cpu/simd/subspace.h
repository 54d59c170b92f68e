// SPDX-License-Identifier: Apache-2.0
//
// Products of tiles, for the covariance, its subspace and the projection.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

/// Products of rows of integers, several of which lie in a 32-bit word.
struct WordKernels {
  int64_t rows_of_word;

  /// words [ceil(n / rows_of_word), stride] = (rows * scale - shift) * factor,
  /// with a factor [d] for each column.
  void (*center)(
      const float* rows,
      int64_t n,
      int64_t d,
      const float* shift,
      float scale,
      const float* factor,
      uint32_t* words,
      int64_t stride);

  /// Adds the magnitudes of n rows in words to sums [d]. Words and sums up to
  /// the next multiple of 64 columns are read and written.
  void (*add_magnitudes)(
      const uint32_t* words,
      int64_t n,
      int64_t stride,
      int64_t d,
      int64_t* sums);

  /// As SubspaceKernels::add_products, of rows in words; sums are multiplied
  /// by the units [d] of their two columns. Units and words up to the next
  /// multiple of 64 columns are read.
  void (*add_products)(
      const uint32_t* words,
      int64_t n,
      int64_t stride,
      int64_t first,
      int64_t last,
      int64_t column,
      int64_t count,
      const float* unit,
      float* tile,
      bool accumulated);
};

/// Products of 16-bit integers, twice as fast as those of floats and accurate
/// enough for a covariance and for steps towards its subspace, or of 8-bit
/// integers, twice as fast again. Numbers are scaled so that no sum of products
/// exceeds 2^31; two or four of the summed-over dimension lie in a 32-bit word.
/// The functions are null unless has_integer_kernels().
struct IntegerKernels {
  WordKernels pairs;
  WordKernels quads;

  /// pairs [(depth + 1) / 2][64] of a tile [depth][64], times `factor`.
  void (*round_tile)(
      const float* tile,
      int64_t depth,
      float factor,
      uint32_t* pairs);

  /// Packs the columns of a block [num_tiles][width][64], of which `size`
  /// points exist: group g is [(size + 1) / 2][6] pairs. Columns are scaled to
  /// the length 32000; unscale[c] undoes it.
  void (*pack_block)(
      const float* block,
      int64_t num_tiles,
      int64_t width,
      int64_t size,
      uint32_t* pairs,
      float* unscale);

  /// As SubspaceKernels::project_tile; column c of the result is multiplied by
  /// factor * unscale[c].
  void (*project_tile)(
      const uint32_t* tile,
      int64_t count,
      int64_t depth,
      const uint32_t* columns,
      int64_t q,
      float factor,
      const float* unscale,
      float* projected);
};

KDCI_DECLARE_PER_LEVEL(IntegerKernels, integer_kernels)

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

  /// Adds row k of a tile [depth][64] to rows columns[k][0 .. deals) of a block
  /// [width][64], with a sign: that of bit j of signs[k] for the j-th.
  void (*deal_rows)(
      const T* tile,
      int64_t depth,
      const int64_t* columns,
      const uint64_t* signs,
      int64_t deals,
      T* block);

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
  /// rest is left undefined. `depth` is a multiple of 12. Sums are made in
  /// double if `precise`.
  void (*inner_products)(
      const T* a,
      const T* b,
      int64_t num_tiles,
      int64_t depth,
      bool precise,
      double* products);
};

KDCI_DECLARE_PER_TYPE(SubspaceKernels, subspace_kernels)

} // namespace kdci
