// SPDX-License-Identifier: Apache-2.0
#include "subspace.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/stable.h"
#include "simd/subspace.h"

namespace kdci {
namespace {

// Iterations end when the variance that the subspace still misses is about
// this fraction of what it captures: clusters differ by more from seed to seed.
template <typename T>
double tolerance(bool thorough) {
  return sizeof(T) == 8 ? 1e-11 : thorough ? 1e-8 : 1e-3;
}

// Off-diagonal entries that an eigendecomposition leaves. They shift its
// eigenvalues by their squares.
template <typename T>
constexpr double precision = sizeof(T) == 4 ? 1e-9 : 1.1e-16;

// What a block misses of the variance before it is filtered, at most.
constexpr double missing_at_first = 0.1;

// Matrices up to this size are reduced in full; up to the other one if it shall
// be thorough: iterations do not separate directions of nearly equal variance.
constexpr int64_t small_size = 256;
constexpr int64_t thorough_size = 1024;

constexpr double pi = 3.14159265358979323846;

// Columns of the start block that each row of the matrix is added to. One alone
// would not tell directions along axes apart that fall into the same column.
constexpr int64_t deals = 4;

constexpr int max_cycles = 12;
constexpr int max_degree = 16;

/// A number fixed for each index (the SplitMix64 generator).
uint64_t scrambled(uint64_t index) {
  uint64_t bits = (index + 1) * 0x9e3779b97f4a7c15ULL;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  return bits ^ (bits >> 31);
}

/// A Chebyshev polynomial of [0, cut] of degree m is cosh(m * growth) at value.
double growth(double value, double cut) {
  return std::max(std::acosh(std::max(2 * value / cut - 1, 1.0)), 1e-3);
}

/// The first, the q-th and the last of the eigenvalues in descending order.
struct Spectrum {
  double first;
  double wanted;
  double last;
};

template <typename T>
Spectrum spectrum(
    const double* matrix,
    int64_t n,
    int64_t q,
    const EigenBuffers& buffers) {
  if (sizeof(T) == 4) {
    const int64_t pitch = eigen_pitch(n);
    for (int64_t i = 0; i < n; ++i) {
      float* row = buffers.matrix + i * pitch;
      std::copy_n(matrix + i * n, n, row);
      std::fill(row + n, row + pitch, 0.0F);
    }
    const int64_t ranks[] = {0, q - 1, n - 1};
    double values[3];
    eigen_kernels().eigenvalues(
        buffers.matrix, n, ranks, 3, values, buffers.work);
    return {values[0], values[1], values[2]};
  }
  std::vector<double> copy(matrix, matrix + n * n);
  std::vector<double> values(n);
  std::vector<double> work(4 * n);
  eigen_kernels().symmetric_eigen(
      copy.data(), n, 0, precision<T>, values.data(), nullptr, work.data());
  return {values[0], values[q - 1], values[n - 1]};
}

/// vectors [n, q] = the leading eigenvectors of the matrix whose row i is
/// written by copy_row(i, row).
template <typename T, typename CopyRow>
void leading_vectors(
    int64_t n,
    int64_t q,
    CopyRow copy_row,
    const EigenBuffers& buffers,
    T* vectors) {
  if (sizeof(T) == 4) {
    const int64_t pitch = eigen_pitch(n);
    for (int64_t i = 0; i < n; ++i) {
      float* row = buffers.matrix + i * pitch;
      copy_row(i, row);
      std::fill(row + n, row + pitch, 0.0F);
    }
    if (eigen_kernels().leading_eigenvectors(
            buffers.matrix, n, q, buffers.vectors, buffers.work)) {
      for (int64_t i = 0; i < n; ++i) {
        std::copy_n(buffers.vectors + i * pitch, q, vectors + i * q);
      }
      return;
    }
  }
  std::vector<double> matrix(n * n);
  std::vector<double> found(n * n);
  std::vector<double> values(n);
  std::vector<double> work(4 * n);
  for (int64_t i = 0; i < n; ++i) {
    copy_row(i, matrix.data() + i * n);
  }
  eigen_kernels().symmetric_eigen(
      matrix.data(),
      n,
      q,
      precision<T>,
      values.data(),
      found.data(),
      work.data());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < q; ++j) {
      vectors[i * q + j] = static_cast<T>(found[j * n + i]);
    }
  }
}

/// Columns of the block to iterate on, or 0 for a full reduction.
int64_t block_width(int64_t size, int64_t q, bool thorough) {
  // Columns beyond q speed up convergence, and protect against a start block
  // that is nearly orthogonal to a wanted direction. A full solution takes
  // about as long as iterations on half of the space.
  const int64_t width = (q + std::max<int64_t>(16, q / 8) + 11) / 12 * 12;
  const bool reduced = size <= (thorough ? thorough_size : small_size);
  return reduced || 2 * width >= size ? 0 : width;
}

} // namespace

template <typename T>
LeadingSubspace<T>::LeadingSubspace(
    Arena& arena,
    const Tiles<T>& matrix,
    int64_t q,
    bool thorough)
    : matrix_(matrix),
      size_(matrix.points),
      q_(q),
      thorough_(thorough),
      width_(block_width(size_, q, thorough)),
      pairs_(has_integer_kernels<T>()),
      block_(arena, size_, width_),
      product_(arena, size_, width_),
      rotated_(arena, size_, width_),
      packed_(arena.take<T>(size_ * width_)),
      matrix_pairs_(arena, size_, pairs_ && width_ > 0 ? (size_ + 1) / 2 : 0),
      unscale_(arena.take<float>(width_)),
      packed_rotation_(arena.take<T>(width_ * width_)),
      small_gram_(arena.take<double>(width_ * width_)),
      restricted_(arena.take<double>(width_ * width_)),
      rotation_(arena.take<double>(width_ * width_)),
      norms_(arena.take<double>(width_)),
      kept_(arena.take<bool>(width_)) {
  if (sizeof(T) == 4) {
    const int64_t dense = width_ > 0 ? width_ : size_;
    eigen_.matrix = arena.take<float>(dense * eigen_pitch(dense));
    eigen_.vectors = arena.take<float>(dense * eigen_pitch(dense));
    eigen_.work = arena.take<double>(eigen_work(dense));
  }
}

template <typename T>
void LeadingSubspace<T>::find(T* leading) {
  if (width_ == 0 || !iterate(leading)) {
    solve_fully(leading);
  }
}

/// Block iterations; false if they do not converge.
template <typename T>
bool LeadingSubspace<T>::iterate(T* leading) {
  if (pairs_) {
    round_matrix();
  }
  sketch();
  orthonormalize(true);
  const double enough = tolerance<T>(thorough_);
  double missing = missing_at_first;
  for (int cycle = 0; cycle < max_cycles; ++cycle) {
    apply();
    restrict_matrix();
    // A polynomial that is small on [0, cut] grows like this at the last
    // wanted value.
    const Spectrum start = spectrum<T>(restricted_, width_, q_, eigen_);
    if (!(start.first > 0)) {
      return false; // the sketch's signs cancelled
    }
    const double cut = std::max(start.last, start.first * 1e-6);
    const double needed = std::acosh(std::sqrt(missing / enough));
    const double degree = std::clamp(
        std::ceil(needed / growth(start.wanted, cut)), 2.0, 1.0 * max_degree);
    filter(cut, start.first / cut, static_cast<int>(degree));
    apply();
    restrict_matrix();
    const Spectrum end = spectrum<T>(restricted_, width_, q_, eigen_);
    const double grown = std::cosh(degree * growth(end.wanted, cut));
    missing /= grown * grown;
    if (missing <= 4 * enough) {
      take_leading(leading);
      return true;
    }
  }
  return false;
}

/// block = matrix * a matrix of few random signs in each row: a start that is
/// nearly as good as a product with random numbers, for the price of a few
/// sums.
template <typename T>
void LeadingSubspace<T>::sketch() {
  // As many rows for each column, in no order that data may have.
  std::vector<int64_t> columns(size_ * deals);
  std::vector<uint64_t> signs(size_);
  for (int64_t deal = 0; deal < deals; ++deal) {
    int64_t* column = columns.data() + deal;
    for (int64_t k = 0; k < size_; ++k) {
      const uint64_t other = scrambled(deal * size_ + k) % (k + 1);
      column[k * deals] = k % width_;
      std::swap(column[k * deals], column[other * deals]);
    }
  }
  for (int64_t k = 0; k < size_; ++k) {
    signs[k] = scrambled(deals * size_ + k);
  }
  // The points that fill up the last tile stay zeros for ever.
  for (const Tiles<T>* block : {&block_, &product_, &rotated_}) {
    std::fill_n(block->data, block->length, T(0));
  }
  for (int64_t tile = 0; tile < matrix_.num_tiles; ++tile) {
    subspace_kernels<T>().deal_rows(
        matrix_.tile(tile),
        size_,
        columns.data(),
        signs.data(),
        deals,
        block_.tile(tile));
  }
}

/// matrix_pairs = matrix, scaled so that rows are no longer than 2^15.
template <typename T>
void LeadingSubspace<T>::round_matrix() {
  double longest = 0;
  for (int64_t tile = 0; tile < matrix_.num_tiles; ++tile) {
    T squares[tile_points] = {};
    for (int64_t k = 0; k < size_; ++k) {
      const T* row = matrix_.tile(tile) + k * tile_points;
      for (int64_t i = 0; i < tile_points; ++i) {
        squares[i] += row[i] * row[i];
      }
    }
    longest = std::max<double>(
        longest, *std::max_element(squares, squares + tile_points));
  }
  matrix_factor_ = static_cast<float>(32000 / std::sqrt(longest));
  if constexpr (sizeof(T) == 4) {
    for (int64_t tile = 0; tile < matrix_.num_tiles; ++tile) {
      integer_kernels().round_tile(
          matrix_.tile(tile), size_, matrix_factor_, matrix_pairs_.tile(tile));
    }
  }
}

/// product = matrix * block
template <typename T>
void LeadingSubspace<T>::apply() {
  const int64_t grain =
      std::max<int64_t>(1, (1 << 21) / (tile_points * size_ * width_));
  if constexpr (sizeof(T) == 4) {
    if (pairs_) {
      auto* packed = reinterpret_cast<uint32_t*>(packed_);
      integer_kernels().pack_block(
          block_.data, matrix_.num_tiles, width_, size_, packed, unscale_);
      torch::stable::parallel_for(
          0, matrix_.num_tiles, grain, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile) {
              integer_kernels().project_tile(
                  matrix_pairs_.tile(tile),
                  matrix_.tile_size(tile),
                  size_,
                  packed,
                  width_,
                  1 / matrix_factor_,
                  unscale_,
                  product_.tile(tile));
            }
          });
      return;
    }
  }
  T* packed = packed_;
  for (int64_t first = 0; first < width_; first += group_columns) {
    const int64_t columns = std::min(group_columns, width_ - first);
    for (int64_t i = 0; i < size_; ++i) {
      const T* from = block_.at(first, i);
      for (int64_t c = 0; c < columns; ++c) {
        *packed++ = from[c * tile_points];
      }
    }
  }
  torch::stable::parallel_for(
      0, matrix_.num_tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          subspace_kernels<T>().project_tile(
              matrix_.tile(tile),
              matrix_.tile_size(tile),
              size_,
              packed_,
              width_,
              product_.tile(tile));
        }
      });
}

/// block = p(matrix) * block for the Chebyshev polynomial p of [0, cut], given
/// product = matrix * block. The polynomial is applied root by root, and the
/// block made orthonormal in between: this changes no subspace, and keeps the
/// weak directions from drowning in the strong ones, which grow `spread` times
/// faster a step.
template <typename T>
void LeadingSubspace<T>::filter(double cut, double spread, int degree) {
  // What drowns is what falls below the rounding of a column.
  const double depth = pairs_ ? 1.6e3 : 2e3;
  const int period = static_cast<int>(
      std::clamp(std::log(depth) / std::log(std::max(spread, 1.01)), 1.0, 4.0));
  for (int step = 0; step < degree; ++step) {
    if (step > 0) {
      apply();
    }
    // Small and large roots take turns.
    const int index = step % 2 == 0 ? step / 2 : degree - 1 - step / 2;
    const double angle = pi * (index + 0.5) / degree;
    const T root = static_cast<T>(cut * (1 + std::cos(angle)) / 2);
    for (int64_t i = 0; i < block_.length; ++i) {
      block_.data[i] = product_.data[i] - root * block_.data[i];
    }
    if ((step + 1) % period == 0 || step + 1 == degree) {
      orthonormalize(false);
    }
  }
}

/// Factorizes V^T V, of columns scaled to length 1, into L L^T; `precise` where
/// columns may be nearly parallel.
template <typename T>
void LeadingSubspace<T>::factorize_block(bool precise) {
  const int64_t w = width_;
  subspace_kernels<T>().inner_products(
      block_.data, block_.data, matrix_.num_tiles, w, precise, small_gram_);
  for (int64_t i = 0; i < w; ++i) {
    const double square = small_gram_[i * w + i];
    norms_[i] = square > 0 ? std::sqrt(square) : 1;
  }
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      small_gram_[i * w + j] /= norms_[i] * norms_[j];
    }
  }
  eigen_kernels().cholesky(
      small_gram_, w, precise ? least_rest<double> : least_rest<T>, kept_);
}

/// rotated = block * the first `count` columns of rotation_, with the scaling
/// of factorize_block.
template <typename T>
void LeadingSubspace<T>::rotate(int64_t count) {
  const int64_t w = width_;
  T* packed = packed_rotation_;
  for (int64_t first = 0; first < count; first += group_columns) {
    const int64_t columns = std::min(group_columns, count - first);
    for (int64_t i = 0; i < w; ++i) {
      const double factor = kept_[i] ? 1 / norms_[i] : 0;
      for (int64_t c = 0; c < columns; ++c) {
        *packed++ = static_cast<T>(rotation_[i * w + first + c] * factor);
      }
    }
  }
  torch::stable::parallel_for(
      0, matrix_.num_tiles, 4, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          subspace_kernels<T>().project_tile(
              block_.tile(tile),
              matrix_.tile_size(tile),
              w,
              packed_rotation_,
              count,
              rotated_.tile(tile));
        }
      });
}

/// Makes the columns of the block orthonormal, or zero where they depend on
/// those before them.
template <typename T>
void LeadingSubspace<T>::orthonormalize(bool precise) {
  factorize_block(precise);
  for (int64_t i = 0; i < width_ * width_; ++i) {
    rotation_[i] = i % (width_ + 1) == 0;
  }
  eigen_kernels().solve_upper(small_gram_, width_, rotation_);
  rotate(width_);
  std::swap(block_, rotated_);
}

/// The matrix restricted to the block's subspace, in an orthonormal basis:
/// L^-1 (V^T A V) L^-T, given product = matrix * block.
template <typename T>
void LeadingSubspace<T>::restrict_matrix() {
  const auto& kernels = eigen_kernels();
  const int64_t w = width_;
  factorize_block(false);
  subspace_kernels<T>().inner_products(
      block_.data, product_.data, matrix_.num_tiles, w, false, restricted_);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double entry = kept_[i] && kept_[j]
          ? restricted_[i * w + j] / (norms_[i] * norms_[j])
          : 0;
      restricted_[i * w + j] = entry;
      restricted_[j * w + i] = entry;
    }
  }
  // From both sides in turn.
  kernels.solve_lower(small_gram_, w, restricted_);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      rotation_[i * w + j] = restricted_[j * w + i];
    }
  }
  kernels.solve_lower(small_gram_, w, rotation_);
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      restricted_[i * w + j] =
          (rotation_[i * w + j] + rotation_[j * w + i]) / 2;
    }
  }
}

/// leading = the best q directions of the block's subspace (Rayleigh-Ritz),
/// given restricted = matrix in that subspace.
template <typename T>
void LeadingSubspace<T>::take_leading(T* leading) {
  const int64_t w = width_;
  std::vector<T> vectors(w * q_);
  leading_vectors<T>(
      w,
      q_,
      [&](int64_t i, auto* row) { std::copy_n(restricted_ + i * w, w, row); },
      eigen_,
      vectors.data());
  for (int64_t i = 0; i < w; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      rotation_[i * w + j] = j < q_ ? vectors[i * q_ + j] : 0;
    }
  }
  eigen_kernels().solve_upper(small_gram_, w, rotation_);
  rotate(q_);
  for (int64_t i = 0; i < size_; ++i) {
    for (int64_t j = 0; j < q_; ++j) {
      leading[i * q_ + j] = *rotated_.at(j, i);
    }
  }
}

template <typename T>
void LeadingSubspace<T>::solve_fully(T* leading) {
  EigenBuffers buffers = eigen_;
  std::vector<float> dense;
  std::vector<double> work;
  if (width_ > 0) {
    // Those at hand are for the block that failed: this is rare.
    const int64_t length = size_ * eigen_pitch(size_);
    dense.resize(2 * length);
    work.resize(eigen_work(size_));
    buffers = {dense.data(), dense.data() + length, work.data()};
  }
  leading_vectors<T>(
      size_,
      q_,
      [&](int64_t i, auto* row) {
        for (int64_t tile = 0; tile < matrix_.num_tiles; ++tile) {
          const int64_t first = tile * tile_points;
          std::copy_n(
              matrix_.at(i, first), matrix_.tile_size(tile), row + first);
        }
      },
      buffers,
      leading);
}

template class LeadingSubspace<float>;
template class LeadingSubspace<double>;

} // namespace kdci
