// SPDX-License-Identifier: Apache-2.0
//
// Small dense symmetric problems: eigenvalues and vectors, and the Cholesky
// factor of a matrix that may be singular. All matrices are row-major, [n, n]
// unless said otherwise.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

constexpr int64_t eigen_pitch(int64_t n) {
  return (n + 15) / 16 * 16;
}

constexpr int64_t eigen_work(int64_t n) {
  return (n + 8) * eigen_pitch(n) + 64 * n;
}

struct EigenKernels {
  /// Eigenvalues of the symmetric `matrix` in descending order and the
  /// `num_vectors` leading eigenvectors, as rows of `vectors` [n, n] (all of
  /// which is used if num_vectors > 0). The matrix that they diagonalize is
  /// off by at most `precision` of its norm. Destroys `matrix`; `work` has room
  /// for 4 n values.
  void (*symmetric_eigen)(
      double* matrix,
      int64_t n,
      int64_t num_vectors,
      double precision,
      double* values,
      double* vectors,
      double* work);

  /// The `num_vectors` leading eigenvectors of a symmetric matrix [n, pitch],
  /// of eigenvalues of about 1 at most, as columns of `vectors` [n, pitch];
  /// accurate to the rounding of float, relative to the largest; zero where the
  /// eigenvalue is less than 1e-6 of the largest. False if some eigenvalues are
  /// too close to tell their vectors apart.
  /// `pitch` is eigen_pitch(n), padding is zero, and `matrix` is destroyed;
  /// `work` has room for eigen_work(n) values.
  bool (*leading_eigenvectors)(
      float* matrix,
      int64_t n,
      int64_t num_vectors,
      float* vectors,
      double* work);

  /// The eigenvalues with indices ranks[0..count) in descending order, count
  /// <= 4, of such a matrix.
  void (*eigenvalues)(
      float* matrix,
      int64_t n,
      const int64_t* ranks,
      int64_t count,
      double* values,
      double* work);

  /// Overwrites the lower triangle of `gram`, of unit or zero diagonal, by its
  /// Cholesky factor L. Where a row depends on those before it, to within
  /// `tolerance`, kept[i] = false, and row and column i of L are those of the
  /// identity.
  void (*cholesky)(double* gram, int64_t n, double tolerance, bool* kept);

  /// rows [n, n] = L^-1 rows, or L^-T rows.
  void (*solve_lower)(const double* lower, int64_t n, double* rows);
  void (*solve_upper)(const double* lower, int64_t n, double* rows);
};

KDCI_DECLARE_PER_LEVEL(EigenKernels, eigen_kernels)

} // namespace kdci
