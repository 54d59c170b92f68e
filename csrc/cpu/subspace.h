// SPDX-License-Identifier: Apache-2.0
//
// The leading subspace of a symmetric matrix. Distances do not depend on the
// choice of a basis in it, so no eigenvector is ever computed to more accuracy
// than the variance it captures deserves.
#pragma once

#include <cstdint>

#include "arena.h"
#include "simd/eigen.h"
#include "tiles.h"

namespace kdci {

/// What must be left of the square of a column once its part along those before
/// it is removed: more than the rounding of their products.
template <typename T>
constexpr double least_rest = sizeof(T) == 4 ? 1e-6 : 1e-12;

/// Memory for the eigenvectors of a dense matrix [n, n] of floats.
struct EigenBuffers {
  float* matrix = nullptr;  // [n, eigen_pitch(n)]
  float* vectors = nullptr; // [n, eigen_pitch(n)]
  double* work = nullptr;   // [eigen_work(n)]
};

/// The subspace of the q leading eigenvectors of a symmetric matrix
/// [size, size] without negative eigenvalues, which sum to 1. It is found by a
/// full reduction where the matrix is small, else by Chebyshev-accelerated
/// subspace iteration (Rutishauser; Saad, Numerical Methods for Large
/// Eigenvalue Problems, ch. 5 and 7) until what it misses is some thousandth of
/// the sum captured, or next to nothing if it shall be `thorough`.
template <typename T>
class LeadingSubspace {
 public:
  LeadingSubspace(
      Arena& arena,
      const Tiles<T>& matrix,
      int64_t q,
      bool thorough);

  /// Writes a basis: leading [size, q].
  void find(T* leading);

 private:
  bool iterate(T* leading);
  void round_matrix();
  void sketch();
  void apply();
  void filter(double cut, double spread, int degree);
  void factorize_block(bool precise);
  void rotate(int64_t count);
  void orthonormalize(bool precise);
  void restrict_matrix();
  void take_leading(T* leading);
  void solve_fully(T* leading);

  Tiles<T> matrix_;
  int64_t size_;
  int64_t q_;
  bool thorough_;
  int64_t width_; // columns of the block iterated on, or 0
  bool pairs_;
  Tiles<T> block_;   // [size, width]: the subspace's basis V
  Tiles<T> product_; // [size, width]: matrix V
  Tiles<T> rotated_; // [size, width]
  T* packed_;        // a block, packed for products with the matrix
  // The same two as 16-bit integers, where there are products of these.
  Tiles<uint32_t> matrix_pairs_; // [size, (size + 1) / 2]
  float matrix_factor_ = 0;
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
