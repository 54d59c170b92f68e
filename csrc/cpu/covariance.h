// SPDX-License-Identifier: Apache-2.0
//
// The symmetric matrix whose eigenvectors are the principal directions of rows.
#pragma once

#include <cstdint>

#include "arena.h"
#include "simd/subspace.h"
#include "tiles.h"

namespace kdci {

/// Rows [n, d] read as data * scale - shift, which centres them.
template <typename T>
struct CenteredRows {
  const T* data;
  int64_t n;
  int64_t d;
  const T* shift; // [d], with room for 16 values more
  T scale;
  const T* extent; // [d], the largest of each column, without its sign
};

/// How rows are rounded to integers.
struct Rounding;

/// The covariance X^T X of centred rows X [n, d] or, where n < d, their Gram
/// matrix X X^T. The products of a covariance are those of rows rounded to
/// integers where this hardly changes its `q` leading directions.
template <typename T>
class Covariance {
 public:
  Covariance(Arena& arena, int64_t n, int64_t d, int64_t q);

  /// Writes the matrix.
  void form(const CenteredRows<T>& rows);

  bool is_gram() const {
    return n_ < d_;
  }

  /// [size, size]: size = min(n, d).
  const Tiles<T>& matrix() const {
    return matrix_;
  }

  /// X [n, d], of a Gram matrix.
  const T* centered() const {
    return centered_;
  }

 private:
  void form_gram(const CenteredRows<T>& rows);
  void form_covariance(const CenteredRows<T>& rows, const Rounding* rounding);
  const Rounding* form_until_enough(
      const CenteredRows<T>& rows,
      const Rounding* rounding);
  bool enough_digits(const Rounding& rounding, int64_t n) const;
  void choose_units(const CenteredRows<T>& rows, float largest);
  void form_by_rows(const CenteredRows<T>& rows, int64_t chunk_rows);
  void form_by_tiles(const CenteredRows<T>& rows, int64_t chunk_rows);
  void center(
      const CenteredRows<T>& rows,
      int64_t first,
      int64_t count,
      T* chunk,
      int64_t at) const;
  void add_magnitudes(const T* chunk, int64_t count, int64_t group);
  void add_products(
      const T* chunk,
      int64_t count,
      int64_t first,
      int64_t last,
      int64_t tile,
      T* sums,
      bool accumulated) const;
  int64_t last_row(int64_t tile) const;
  void complete();

  int64_t n_;
  int64_t d_;
  int64_t q_;
  int64_t groups_;     // of rows, summed side by side
  int64_t chunk_rows_; // centred at a time
  Tiles<T> matrix_;
  int64_t padded_; // columns, with those that fill up the last tile
  int64_t stride_; // of the centred rows
  T* centered_;    // [groups, chunk_rows, stride]
  T* partial_;     // [groups, num_tiles, size, 64]
  // Where rows are rounded to integers, for each column their unit.
  const WordKernels* words_ = nullptr; // null where they are not
  float* unit_;                        // [padded]
  float* factor_;                      // [padded]: 1 / unit
  int64_t* magnitude_; // [groups, padded]: sum of the integers' sizes
};

} // namespace kdci
