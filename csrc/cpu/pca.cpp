// SPDX-License-Identifier: Apache-2.0
#include "pca.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/stable.h"
#include "simd/eigen.h"
#include "simd/gemm.h"
#include "simd/kmeans.h"

namespace kdci {
namespace {

// Iterations end when the variance that the subspace still misses is below
// this fraction of what it captures.
template <typename T>
constexpr double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-11;

// Columns iterated on beyond q: they speed up convergence, and protect against
// a start block that is nearly orthogonal to a wanted direction.
constexpr int64_t oversampling = 8;

constexpr int max_cycles = 12;
constexpr int max_degree = 16;

// Blocks of the symmetric products: only those on and above the diagonal are
// computed.
constexpr int64_t small_panel = 48;
constexpr int64_t large_panel = 192;
constexpr int64_t wide_rows = 128;

/// A fixed number in [-1, 1) for each index (the SplitMix64 generator).
double scrambled(uint64_t index) {
  uint64_t bits = (index + 1) * 0x9e3779b97f4a7c15ULL;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  bits ^= bits >> 31;
  return static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-63;
}

template <typename T>
void mirror(T* matrix, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      matrix[i * size + j] = matrix[j * size + i];
    }
  }
}

} // namespace

template <typename T>
PrincipalSubspace<T>::PrincipalSubspace(
    Arena& arena,
    int64_t n,
    int64_t d,
    int64_t q)
    : n_(n), d_(d), q_(q), size_(std::min(n, d)), gram_(n < d) {
  // A full solution takes about as long as iterations on half of the space.
  const int64_t width = (q + oversampling + 15) / 16 * 16;
  width_ = 2 * width < size_ ? width : 0;
  groups_ = gram_ || d >= wide_rows ? 1 : std::clamp<int64_t>(n / 8192, 1, 16);
  chunk_rows_ = gram_ ? n : std::min<int64_t>(n, 256);

  basis_ = arena.take<T>(d * q);
  leading_ = gram_ ? arena.take<T>(size_ * q) : basis_;
  centered_ = arena.take<T>(groups_ * chunk_rows_ * d);
  partial_ = arena.take<T>(groups_ > 1 ? groups_ * size_ * size_ : 0);
  matrix_ = arena.take<T>(size_ * size_);
  block_ = arena.take<T>(size_ * width_);
  product_ = arena.take<T>(size_ * width_);
  rotated_ = arena.take<T>(size_ * width_);
  wide_block_ = arena.take<double>(size_ * width_);
  wide_product_ = arena.take<double>(size_ * width_);
  small_gram_ = arena.take<double>(width_ * width_);
  small_ritz_ = arena.take<double>(width_ * width_);
  rotation_ = arena.take<double>(width_ * width_);
  narrow_rotation_ = arena.take<T>(width_ * width_);
  norms_ = arena.take<double>(width_);
  values_ = arena.take<double>(width_);
  work_ = arena.take<double>(4 * width_);
  kept_ = arena.take<bool>(width_);
}

template <typename T>
void PrincipalSubspace<T>::compute(const CenteredRows<T>& rows) {
  if (gram_) {
    form_gram(rows);
  } else {
    form_covariance(rows);
  }
  if (!normalize_trace()) {
    // All rows are equal: any directions will do.
    for (int64_t i = 0; i < d_ * q_; ++i) {
      basis_[i] = i / q_ == i % q_ ? 1 : 0;
    }
    return;
  }
  if (width_ == 0 || !iterate()) {
    solve_fully();
  }
  if (!gram_) {
    return;
  }
  // Directions are X^T u / |X^T u|, and |X^T u|^2 is an eigenvalue.
  gemm(d_, q_, n_, T(1), centered_, 1, d_, leading_, q_, 1, basis_, q_, false);
  std::vector<double> squares(q_);
  for (int64_t i = 0; i < d_ * q_; ++i) {
    squares[i % q_] += static_cast<double>(basis_[i]) * basis_[i];
  }
  double total = 0;
  for (double square : squares) {
    total += square;
  }
  const double negligible = 4 * std::numeric_limits<T>::epsilon() * total;
  for (int64_t i = 0; i < d_ * q_; ++i) {
    const double square = squares[i % q_];
    basis_[i] =
        square > negligible ? static_cast<T>(basis_[i] / std::sqrt(square)) : 0;
  }
}

template <typename T>
void PrincipalSubspace<T>::form_covariance(const CenteredRows<T>& rows) {
  const auto& kernels = kmeans_kernels<T>();
  const int64_t d = d_;
  if (d < wide_rows) {
    // Groups of rows are summed side by side.
    torch::stable::parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        T* centered = centered_ + group * chunk_rows_ * d;
        T* sum = groups_ > 1 ? partial_ + group * d * d : matrix_;
        const int64_t last = (group + 1) * n_ / groups_;
        int64_t start = group * n_ / groups_;
        bool accumulate = false;
        for (; start < last; start += chunk_rows_) {
          const int64_t count = std::min(chunk_rows_, last - start);
          kernels.center_rows(
              rows.data + start * d,
              count,
              d,
              rows.shift,
              rows.scale,
              centered);
          for (int64_t j = 0; j < d; j += small_panel) {
            const int64_t width = std::min(small_panel, d - j);
            gemm(
                j + width,
                width,
                count,
                T(1),
                centered,
                1,
                d,
                centered + j,
                d,
                1,
                sum + j,
                d,
                accumulate);
          }
          accumulate = true;
        }
      }
    });
    for (int64_t i = 0; groups_ > 1 && i < d * d; ++i) {
      double sum = 0;
      for (int64_t group = 0; group < groups_; ++group) {
        sum += partial_[group * d * d + i];
      }
      matrix_[i] = static_cast<T>(sum);
    }
  } else {
    // Blocks of the result are summed side by side.
    const int64_t panels = (d + large_panel - 1) / large_panel;
    for (int64_t start = 0; start < n_; start += chunk_rows_) {
      const int64_t count = std::min(chunk_rows_, n_ - start);
      torch::stable::parallel_for(
          0, count, 64, [&](int64_t begin, int64_t end) {
            kernels.center_rows(
                rows.data + (start + begin) * d,
                end - begin,
                d,
                rows.shift,
                rows.scale,
                centered_ + begin * d);
          });
      torch::stable::parallel_for(
          0, panels * panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t panel = begin; panel < end; ++panel) {
              const int64_t i = panel / panels * large_panel;
              const int64_t j = panel % panels * large_panel;
              if (i <= j) {
                gemm(
                    std::min(large_panel, d - i),
                    std::min(large_panel, d - j),
                    count,
                    T(1),
                    centered_ + i,
                    1,
                    d,
                    centered_ + j,
                    d,
                    1,
                    matrix_ + i * d + j,
                    d,
                    start > 0);
              }
            }
          });
    }
  }
  mirror(matrix_, d);
}

template <typename T>
void PrincipalSubspace<T>::form_gram(const CenteredRows<T>& rows) {
  const auto& kernels = kmeans_kernels<T>();
  const int64_t d = d_;
  torch::stable::parallel_for(0, n_, 16, [&](int64_t begin, int64_t end) {
    kernels.center_rows(
        rows.data + begin * d,
        end - begin,
        d,
        rows.shift,
        rows.scale,
        centered_ + begin * d);
  });
  const int64_t panels = (n_ + large_panel - 1) / large_panel;
  torch::stable::parallel_for(
      0, panels * panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t i = panel / panels * large_panel;
          const int64_t j = panel % panels * large_panel;
          if (i <= j) {
            gemm(
                std::min(large_panel, n_ - i),
                std::min(large_panel, n_ - j),
                d,
                T(1),
                centered_ + i * d,
                d,
                1,
                centered_ + j * d,
                1,
                d,
                matrix_ + i * n_ + j,
                n_,
                false);
          }
        }
      });
  mirror(matrix_, n_);
}

/// Divides the matrix by its trace, so that eigenvalues are shares of the
/// variance; false if there is none.
template <typename T>
bool PrincipalSubspace<T>::normalize_trace() {
  double trace = 0;
  for (int64_t i = 0; i < size_; ++i) {
    trace += matrix_[i * size_ + i];
  }
  if (!(trace > 0)) {
    return false;
  }
  const T factor = static_cast<T>(1 / trace);
  for (int64_t i = 0; i < size_ * size_; ++i) {
    matrix_[i] *= factor;
  }
  return true;
}

/// Block iterations; false if they do not converge.
template <typename T>
bool PrincipalSubspace<T>::iterate() {
  for (int64_t i = 0; i < size_ * width_; ++i) {
    block_[i] = static_cast<T>(scrambled(i));
  }
  apply();
  std::swap(block_, product_);
  orthonormalize();

  double missing = 0.1;
  double captured_before = 0;
  for (int cycle = 0; cycle < max_cycles; ++cycle) {
    apply();
    solve_ritz(cycle > 0);
    double captured = 0;
    for (int64_t j = 0; j < q_; ++j) {
      captured += values_[j];
    }
    if (cycle > 0) {
      missing = lost_variance() / captured;
      const double gain = (captured - captured_before) / captured;
      if (missing <= tolerance<T> || gain <= tolerance<T> / 8) {
        for (int64_t i = 0; i < size_; ++i) {
          std::copy_n(block_ + i * width_, q_, leading_ + i * q_);
        }
        return true;
      }
    }
    captured_before = captured;
    // A polynomial that is small on [0, cut] grows like this at the last
    // wanted value.
    const double cut =
        std::max(values_[width_ - 1], values_[0] * tolerance<T> / 8);
    const double position = std::max(2 * values_[q_ - 1] / cut - 1, 1.0);
    const double needed =
        std::acosh(std::sqrt(std::max(missing / (tolerance<T> / 16), 1.0)));
    const double degree = needed / std::max(std::acosh(position), 1e-3);
    filter(cut, static_cast<int>(std::clamp(degree, 2.0, 1.0 * max_degree)));
  }
  return false;
}

/// product = matrix * block
template <typename T>
void PrincipalSubspace<T>::apply() {
  const int64_t grain =
      std::max<int64_t>(8, (1 << 21) / (size_ * width_) / 8 * 8);
  torch::stable::parallel_for(0, size_, grain, [&](int64_t begin, int64_t end) {
    gemm(
        end - begin,
        width_,
        size_,
        T(1),
        matrix_ + begin * size_,
        size_,
        1,
        block_,
        width_,
        1,
        product_ + begin * width_,
        width_,
        false);
  });
}

/// block = p(matrix) * block for the Chebyshev polynomial p of [0, cut], given
/// product = matrix * block. The polynomial is applied root by root, and the
/// block made orthonormal in between: this changes no subspace, and keeps the
/// weak directions from drowning in the strong ones.
template <typename T>
void PrincipalSubspace<T>::filter(double cut, int degree) {
  const double spread = values_[0] / cut;
  const int stride = spread > 1000 ? 1 : spread > 30 ? 2 : 4;
  for (int step = 0; step < degree; ++step) {
    if (step > 0) {
      apply();
    }
    // Small and large roots take turns.
    const int index = step % 2 == 0 ? step / 2 : degree - 1 - step / 2;
    const double angle = 3.14159265358979323846 * (index + 0.5) / degree;
    const T root = static_cast<T>(cut * (1 + std::cos(angle)) / 2);
    for (int64_t i = 0; i < size_ * width_; ++i) {
      block_[i] = product_[i] - root * block_[i];
    }
    if ((step + 1) % stride == 0 || step + 1 == degree) {
      orthonormalize();
    }
  }
}

/// Factorizes V^T V, of columns scaled to length 1, into L L^T.
template <typename T>
void PrincipalSubspace<T>::factorize_block() {
  const int64_t w = width_;
  std::copy_n(block_, size_ * w, wide_block_);
  gemm(
      w,
      w,
      size_,
      1.0,
      wide_block_,
      1,
      w,
      wide_block_,
      w,
      1,
      small_gram_,
      w,
      false);
  for (int64_t i = 0; i < w; ++i) {
    const double square = small_gram_[i * w + i];
    norms_[i] = square > 0 ? std::sqrt(square) : 1;
  }
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      small_gram_[i * w + j] /= norms_[i] * norms_[j];
    }
  }
  eigen_kernels().cholesky(small_gram_, w, 1e-12, kept_);
}

/// block = block * rotation, with the scaling of factorize_block.
template <typename T>
void PrincipalSubspace<T>::rotate(T*& block) {
  const int64_t w = width_;
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      narrow_rotation_[i * w + j] =
          kept_[i] ? static_cast<T>(rotation_[i * w + j] / norms_[i]) : 0;
    }
  }
  gemm(
      size_,
      w,
      w,
      T(1),
      block,
      w,
      1,
      narrow_rotation_,
      w,
      1,
      rotated_,
      w,
      false);
  std::swap(block, rotated_);
}

/// Makes the columns of the block orthonormal, or zero where they depend on
/// those before them.
template <typename T>
void PrincipalSubspace<T>::orthonormalize() {
  factorize_block();
  for (int64_t i = 0; i < width_ * width_; ++i) {
    rotation_[i] = i % (width_ + 1) == 0;
  }
  eigen_kernels().solve_upper(small_gram_, width_, rotation_);
  rotate(block_);
}

/// Rayleigh-Ritz, given product = matrix * block: the eigenvalues of the
/// matrix restricted to the subspace; with `turn` the block becomes the
/// eigenvectors, and the product follows.
template <typename T>
void PrincipalSubspace<T>::solve_ritz(bool turn) {
  const auto& kernels = eigen_kernels();
  const int64_t w = width_;
  factorize_block();
  std::copy_n(product_, size_ * w, wide_product_);
  gemm(
      w,
      w,
      size_,
      1.0,
      wide_block_,
      1,
      w,
      wide_product_,
      w,
      1,
      small_ritz_,
      w,
      false);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      small_ritz_[i * w + j] = kept_[i] && kept_[j]
          ? small_ritz_[i * w + j] / (norms_[i] * norms_[j])
          : 0;
    }
  }
  // L^-1 (V^T A V) L^-T, from both sides in turn.
  kernels.solve_lower(small_gram_, w, small_ritz_);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      rotation_[i * w + j] = small_ritz_[j * w + i];
    }
  }
  kernels.solve_lower(small_gram_, w, rotation_);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      small_ritz_[i * w + j] =
          (rotation_[i * w + j] + rotation_[j * w + i]) / 2;
    }
  }
  // The eigenvectors come as rows.
  kernels.symmetric_eigen(
      small_ritz_, w, turn ? w : 0, values_, rotation_, work_);
  if (!turn) {
    return;
  }
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      std::swap(rotation_[i * w + j], rotation_[j * w + i]);
    }
  }
  kernels.solve_upper(small_gram_, w, rotation_);
  rotate(block_);
  rotate(product_);
}

/// An estimate of the variance that the q leading columns still miss: an
/// eigenvalue is off by at most |A v - value v|^2 / its gap to the rest.
template <typename T>
double PrincipalSubspace<T>::lost_variance() const {
  std::vector<double> squares(q_);
  for (int64_t i = 0; i < size_; ++i) {
    for (int64_t j = 0; j < q_; ++j) {
      const double residual = product_[i * width_ + j] -
          values_[j] * static_cast<double>(block_[i * width_ + j]);
      squares[j] += residual * residual;
    }
  }
  double lost = 0;
  for (int64_t j = 0; j < q_; ++j) {
    const double gap =
        std::max(values_[j] - values_[width_ - 1], 1e-3 * values_[j]);
    lost += gap > 0 ? squares[j] / gap : 0;
  }
  return lost;
}

template <typename T>
void PrincipalSubspace<T>::solve_fully() {
  std::vector<double> matrix(matrix_, matrix_ + size_ * size_);
  std::vector<double> vectors(size_ * size_);
  std::vector<double> values(size_);
  std::vector<double> work(4 * size_);
  eigen_kernels().symmetric_eigen(
      matrix.data(), size_, q_, values.data(), vectors.data(), work.data());
  for (int64_t i = 0; i < size_; ++i) {
    for (int64_t j = 0; j < q_; ++j) {
      leading_[i * q_ + j] = static_cast<T>(vectors[j * size_ + i]);
    }
  }
}

template class PrincipalSubspace<float>;
template class PrincipalSubspace<double>;

} // namespace kdci
