// SPDX-License-Identifier: Apache-2.0
//
// The subspace of the leading principal directions.
#pragma once

#include <cstdint>

#include "arena.h"
#include "covariance.h"
#include "subspace.h"

namespace kdci {

/// Finds a basis [d, q] of the subspace of `rows` [n, d] in which their
/// variance is greatest: from the smaller of the covariance X^T X and the Gram
/// matrix X X^T. Columns of the basis are orthonormal, or zero in a direction
/// without variance.
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
  bool scale_to_unit_trace();
  void orthonormalize_basis();

  int64_t n_;
  int64_t d_;
  int64_t q_;
  T* basis_; // [d, q]
  Covariance<T> covariance_;
  LeadingSubspace<T> subspace_;
  T* leading_; // [size, q]: the subspace of the matrix
};

} // namespace kdci
