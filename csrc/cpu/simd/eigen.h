// SPDX-License-Identifier: Apache-2.0
//
// Small dense symmetric problems in double: eigenvalues and vectors, and the
// Cholesky factor of a matrix that may be singular. All matrices are row-major
// [n, n].
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

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
