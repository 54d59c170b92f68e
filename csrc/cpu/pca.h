// SPDX-License-Identifier: Apache-2.0
//
// The subspace of the leading principal directions. Distances do not depend
// on the choice of a basis in it, so no eigenvector is ever computed to more
// accuracy than the variance it captures deserves.
#pragma once

#include <cstdint>

#include "arena.h"

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

/// What rows are rounded to for their covariance.
enum class Digits { floats, pairs, quads };

/// Memory for the eigenvectors of a dense matrix [n, n] of floats.
struct EigenBuffers {
  float* matrix = nullptr;  // [n, eigen_pitch(n)]
  float* vectors = nullptr; // [n, eigen_pitch(n)]
  double* work = nullptr;   // [eigen_work(n)]
};

/// Finds a basis [d, q] of the subspace of `rows` [n, d] in which their
/// variance is greatest. The smaller of the covariance X^T X and the Gram
/// matrix X X^T is formed; its leading subspace is found by a full reduction
/// where it is small, else by Chebyshev-accelerated subspace iteration
/// (Rutishauser; Saad, Numerical Methods for Large Eigenvalue Problems, ch. 5
/// and 7) until what it misses is some thousandth of the variance captured.
/// Columns of the basis are orthonormal, or zero in a direction without
/// variance.
template <typename T>
class PrincipalSubspace {
 public:
  PrincipalSubspace(
      Arena& arena,
      int64_t n,
      int64_t d,
      int64_t q,
      T* basis); // [d, q]

  /// Writes the basis.
  void compute(const CenteredRows<T>& rows);

 private:
  void form_covariance(const CenteredRows<T>& rows, Digits digits);
  void choose_units(const CenteredRows<T>& rows, Digits digits);
  bool enough_digits(Digits digits, int64_t n) const;
  double variance() const;
  void round_matrix();
  void form_gram(const CenteredRows<T>& rows);
  void mirror();
  bool iterate();
  void solve_fully();
  void orthonormalize_basis();
  void sketch();
  void apply();
  void filter(double cut, double spread, int degree);
  void factorize_block(bool precise);
  void orthonormalize(bool precise);
  void restrict_matrix();
  void rotate(int64_t count);
  void take_leading();
  int64_t tile_size(int64_t tile) const;
  T* entry(T* tiles, int64_t depth, int64_t k, int64_t point) const;

  int64_t n_;
  int64_t d_;
  int64_t q_;
  int64_t size_;      // of the symmetric matrix: min(n, d)
  int64_t num_tiles_; // of 64 columns of the matrix
  int64_t width_;     // columns of the block iterated on, or 0
  bool gram_;
  bool pairs_;
  int64_t groups_;     // of rows, summed side by side
  int64_t chunk_rows_; // centred at a time
  int64_t stride_;     // of the centred rows

  // The matrix, and blocks of vectors, are stored in tiles (see
  // simd/layout.h): their columns, or the vectors' entries, are the points.
  T* basis_;    // [d, q]
  T* leading_;  // [size, q]: the subspace of the matrix
  T* centered_; // [groups, chunk_rows, stride]
  T* partial_;  // [groups, num_tiles, size, 64]
  // Where rows are rounded to integers, for each column their unit.
  float* unit_;        // [num_tiles, 64]
  float* factor_;      // [num_tiles, 64]: 1 / unit
  int64_t* magnitude_; // [groups, num_tiles, 64]: sum of the integers' sizes
  T* matrix_;          // [num_tiles, size, 64]
  T* block_;           // [num_tiles, width, 64]: the subspace's basis V
  T* product_;         // [num_tiles, width, 64]: matrix V
  T* rotated_;         // [num_tiles, width, 64]
  T* packed_;          // a block, packed for products with the matrix
  // The same two as 16-bit integers, where there are products of these.
  uint32_t* matrix_pairs_; // [num_tiles, size / 2, 64]
  float matrix_factor_;
  float* unscale_;     // [width]
  T* packed_rotation_; // [width, width]
  double* small_gram_; // [width, width]: V^T V
  double* restricted_; // [width, width]: the matrix in the subspace of V
  double* rotation_;   // [width, width]
  double* norms_;      // [width]: of the columns of V
  bool* kept_;         // [width]
  EigenBuffers eigen_;
};

} // namespace kdci
