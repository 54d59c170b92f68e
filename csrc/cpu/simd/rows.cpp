// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

#include "tile.h"
#include "transpose.h"

namespace kdci::KDCI_SIMD {
namespace {

/// The values from `from` on; what lies past `end` is replaced by zeros.
template <typename T>
KDCI_INLINE Vec<T> load_before(const T* from, const T* end) {
  if (from + lanes<T> <= end) {
    return load(from);
  }
  T values[lanes<T>] = {};
  for (int64_t i = 0; from + i < end; ++i) {
    values[i] = from[i];
  }
  return load(values);
}

// Columns are read in blocks, of one row after the other: far apart where rows
// are long, which only a prefetch some rows ahead makes quick.
constexpr int64_t rows_ahead = 16;

// Statistics are taken of about so many values at a time, of whole rows, which
// stay in the second-level cache until all of their columns are done.
constexpr int64_t chunk_values = 1 << 14;

template <typename T>
KDCI_INLINE void prefetch_below(const T* from, int64_t d, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t k = 0; k < count; k += line) {
    __builtin_prefetch(from + rows_ahead * d + k);
  }
}

/// Brings the statistics of the columns of `vectors` vectors, from `k` on, up
/// to date with n rows.
template <int vectors, typename T>
KDCI_INLINE void vector_stats(
    const T* rows,
    int64_t n,
    int64_t d,
    const T* rows_end,
    int64_t k,
    double* sum,
    T* low,
    T* high) {
  constexpr int halves = sizeof(double) / sizeof(T);
  constexpr int64_t columns = vectors * lanes<T>;
  // At the right edge the arrays have no room for whole vectors.
  const int64_t width = d - k < columns ? d - k : columns;
  double edge_sum[columns] = {};
  T edge_low[columns] = {};
  T edge_high[columns] = {};
  const bool is_edge = width < columns;
  double* to_sum = is_edge ? edge_sum : sum + k;
  T* to_low = is_edge ? edge_low : low + k;
  T* to_high = is_edge ? edge_high : high + k;
  for (int64_t j = 0; is_edge && j < width; ++j) {
    to_sum[j] = sum[k + j];
    to_low[j] = low[k + j];
    to_high[j] = high[k + j];
  }
  Vec<double> sums[vectors * halves];
  Vec<T> lows[vectors];
  Vec<T> highs[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    lows[v] = load(to_low + v * lanes<T>);
    highs[v] = load(to_high + v * lanes<T>);
  }
#pragma GCC unroll 8
  for (int h = 0; h < vectors * halves; ++h) {
    sums[h] = load(to_sum + h * lanes<double>);
  }
  const auto add = [&](const T* values) KDCI_ALWAYS_INLINE {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> value = load(values + v * lanes<T>);
      lows[v] = value < lows[v] ? value : lows[v];
      highs[v] = value > highs[v] ? value : highs[v];
    }
#pragma GCC unroll 8
    for (int h = 0; h < vectors * halves; ++h) {
      sums[h] += widen(values + h * lanes<double>);
    }
  };
  // Short rows are fetched whole with their first block: memory likes that.
  const bool is_short = d <= chunk_values / (2 * rows_ahead);
  const int64_t ahead = !is_short ? columns : k == 0 ? d : 0;
  // The vectors at the right edge reach into the next row; what they hold
  // there is dropped. The last of them would reach past the end.
  int64_t inside = n;
  while (inside > 0 && rows + (inside - 1) * d + k + columns > rows_end) {
    --inside;
  }
  for (int64_t i = 0; i < inside; ++i) {
    prefetch_below(rows + i * d + k, d, ahead);
    add(rows + i * d + k);
  }
  for (int64_t i = inside; i < n; ++i) {
    T values[columns];
    for (int64_t v = 0; v < columns; v += lanes<T>) {
      store(values + v, load_before(rows + i * d + k + v, rows_end));
    }
    add(values);
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    store(to_low + v * lanes<T>, lows[v]);
    store(to_high + v * lanes<T>, highs[v]);
  }
#pragma GCC unroll 8
  for (int h = 0; h < vectors * halves; ++h) {
    store(to_sum + h * lanes<double>, sums[h]);
  }
  for (int64_t j = 0; is_edge && j < width; ++j) {
    sum[k + j] = to_sum[j];
    low[k + j] = to_low[j];
    high[k + j] = to_high[j];
  }
}

template <typename T>
void column_stats(
    const T* rows,
    int64_t n,
    int64_t d,
    const T* rows_end,
    double* sum,
    T* low,
    T* high) {
  const int64_t chunk =
      chunk_values / d > rows_ahead ? chunk_values / d : rows_ahead;
  for (int64_t first = 0; first < n; first += chunk) {
    const T* from = rows + first * d;
    const int64_t count = n - first < chunk ? n - first : chunk;
    for_blocks<T>(d, [&](auto size, int64_t k) KDCI_ALWAYS_INLINE {
      vector_stats<decltype(size)::value>(
          from, count, d, rows_end, k, sum, low, high);
    });
  }
}

template <typename T>
void center_rows(
    const T* __restrict rows,
    int64_t n,
    int64_t d,
    const T* __restrict shift,
    T scale,
    T* __restrict centered,
    int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < d; ++k) {
      centered[i * stride + k] = rows[i * d + k] * scale - shift[k];
    }
  }
}

template <typename T>
void center_tile(
    const T* rows,
    const int64_t* index,
    int64_t count,
    int64_t d,
    const T* rows_end,
    const T* shift,
    T scale,
    T* tile) {
  const Vec<T> scales = broadcast(scale);
  for (int64_t i = 0; i < tile_points; i += lanes<T>) {
    for (int64_t k = 0; k < d; k += lanes<T>) {
      const Vec<T> shifts = load(shift + k);
      Vec<T> block[lanes<T>];
#pragma GCC unroll 16
      for (int64_t r = 0; r < lanes<T>; ++r) {
        block[r] = Vec<T>{};
        if (i + r < count) {
          const int64_t row = index == nullptr ? i + r : index[i + r];
          block[r] =
              load_before(rows + row * d + k, rows_end) * scales - shifts;
        }
      }
      transpose<lanes<T> / 2, T>(block);
      if (k + lanes<T> <= d) {
#pragma GCC unroll 16
        for (int64_t c = 0; c < lanes<T>; ++c) {
          store(tile + (k + c) * tile_points + i, block[c]);
        }
      } else {
        for (int64_t c = 0; c < d - k; ++c) {
          store(tile + (k + c) * tile_points + i, block[c]);
        }
      }
    }
  }
}

template <typename T>
void add_rows(
    const T* __restrict rows,
    int64_t n,
    int64_t d,
    int64_t first,
    int64_t last,
    const int64_t* __restrict labels,
    double* __restrict sums) {
  for (int64_t i = 0; i < n; ++i) {
    double* sum = sums + labels[i] * d;
    prefetch_below(rows + i * d + first, d, last - first);
    for (int64_t k = first; k < last; ++k) {
      sum[k] += rows[i * d + k];
    }
  }
}

template <typename T>
constexpr RowsKernels<T> table = {
    column_stats<T>,
    center_rows<T>,
    center_tile<T>,
    add_rows<T>,
};

} // namespace

extern const RowsKernels<float> rows_kernels_float = table<float>;
extern const RowsKernels<double> rows_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
