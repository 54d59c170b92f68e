// SPDX-License-Identifier: Apache-2.0
#include "pca.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "simd/gemm.h"

namespace kdci {

template <typename T>
PrincipalSubspace<T>::PrincipalSubspace(
    Arena& arena,
    int64_t n,
    int64_t d,
    int64_t q,
    T* basis)
    : n_(n),
      d_(d),
      q_(q),
      basis_(basis),
      covariance_(arena, n, d, q),
      // Of so many rows forming the matrix takes most of the time.
      subspace_(arena, covariance_.matrix(), q, n >= 8 * d),
      leading_(covariance_.is_gram() ? arena.take<T>(n * q) : basis) {}

template <typename T>
void PrincipalSubspace<T>::compute(const CenteredRows<T>& rows) {
  covariance_.form(rows);
  if (!scale_to_unit_trace()) {
    // All rows are equal, or as good as that: any directions will do.
    for (int64_t i = 0; i < d_ * q_; ++i) {
      basis_[i] = i / q_ == i % q_ ? 1 : 0;
    }
    return;
  }
  subspace_.find(leading_);
  if (covariance_.is_gram()) {
    const T* centered = covariance_.centered();
    gemm<T>({d_, q_, n_, centered, 1, d_, leading_, q_, 1, basis_, q_, false});
    orthonormalize_basis();
  }
}

/// Eigenvalues become shares of the variance; false if there is none.
template <typename T>
bool PrincipalSubspace<T>::scale_to_unit_trace() {
  const Tiles<T>& matrix = covariance_.matrix();
  double trace = 0;
  for (int64_t i = 0; i < matrix.points; ++i) {
    trace += *matrix.at(i, i);
  }
  if (!(trace >= std::numeric_limits<T>::min())) {
    return false;
  }
  const T factor = static_cast<T>(1 / trace);
  for (int64_t i = 0; i < matrix.length; ++i) {
    matrix.data[i] *= factor;
  }
  return true;
}

/// Makes the columns X^T u of the basis orthonormal, or zero where nothing but
/// rounding is left of them. Exact eigenvectors u would give them orthogonal,
/// of a square that is the eigenvalue; a weak one contains what the rounding of
/// u leaves of the strong ones.
template <typename T>
void PrincipalSubspace<T>::orthonormalize_basis() {
  const int64_t q = q_;
  std::vector<T> products(q * q);
  gemm<T>({q, q, d_, basis_, 1, q, basis_, q, 1, products.data(), q, false});
  double total = 0;
  for (int64_t i = 0; i < q; ++i) {
    total += products[i * q + i];
  }
  const double negligible = 4 * std::numeric_limits<T>::epsilon() * total;
  std::vector<double> inverse(q);
  for (int64_t i = 0; i < q; ++i) {
    const double square = products[i * q + i];
    inverse[i] = square > negligible ? 1 / std::sqrt(square) : 0;
  }
  std::vector<double> correlations(q * q);
  std::vector<double> rotation(q * q);
  for (int64_t i = 0; i < q; ++i) {
    for (int64_t j = 0; j < q; ++j) {
      correlations[i * q + j] = products[i * q + j] * inverse[i] * inverse[j];
    }
    rotation[i * q + i] = 1;
  }
  const auto kept = std::make_unique<bool[]>(q);
  eigen_kernels().cholesky(correlations.data(), q, least_rest<T>, kept.get());
  eigen_kernels().solve_upper(correlations.data(), q, rotation.data());
  for (int64_t i = 0; i < q; ++i) {
    for (int64_t j = 0; j < q; ++j) {
      products[i * q + j] =
          kept[j] ? static_cast<T>(rotation[i * q + j] * inverse[i]) : 0;
    }
  }
  std::vector<T> rotated(tile_points * q);
  for (int64_t first = 0; first < d_; first += tile_points) {
    const int64_t count = std::min(tile_points, d_ - first);
    T* rows = basis_ + first * q;
    gemm<T>(
        {count,
         q,
         q,
         rows,
         q,
         1,
         products.data(),
         q,
         1,
         rotated.data(),
         q,
         false});
    std::copy_n(rotated.data(), count * q, rows);
  }
}

template class PrincipalSubspace<float>;
template class PrincipalSubspace<double>;

} // namespace kdci
