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
};

/// Finds a basis [d, q] of the subspace of `rows` [n, d] in which their
/// variance is greatest. The smaller of the covariance X^T X and the Gram
/// matrix X X^T is formed; its leading subspace is found by
/// Chebyshev-accelerated subspace iteration (Rutishauser; Saad, Numerical
/// Methods for Large Eigenvalue Problems, ch. 5 and 7), or by a full
/// eigendecomposition where that is cheaper or does not converge. Columns of
/// the basis are orthonormal, or zero in a direction without variance.
template <typename T>
class PrincipalSubspace {
 public:
  PrincipalSubspace(Arena& arena, int64_t n, int64_t d, int64_t q);

  void compute(const CenteredRows<T>& rows);

  const T* basis() const { // [d, q]
    return basis_;
  }

 private:
  void form_covariance(const CenteredRows<T>& rows);
  void form_gram(const CenteredRows<T>& rows);
  bool normalize_trace();
  bool iterate();
  void solve_fully();
  void apply();
  void filter(double cut, int degree);
  void factorize_block();
  void orthonormalize();
  void solve_ritz(bool rotate);
  void rotate(T*& block);
  double lost_variance() const;

  int64_t n_;
  int64_t d_;
  int64_t q_;
  int64_t size_;  // of the symmetric matrix: min(n, d)
  int64_t width_; // columns of the block iterated on
  bool gram_;
  int64_t groups_;
  int64_t chunk_rows_;

  T* basis_;           // [d, q]
  T* leading_;         // [size, q]: the subspace of the matrix
  T* centered_;        // [groups, chunk_rows, d], or [n, d] for the Gram matrix
  T* partial_;         // [groups, size, size]
  T* matrix_;          // [size, size]
  T* block_;           // [size, width]: the subspace's basis V
  T* product_;         // [size, width]: matrix V
  T* rotated_;         // [size, width]
  double* wide_block_; // [size, width]
  double* wide_product_; // [size, width]
  double* small_gram_;   // [width, width]: V^T V
  double* small_ritz_;   // [width, width]: V^T matrix V
  double* rotation_;     // [width, width]
  T* narrow_rotation_;   // [width, width]
  double* norms_;        // [width]: of the columns of V
  double* values_;       // [width]: Ritz values, descending
  double* work_;         // [4 width]
  bool* kept_;           // [width]
};

} // namespace kdci
