// SPDX-License-Identifier: Apache-2.0
#include "pca.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../common/stable.h"
#include "simd/eigen.h"
#include "simd/gemm.h"
#include "simd/rows.h"
#include "simd/subspace.h"

namespace kdci {
namespace {

// Iterations end when the variance that the subspace still misses is about
// this fraction of what it captures: clusters differ by more from seed to seed.
// Where there are so many rows that forming the matrix takes most of the time,
// more iterations cost nothing.
template <typename T>
double tolerance(int64_t n, int64_t d) {
  return sizeof(T) == 8 ? 1e-11 : n >= 8 * d ? 1e-8 : 1e-3;
}

// Off-diagonal entries that an eigendecomposition leaves. They shift its
// eigenvalues by their squares.
template <typename T>
constexpr double precision = sizeof(T) == 4 ? 1e-9 : 1.1e-16;

// What a block misses of the variance before it is filtered, at most.
constexpr double missing_at_first = 0.1;

// Matrices up to this size are reduced in full; up to the other one where there
// are so many rows that forming the matrix takes most of the time: iterations
// do not separate directions of nearly equal variance.
constexpr int64_t small_size = 256;
constexpr int64_t many_rows_size = 1024;

// Rows rounded to integers, the largest of each column to this one, so many at
// a time that no sum of products exceeds 2^30. For few values it does not pay.
constexpr int64_t integer_values = 1 << 14;
constexpr int64_t pair_rows = 128;
constexpr float pair_largest = 2800;
constexpr double pair_magnitude = 20;

// To bytes where products take more time than the rounding.
constexpr int64_t quad_columns = 64;
constexpr int64_t quad_rows = 256;
constexpr float quad_largest = 127;
constexpr double quad_magnitude = 6;
constexpr double quad_loss = 2e-4;

// With many rows the digits are tried on some of them first.
constexpr int64_t trial_rows = 256;

// What must be left of the square of a column once its part along those before
// it is removed: more than the rounding of their products.
template <typename T>
constexpr double least_rest = sizeof(T) == 4 ? 1e-6 : 1e-12;

constexpr double pi = 3.14159265358979323846;

constexpr int max_cycles = 12;
constexpr int max_degree = 16;

// From this width on the matrix is shared out between threads, not the rows.
constexpr int64_t wide_rows = 128;

// Values that a cache line holds, of 32 bits each.
constexpr int64_t line_values = 16;

// Rows of a tile of the matrix that one task computes: whole groups.
constexpr int64_t task_rows = 16 * group_columns;

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

} // namespace

template <typename T>
PrincipalSubspace<T>::PrincipalSubspace(
    Arena& arena,
    int64_t n,
    int64_t d,
    int64_t q,
    T* basis)
    : n_(n), d_(d), q_(q), size_(std::min(n, d)), gram_(n < d), basis_(basis) {
  num_tiles_ = (size_ + tile_points - 1) / tile_points;
  // Columns beyond q speed up convergence, and protect against a start block
  // that is nearly orthogonal to a wanted direction. A full solution takes
  // about as long as iterations on half of the space.
  const int64_t width = (q + std::max<int64_t>(16, q / 8) + 11) / 12 * 12;
  const bool reduced = size_ <= (n >= 8 * d ? many_rows_size : small_size);
  width_ = reduced || 2 * width >= size_ ? 0 : width;
  groups_ = gram_ || d >= wide_rows ? 1 : std::clamp<int64_t>(n / 8192, 1, 16);
  chunk_rows_ = gram_ ? n : std::min<int64_t>(n, 256);
  // Floats: an odd number of lines, as rows a power of two apart evict others.
  stride_ = gram_ ? d : num_tiles_ * tile_points + line_values;

  const int64_t matrix = num_tiles_ * size_ * tile_points;
  const int64_t block = num_tiles_ * width_ * tile_points;
  leading_ = gram_ ? arena.take<T>(size_ * q) : basis_;
  centered_ = arena.take<T>(groups_ * chunk_rows_ * stride_);
  partial_ = arena.take<T>(groups_ > 1 ? groups_ * matrix : 0);
  matrix_ = arena.take<T>(matrix);
  unit_ = arena.take<float>(num_tiles_ * tile_points);
  factor_ = arena.take<float>(num_tiles_ * tile_points);
  magnitude_ = arena.take<int64_t>(groups_ * num_tiles_ * tile_points);
  pairs_ = has_integer_kernels<T>();
  matrix_pairs_ = arena.take<uint32_t>(
      pairs_ && width_ > 0 ? num_tiles_ * ((size_ + 1) / 2) * tile_points : 0);
  unscale_ = arena.take<float>(width_);
  block_ = arena.take<T>(block);
  product_ = arena.take<T>(block);
  rotated_ = arena.take<T>(block);
  packed_ = arena.take<T>(size_ * width_);
  packed_rotation_ = arena.take<T>(width_ * width_);
  small_gram_ = arena.take<double>(width_ * width_);
  restricted_ = arena.take<double>(width_ * width_);
  rotation_ = arena.take<double>(width_ * width_);
  norms_ = arena.take<double>(width_);
  kept_ = arena.take<bool>(width_);
  if (sizeof(T) == 4) {
    const int64_t dense = width_ > 0 ? width_ : size_;
    eigen_.matrix = arena.take<float>(dense * eigen_pitch(dense));
    eigen_.vectors = arena.take<float>(dense * eigen_pitch(dense));
    eigen_.work = arena.take<double>(eigen_work(dense));
  }
}

/// Columns of the matrix in a tile.
template <typename T>
int64_t PrincipalSubspace<T>::tile_size(int64_t tile) const {
  return std::min(tile_points, size_ - tile * tile_points);
}

/// Coordinate k of a point in tiles of `depth` coordinates.
template <typename T>
T* PrincipalSubspace<T>::entry(
    T* tiles,
    int64_t depth,
    int64_t k,
    int64_t point) const {
  return tiles + (point / tile_points * depth + k) * tile_points +
      point % tile_points;
}

template <typename T>
void PrincipalSubspace<T>::compute(const CenteredRows<T>& rows) {
  if (gram_) {
    form_gram(rows);
  } else {
    Digits digits = Digits::floats;
    if (pairs_ && n_ * d_ >= integer_values) {
      digits = d_ >= quad_columns ? Digits::quads : Digits::pairs;
    }
    const auto form = [&](const CenteredRows<T>& from) {
      form_covariance(from, digits);
      while (!enough_digits(digits, from.n)) {
        digits = digits == Digits::quads ? Digits::pairs : Digits::floats;
        form_covariance(from, digits);
      }
    };
    if (n_ >= 16 * trial_rows && digits != Digits::floats) {
      CenteredRows<T> some = rows;
      some.data += n_ / 2 * d_;
      some.n = trial_rows;
      form(some);
    }
    form(rows);
  }
  // What fills up the last tile was not written.
  const int64_t last = num_tiles_ - 1;
  for (int64_t k = 0; k < size_; ++k) {
    T* row = matrix_ + (last * size_ + k) * tile_points;
    std::fill(row + tile_size(last), row + tile_points, T(0));
  }
  const double trace = variance();
  if (!(trace >= std::numeric_limits<T>::min())) {
    // All rows are equal, or as good as that: any directions will do.
    for (int64_t i = 0; i < d_ * q_; ++i) {
      basis_[i] = i / q_ == i % q_ ? 1 : 0;
    }
    return;
  }
  // Eigenvalues become shares of the variance.
  const T factor = static_cast<T>(1 / trace);
  for (int64_t i = 0; i < num_tiles_ * size_ * tile_points; ++i) {
    matrix_[i] *= factor;
  }
  if (width_ == 0 || !iterate()) {
    solve_fully();
  }
  if (!gram_) {
    return;
  }
  gemm(d_, q_, n_, T(1), centered_, 1, d_, leading_, q_, 1, basis_, q_, false);
  orthonormalize_basis();
}

/// Makes the columns X^T u of the basis orthonormal, or zero where nothing but
/// rounding is left of them. Exact eigenvectors u would give them orthogonal,
/// of a square that is the eigenvalue; a weak one contains what the rounding of
/// u leaves of the strong ones.
template <typename T>
void PrincipalSubspace<T>::orthonormalize_basis() {
  const int64_t q = q_;
  std::vector<T> products(q * q);
  gemm(q, q, d_, T(1), basis_, 1, q, basis_, q, 1, products.data(), q, false);
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
    gemm(
        count,
        q,
        q,
        T(1),
        rows,
        q,
        1,
        products.data(),
        q,
        1,
        rotated.data(),
        q,
        false);
    std::copy_n(rotated.data(), count * q, rows);
  }
}

/// The units of columns whose largest value is to become a certain integer.
template <typename T>
void PrincipalSubspace<T>::choose_units(
    const CenteredRows<T>& rows,
    Digits digits) {
  const float largest = digits == Digits::quads ? quad_largest : pair_largest;
  std::fill_n(unit_, num_tiles_ * tile_points, 0.0F);
  std::fill_n(factor_, num_tiles_ * tile_points, 0.0F);
  for (int64_t k = 0; k < d_; ++k) {
    // What is less than this beside columns of about 1 has no square.
    if (rows.extent[k] > 1e-20F) {
      unit_[k] = rows.extent[k] / largest;
      factor_[k] = largest / rows.extent[k];
    }
  }
}

/// Whether n rows rounded to these digits have left enough to find a subspace
/// of all rows that is as good as the exact one.
template <typename T>
bool PrincipalSubspace<T>::enough_digits(Digits digits, int64_t n) const {
  if (digits == Digits::floats) {
    return true;
  }
  // The mean magnitude, of all columns as far as their rounding adds to the
  // covariance. Variances would be lifted by a few large values, beside which
  // all others vanish.
  double units = 0;
  double values = 0;
  const int64_t padded = num_tiles_ * tile_points;
  for (int64_t k = 0; k < d_; ++k) {
    int64_t sum = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      sum += magnitude_[group * padded + k];
    }
    const double unit = unit_[k];
    const double value = unit * sum / n;
    units += unit * unit;
    values += value * value;
  }
  const double square = values / units;
  if (digits == Digits::pairs) {
    return square >= pair_magnitude * pair_magnitude;
  }
  // Rounding is noise of variance 1/12, and normal values vary by pi / 2 times
  // the square of their magnitude. The noise of n rows costs a q / n-th of its
  // share in the variance where no direction stands out; twice that is seen.
  // What it adds to each column's own variance is covered by the first bound.
  const double loss = q_ / (6 * (pi / 2) * n_ * square);
  return square >= quad_magnitude * quad_magnitude && loss <= quad_loss;
}

template <typename T>
void PrincipalSubspace<T>::form_covariance(
    const CenteredRows<T>& rows,
    Digits digits) {
  const int64_t n = rows.n;
  const int64_t d = d_;
  const int64_t size = num_tiles_ * d * tile_points;
  const WordKernels& words = digits == Digits::quads ? integer_kernels().quads
                                                     : integer_kernels().pairs;
  const int64_t packed = digits == Digits::floats ? 1 : words.rows_of_word;
  const int64_t chunk_rows = digits == Digits::quads ? quad_rows
      : digits == Digits::pairs                      ? pair_rows
                                                     : chunk_rows_;
  if (digits != Digits::floats) {
    choose_units(rows, digits);
  }
  // What pads the rows must give zeros.
  std::fill_n(centered_, groups_ * chunk_rows_ * stride_, T(0));
  std::fill_n(magnitude_, groups_ * num_tiles_ * tile_points, int64_t(0));
  // Row `at` of a chunk is the first one of a word.
  const auto center = [&](int64_t first, int64_t count, T* chunk, int64_t at) {
    if constexpr (sizeof(T) == 4) {
      if (digits != Digits::floats) {
        words.center(
            rows.data + first * d,
            count,
            d,
            rows.shift,
            rows.scale,
            factor_,
            reinterpret_cast<uint32_t*>(chunk) + at / packed * stride_,
            stride_);
        return;
      }
    }
    rows_kernels<T>().center_rows(
        rows.data + first * d,
        count,
        d,
        rows.shift,
        rows.scale,
        chunk + at * stride_,
        stride_);
  };
  const auto add = [&](const T* chunk,
                       int64_t count,
                       int64_t first,
                       int64_t last,
                       int64_t tile,
                       T* sums,
                       bool accumulated) {
    T* to = sums + tile * d * tile_points;
    const int64_t column = tile * tile_points;
    if constexpr (sizeof(T) == 4) {
      if (digits != Digits::floats) {
        words.add_products(
            reinterpret_cast<const uint32_t*>(chunk),
            count,
            stride_,
            first,
            last,
            column,
            tile_size(tile),
            unit_,
            to,
            accumulated);
        return;
      }
    }
    subspace_kernels<T>().add_products(
        chunk,
        count,
        stride_,
        first,
        last,
        column,
        tile_size(tile),
        to,
        accumulated);
  };
  const auto measure = [&](const T* chunk, int64_t count, int64_t group) {
    if (digits != Digits::floats) {
      words.add_magnitudes(
          reinterpret_cast<const uint32_t*>(chunk),
          count,
          stride_,
          d,
          magnitude_ + group * num_tiles_ * tile_points);
    }
  };
  // Nothing below the diagonal block of a tile is computed.
  const auto last_row = [&](int64_t tile) {
    return std::min((tile + 1) * tile_points, d);
  };
  if (d < wide_rows) {
    T* sums = groups_ > 1 ? partial_ : matrix_;
    torch::stable::parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        T* chunk = centered_ + group * chunk_rows_ * stride_;
        const int64_t first = group * n / groups_;
        const int64_t last = (group + 1) * n / groups_;
        for (int64_t start = first; start < last; start += chunk_rows) {
          const int64_t count = std::min(chunk_rows, last - start);
          center(start, count, chunk, 0);
          measure(chunk, count, group);
          for (int64_t tile = 0; tile < num_tiles_; ++tile) {
            add(chunk,
                count,
                0,
                last_row(tile),
                tile,
                sums + group * size,
                start > first);
          }
        }
      }
    });
    for (int64_t i = 0; groups_ > 1 && i < size; ++i) {
      double sum = 0;
      for (int64_t group = 0; group < groups_; ++group) {
        sum += partial_[group * size + i];
      }
      matrix_[i] = static_cast<T>(sum);
    }
  } else {
    const int64_t tasks = (d + task_rows - 1) / task_rows;
    for (int64_t start = 0; start < n; start += chunk_rows) {
      const int64_t count = std::min(chunk_rows, n - start);
      torch::stable::parallel_for(
          0,
          (count + packed - 1) / packed,
          16,
          [&](int64_t begin, int64_t end) {
            const int64_t at = packed * begin;
            const int64_t last = std::min(packed * end, count);
            center(start + at, last - at, centered_, at);
          });
      measure(centered_, count, 0);
      torch::stable::parallel_for(
          0, num_tiles_ * tasks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
              // High and low tiles, of much and little work, take turns.
              const int64_t pair = task / tasks;
              const int64_t tile =
                  pair % 2 == 0 ? pair / 2 : num_tiles_ - 1 - pair / 2;
              const int64_t first = task % tasks * task_rows;
              const int64_t last = std::min(first + task_rows, last_row(tile));
              if (first < last) {
                add(centered_, count, first, last, tile, matrix_, start > 0);
              }
            }
          });
    }
  }
  mirror();
}

/// Fills in what lies below the diagonal blocks.
template <typename T>
void PrincipalSubspace<T>::mirror() {
  for (int64_t tile = 1; tile < num_tiles_; ++tile) {
    for (int64_t other = 0; other < tile; ++other) {
      const T* from =
          entry(matrix_, size_, other * tile_points, tile * tile_points);
      T* to = entry(matrix_, size_, tile * tile_points, other * tile_points);
      for (int64_t i = 0; i < tile_size(tile); ++i) {
        for (int64_t j = 0; j < tile_points; ++j) {
          to[i * tile_points + j] = from[j * tile_points + i];
        }
      }
    }
  }
}

template <typename T>
void PrincipalSubspace<T>::form_gram(const CenteredRows<T>& rows) {
  torch::stable::parallel_for(0, n_, 16, [&](int64_t begin, int64_t end) {
    rows_kernels<T>().center_rows(
        rows.data + begin * d_,
        end - begin,
        d_,
        rows.shift,
        rows.scale,
        centered_ + begin * stride_,
        stride_);
  });
  std::fill_n(matrix_, num_tiles_ * size_ * tile_points, T(0));
  torch::stable::parallel_for(
      0, num_tiles_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * tile_points;
          const int64_t last = std::min(first + tile_points, n_);
          gemm(
              last,
              last - first,
              d_,
              T(1),
              centered_,
              stride_,
              1,
              centered_ + first * stride_,
              1,
              stride_,
              matrix_ + first * size_,
              tile_points,
              false);
        }
      });
  mirror();
}

/// The trace of the matrix.
template <typename T>
double PrincipalSubspace<T>::variance() const {
  double trace = 0;
  for (int64_t i = 0; i < size_; ++i) {
    trace += *entry(matrix_, size_, i, i);
  }
  return trace;
}

/// Block iterations; false if they do not converge.
template <typename T>
bool PrincipalSubspace<T>::iterate() {
  if (pairs_) {
    round_matrix();
  }
  sketch();
  orthonormalize(true);
  const double enough = tolerance<T>(n_, d_);
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
      take_leading();
      return true;
    }
  }
  return false;
}

/// block = matrix * a matrix of one random sign in each row: a start that is
/// nearly as good as a product with random numbers, for the price of a sum.
template <typename T>
void PrincipalSubspace<T>::sketch() {
  // The same number of rows for each column, in no order that data may have.
  std::vector<int64_t> column(size_);
  for (int64_t k = 0; k < size_; ++k) {
    column[k] = k % width_;
    std::swap(column[k], column[scrambled(k) % (k + 1)]);
  }
  // The points that fill up the last tile stay zeros for ever.
  const int64_t tile_size = width_ * tile_points;
  std::fill_n(block_, num_tiles_ * tile_size, T(0));
  std::fill_n(product_, num_tiles_ * tile_size, T(0));
  std::fill_n(rotated_, num_tiles_ * tile_size, T(0));
  for (int64_t tile = 0; tile < num_tiles_; ++tile) {
    for (int64_t k = 0; k < size_; ++k) {
      const T sign = scrambled(size_ + k) & 1 ? 1 : -1;
      const T* from = matrix_ + (tile * size_ + k) * tile_points;
      T* to = block_ + tile * tile_size + column[k] * tile_points;
      for (int64_t i = 0; i < tile_points; ++i) {
        to[i] += sign * from[i];
      }
    }
  }
}

/// matrix_pairs = matrix, scaled so that rows are no longer than 2^15.
template <typename T>
void PrincipalSubspace<T>::round_matrix() {
  double longest = 0;
  for (int64_t tile = 0; tile < num_tiles_; ++tile) {
    T squares[tile_points] = {};
    for (int64_t k = 0; k < size_; ++k) {
      const T* row = matrix_ + (tile * size_ + k) * tile_points;
      for (int64_t i = 0; i < tile_points; ++i) {
        squares[i] += row[i] * row[i];
      }
    }
    longest = std::max<double>(
        longest, *std::max_element(squares, squares + tile_points));
  }
  matrix_factor_ = static_cast<float>(32000 / std::sqrt(longest));
  const int64_t half = (size_ + 1) / 2;
  if constexpr (sizeof(T) == 4) {
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      integer_kernels().round_tile(
          matrix_ + tile * size_ * tile_points,
          size_,
          matrix_factor_,
          matrix_pairs_ + tile * half * tile_points);
    }
  }
}

/// product = matrix * block
template <typename T>
void PrincipalSubspace<T>::apply() {
  const int64_t grain =
      std::max<int64_t>(1, (1 << 21) / (tile_points * size_ * width_));
  if constexpr (sizeof(T) == 4) {
    if (pairs_) {
      const int64_t half = (size_ + 1) / 2;
      auto* packed = reinterpret_cast<uint32_t*>(packed_);
      integer_kernels().pack_block(
          block_, num_tiles_, width_, size_, packed, unscale_);
      torch::stable::parallel_for(
          0, num_tiles_, grain, [&](int64_t begin, int64_t end) {
            for (int64_t tile = begin; tile < end; ++tile) {
              integer_kernels().project_tile(
                  matrix_pairs_ + tile * half * tile_points,
                  tile_size(tile),
                  size_,
                  packed,
                  width_,
                  1 / matrix_factor_,
                  unscale_,
                  product_ + tile * width_ * tile_points);
            }
          });
      return;
    }
  }
  T* packed = packed_;
  for (int64_t first = 0; first < width_; first += group_columns) {
    const int64_t columns = std::min(group_columns, width_ - first);
    for (int64_t i = 0; i < size_; ++i) {
      const T* from = entry(block_, width_, first, i);
      for (int64_t c = 0; c < columns; ++c) {
        *packed++ = from[c * tile_points];
      }
    }
  }
  torch::stable::parallel_for(
      0, num_tiles_, grain, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          subspace_kernels<T>().project_tile(
              matrix_ + tile * size_ * tile_points,
              tile_size(tile),
              size_,
              packed_,
              width_,
              product_ + tile * width_ * tile_points);
        }
      });
}

/// block = p(matrix) * block for the Chebyshev polynomial p of [0, cut], given
/// product = matrix * block. The polynomial is applied root by root, and the
/// block made orthonormal in between: this changes no subspace, and keeps the
/// weak directions from drowning in the strong ones, which grow `spread` times
/// faster a step.
template <typename T>
void PrincipalSubspace<T>::filter(double cut, double spread, int degree) {
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
    for (int64_t i = 0; i < num_tiles_ * width_ * tile_points; ++i) {
      block_[i] = product_[i] - root * block_[i];
    }
    if ((step + 1) % period == 0 || step + 1 == degree) {
      orthonormalize(false);
    }
  }
}

/// Factorizes V^T V, of columns scaled to length 1, into L L^T; `precise` where
/// columns may be nearly parallel.
template <typename T>
void PrincipalSubspace<T>::factorize_block(bool precise) {
  const int64_t w = width_;
  subspace_kernels<T>().inner_products(
      block_, block_, num_tiles_, w, precise, small_gram_);
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
void PrincipalSubspace<T>::rotate(int64_t count) {
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
      0, num_tiles_, 4, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t offset = tile * w * tile_points;
          subspace_kernels<T>().project_tile(
              block_ + offset,
              tile_size(tile),
              w,
              packed_rotation_,
              count,
              rotated_ + offset);
        }
      });
}

/// Makes the columns of the block orthonormal, or zero where they depend on
/// those before them.
template <typename T>
void PrincipalSubspace<T>::orthonormalize(bool precise) {
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
void PrincipalSubspace<T>::restrict_matrix() {
  const auto& kernels = eigen_kernels();
  const int64_t w = width_;
  factorize_block(false);
  subspace_kernels<T>().inner_products(
      block_, product_, num_tiles_, w, false, restricted_);
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
void PrincipalSubspace<T>::take_leading() {
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
      leading_[i * q_ + j] = *entry(rotated_, w, j, i);
    }
  }
}

template <typename T>
void PrincipalSubspace<T>::solve_fully() {
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
        for (int64_t tile = 0; tile < num_tiles_; ++tile) {
          const int64_t first = tile * tile_points;
          std::copy_n(
              entry(matrix_, size_, i, first), tile_size(tile), row + first);
        }
      },
      buffers,
      leading_);
}

template class PrincipalSubspace<float>;
template class PrincipalSubspace<double>;

} // namespace kdci
