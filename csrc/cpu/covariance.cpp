// SPDX-License-Identifier: Apache-2.0
#include "covariance.h"

#include <algorithm>
#include <limits>

#include "../common/stable.h"
#include "simd/gemm.h"
#include "simd/rows.h"

namespace kdci {

/// The largest value of each column becomes a certain integer, and so many rows
/// are taken at a time that no sum of products exceeds 2^30. Where the integers
/// are too small, or too much is lost, finer ones are tried.
struct Rounding {
  WordKernels IntegerKernels::* kernels;
  int64_t chunk_rows;
  float largest;
  double magnitude;      // of an integer in the mean, at least
  double loss;           // of variance, as a share of it, at most
  const Rounding* finer; // null: none, floats are next
};

namespace {

constexpr Rounding to_pairs = {
    &IntegerKernels::pairs,
    /*chunk_rows=*/128,
    /*largest=*/2800,
    /*magnitude=*/20,
    /*loss=*/std::numeric_limits<double>::infinity(),
    /*finer=*/nullptr,
};
constexpr Rounding to_quads = {
    &IntegerKernels::quads,
    /*chunk_rows=*/256,
    /*largest=*/127,
    /*magnitude=*/6,
    /*loss=*/2e-4,
    /*finer=*/&to_pairs,
};

// For few values rounding does not pay; to bytes it does where products take
// more time than the rounding.
constexpr int64_t integer_values = 1 << 14;
constexpr int64_t quad_columns = 64;

// With many rows the digits are tried on some of them first.
constexpr int64_t trial_rows = 256;

// From this width on the matrix is shared out between threads, not the rows.
constexpr int64_t wide_rows = 128;

// Values that a cache line holds, of 32 bits each.
constexpr int64_t line_values = 16;

// Rows of a tile of the matrix that one task computes: whole groups.
constexpr int64_t task_rows = 16 * group_columns;

// The variance of normal values whose mean magnitude is 1: pi / 2.
constexpr double normal_variance = 1.57079632679489661923;

} // namespace

template <typename T>
Covariance<T>::Covariance(Arena& arena, int64_t n, int64_t d, int64_t q)
    : n_(n),
      d_(d),
      q_(q),
      groups_(
          is_gram() || d >= wide_rows ? 1
                                      : std::clamp<int64_t>(n / 8192, 1, 16)),
      chunk_rows_(is_gram() ? n : std::min<int64_t>(n, 256)),
      matrix_(arena, std::min(n, d), std::min(n, d)),
      padded_(matrix_.num_tiles * tile_points),
      // An odd number of lines of floats: rows a power of two apart evict
      // others.
      stride_(is_gram() ? d : padded_ + line_values),
      centered_(arena.take<T>(groups_ * chunk_rows_ * stride_)),
      partial_(arena.take<T>(groups_ > 1 ? groups_ * matrix_.length : 0)),
      unit_(arena.take<float>(padded_)),
      factor_(arena.take<float>(padded_)),
      magnitude_(arena.take<int64_t>(groups_ * padded_)) {}

template <typename T>
void Covariance<T>::form(const CenteredRows<T>& rows) {
  if (is_gram()) {
    form_gram(rows);
  } else {
    const Rounding* rounding = nullptr;
    if (has_integer_kernels<T>() && n_ * d_ >= integer_values) {
      rounding = d_ >= quad_columns ? &to_quads : &to_pairs;
    }
    if (n_ >= 16 * trial_rows && rounding != nullptr) {
      CenteredRows<T> some = rows;
      some.data += n_ / 2 * d_;
      some.n = trial_rows;
      rounding = form_until_enough(some, rounding);
    }
    form_until_enough(rows, rounding);
  }
  complete();
}

template <typename T>
void Covariance<T>::form_gram(const CenteredRows<T>& rows) {
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
  torch::stable::parallel_for(
      0, matrix_.num_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          const int64_t first = tile * tile_points;
          gemm<T>(
              {first + matrix_.tile_size(tile),
               matrix_.tile_size(tile),
               d_,
               centered_,
               stride_,
               1,
               centered_ + first * stride_,
               1,
               stride_,
               matrix_.tile(tile),
               tile_points,
               false});
        }
      });
}

/// Rounds less until there are enough digits; returns what these take.
template <typename T>
const Rounding* Covariance<T>::form_until_enough(
    const CenteredRows<T>& rows,
    const Rounding* rounding) {
  form_covariance(rows, rounding);
  while (rounding != nullptr && !enough_digits(*rounding, rows.n)) {
    rounding = rounding->finer;
    form_covariance(rows, rounding);
  }
  return rounding;
}

/// Whether n rows rounded like this have left enough digits to find a subspace
/// of all rows that is as good as the exact one.
template <typename T>
bool Covariance<T>::enough_digits(const Rounding& rounding, int64_t n) const {
  // The mean magnitude, of all columns as far as their rounding adds to the
  // covariance. Variances would be lifted by a few large values, beside which
  // all others vanish.
  double units = 0;
  double values = 0;
  for (int64_t k = 0; k < d_; ++k) {
    int64_t sum = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      sum += magnitude_[group * padded_ + k];
    }
    const double unit = unit_[k];
    const double value = unit * sum / n;
    units += unit * unit;
    values += value * value;
  }
  const double square = values / units;
  // Rounding is noise of variance 1/12. That of n rows costs a q / n-th of its
  // share in the variance of normal values, where no direction stands out;
  // twice that is seen. What it adds to each column's own variance is covered
  // by the first bound.
  const double loss = q_ / (6 * normal_variance * n_ * square);
  return square >= rounding.magnitude * rounding.magnitude &&
      loss <= rounding.loss;
}

/// Writes the diagonal blocks and what lies above them.
template <typename T>
void Covariance<T>::form_covariance(
    const CenteredRows<T>& rows,
    const Rounding* rounding) {
  words_ = nullptr;
  int64_t chunk_rows = chunk_rows_;
  if (rounding != nullptr) {
    words_ = &(integer_kernels().*rounding->kernels);
    chunk_rows = rounding->chunk_rows;
    choose_units(rows, rounding->largest);
  }
  // What pads the rows must give zeros.
  std::fill_n(centered_, groups_ * chunk_rows_ * stride_, T(0));
  std::fill_n(magnitude_, groups_ * padded_, int64_t(0));
  if (d_ < wide_rows) {
    form_by_rows(rows, chunk_rows);
  } else {
    form_by_tiles(rows, chunk_rows);
  }
}

template <typename T>
void Covariance<T>::choose_units(const CenteredRows<T>& rows, float largest) {
  std::fill_n(unit_, padded_, 0.0F);
  std::fill_n(factor_, padded_, 0.0F);
  for (int64_t k = 0; k < d_; ++k) {
    // What is less than this beside columns of about 1 has no square.
    if (rows.extent[k] > 1e-20F) {
      unit_[k] = rows.extent[k] / largest;
      factor_[k] = largest / rows.extent[k];
    }
  }
}

/// Threads share the rows.
template <typename T>
void Covariance<T>::form_by_rows(
    const CenteredRows<T>& rows,
    int64_t chunk_rows) {
  T* sums = groups_ > 1 ? partial_ : matrix_.data;
  torch::stable::parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      T* chunk = centered_ + group * chunk_rows_ * stride_;
      T* to = sums + group * matrix_.length;
      const int64_t first = group * rows.n / groups_;
      const int64_t last = (group + 1) * rows.n / groups_;
      for (int64_t start = first; start < last; start += chunk_rows) {
        const int64_t count = std::min(chunk_rows, last - start);
        center(rows, start, count, chunk, 0);
        add_magnitudes(chunk, count, group);
        for (int64_t tile = 0; tile < matrix_.num_tiles; ++tile) {
          add_products(
              chunk, count, 0, last_row(tile), tile, to, start > first);
        }
      }
    }
  });
  for (int64_t i = 0; groups_ > 1 && i < matrix_.length; ++i) {
    double sum = 0;
    for (int64_t group = 0; group < groups_; ++group) {
      sum += partial_[group * matrix_.length + i];
    }
    matrix_.data[i] = static_cast<T>(sum);
  }
}

/// Threads share the matrix.
template <typename T>
void Covariance<T>::form_by_tiles(
    const CenteredRows<T>& rows,
    int64_t chunk_rows) {
  const int64_t packed = words_ != nullptr ? words_->rows_of_word : 1;
  const int64_t tasks = (d_ + task_rows - 1) / task_rows;
  for (int64_t start = 0; start < rows.n; start += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows.n - start);
    torch::stable::parallel_for(
        0, (count + packed - 1) / packed, 16, [&](int64_t begin, int64_t end) {
          const int64_t at = packed * begin;
          const int64_t last = std::min(packed * end, count);
          center(rows, start + at, last - at, centered_, at);
        });
    add_magnitudes(centered_, count, 0);
    torch::stable::parallel_for(
        0, matrix_.num_tiles * tasks, 1, [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            // High and low tiles, of much and little work, take turns.
            const int64_t pair = task / tasks;
            const int64_t tile =
                pair % 2 == 0 ? pair / 2 : matrix_.num_tiles - 1 - pair / 2;
            const int64_t first = task % tasks * task_rows;
            const int64_t last = std::min(first + task_rows, last_row(tile));
            if (first < last) {
              add_products(
                  centered_, count, first, last, tile, matrix_.data, start > 0);
            }
          }
        });
  }
}

/// Rows [first, first + count) go to the chunk's row `at`, the first of a word.
template <typename T>
void Covariance<T>::center(
    const CenteredRows<T>& rows,
    int64_t first,
    int64_t count,
    T* chunk,
    int64_t at) const {
  const T* from = rows.data + first * d_;
  if constexpr (sizeof(T) == 4) {
    if (words_ != nullptr) {
      words_->center(
          from,
          count,
          d_,
          rows.shift,
          rows.scale,
          factor_,
          reinterpret_cast<uint32_t*>(chunk) +
              at / words_->rows_of_word * stride_,
          stride_);
      return;
    }
  }
  rows_kernels<T>().center_rows(
      from, count, d_, rows.shift, rows.scale, chunk + at * stride_, stride_);
}

template <typename T>
void Covariance<T>::add_magnitudes(
    const T* chunk,
    int64_t count,
    int64_t group) {
  if (words_ != nullptr) {
    words_->add_magnitudes(
        reinterpret_cast<const uint32_t*>(chunk),
        count,
        stride_,
        d_,
        magnitude_ + group * padded_);
  }
}

/// Adds the products of the columns [first, last) of a chunk of `count` rows
/// with those of a tile to the matrix `sums`, which they overwrite unless it is
/// `accumulated`.
template <typename T>
void Covariance<T>::add_products(
    const T* chunk,
    int64_t count,
    int64_t first,
    int64_t last,
    int64_t tile,
    T* sums,
    bool accumulated) const {
  T* to = sums + tile * d_ * tile_points;
  const int64_t column = tile * tile_points;
  const int64_t columns = matrix_.tile_size(tile);
  if constexpr (sizeof(T) == 4) {
    if (words_ != nullptr) {
      words_->add_products(
          reinterpret_cast<const uint32_t*>(chunk),
          count,
          stride_,
          first,
          last,
          column,
          columns,
          unit_,
          to,
          accumulated);
      return;
    }
  }
  subspace_kernels<T>().add_products(
      chunk, count, stride_, first, last, column, columns, to, accumulated);
}

/// Where the diagonal block of a tile ends: nothing below it is computed.
template <typename T>
int64_t Covariance<T>::last_row(int64_t tile) const {
  return tile * tile_points + matrix_.tile_size(tile);
}

/// Fills in what lies below the diagonal blocks, and the last tile.
template <typename T>
void Covariance<T>::complete() {
  const int64_t last = matrix_.num_tiles - 1;
  for (int64_t tile = 1; tile <= last; ++tile) {
    for (int64_t other = 0; other < tile; ++other) {
      const T* from = matrix_.at(other * tile_points, tile * tile_points);
      T* to = matrix_.at(tile * tile_points, other * tile_points);
      for (int64_t i = 0; i < matrix_.tile_size(tile); ++i) {
        for (int64_t j = 0; j < tile_points; ++j) {
          to[i * tile_points + j] = from[j * tile_points + i];
        }
      }
    }
  }
  for (int64_t k = 0; k < matrix_.depth; ++k) {
    T* row = matrix_.tile(last) + k * tile_points;
    std::fill(row + matrix_.tile_size(last), row + tile_points, T(0));
  }
}

template class Covariance<float>;
template class Covariance<double>;

} // namespace kdci
