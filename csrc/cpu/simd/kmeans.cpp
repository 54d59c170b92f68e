// SPDX-License-Identifier: Apache-2.0
#include "kmeans.h"

#include "vec.h"

#define KDCI_ALWAYS_INLINE __attribute__((always_inline))
#define KDCI_INLINE inline KDCI_ALWAYS_INLINE

namespace kdci::KDCI_SIMD {
namespace {

// Vectors of points that are in work at once: with 6 columns that is 24 of the
// 32 registers of AVX-512, else 12 of 16.
constexpr int num_vectors = vector_bytes == 64 ? 4 : 2;

template <typename T>
constexpr int64_t block_points = num_vectors * lanes<T>;

template <typename T>
using Mask = decltype(Vec<T>{} > Vec<T>{});

template <typename T, int columns, int vectors = num_vectors>
using Block = Vec<T>[columns][vectors];

/// block += columns [depth][width] . points [depth][64], or with `squared`
/// the squared differences of the two.
template <bool squared, typename T, int width, int vectors>
KDCI_INLINE void accumulate(
    const T* points,
    int64_t depth,
    const T* columns,
    Block<T, width, vectors>& block,
    int64_t points_stride = tile_points,
    int64_t columns_stride = width) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> point[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      point[v] = load(points + v * lanes<T>);
    }
#pragma GCC unroll 6
    for (int c = 0; c < width; ++c) {
      const Vec<T> column = broadcast(columns[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if constexpr (squared) {
          const Vec<T> difference = point[v] - column;
          block[c][v] += difference * difference;
        } else {
          block[c][v] += point[v] * column;
        }
      }
    }
    points += points_stride;
    columns += columns_stride;
  }
}

template <int width>
struct Width {
  static constexpr int value = width;
};

/// Calls `body` with the width of each group of packed columns as a type and
/// the index of the group's first column.

template <typename Body>
KDCI_INLINE void for_groups(int64_t columns, Body body) {
  int64_t first = 0;
  for (; first + 6 <= columns; first += 6) {
    body(Width<6>(), first);
  }
  switch (columns - first) {
    case 5:
      body(Width<5>(), first);
      break;
    case 4:
      body(Width<4>(), first);
      break;
    case 3:
      body(Width<3>(), first);
      break;
    case 2:
      body(Width<2>(), first);
      break;
    case 1:
      body(Width<1>(), first);
      break;
  }
}

/// Calls `body` with a number of vectors as a type and the index of their first
/// point, until `count` points are covered.
template <typename T, typename Body>
KDCI_INLINE void for_blocks(int64_t count, Body body) {
  int64_t i = 0;
  if constexpr (num_vectors == 4) {
    for (; count - i > 2 * lanes<T>; i += 4 * lanes<T>) {
      body(Width<4>(), i);
    }
  }
  for (; count - i > lanes<T>; i += 2 * lanes<T>) {
    body(Width<2>(), i);
  }
  if (i < count) {
    body(Width<1>(), i);
  }
}

// -- Sums in double ----------------------------------------------------------

KDCI_INLINE Vec<double> widen(const double* from) {
  return load(from);
}

KDCI_INLINE Vec<double> widen(const float* from) {
  typedef float Half __attribute__((
      vector_size(vector_bytes / 2), aligned(alignof(float)), may_alias));
  return __builtin_convertvector(
      *reinterpret_cast<const Half*>(from), Vec<double>);
}

KDCI_INLINE double sum_lanes(Vec<double> values) {
  double sums[lanes<double>];
  store(sums, values);
#pragma GCC unroll 3
  for (int64_t half = lanes<double> / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

/// Sum of `count` values, a multiple of 64.
template <typename T>
KDCI_INLINE double sum_all(const T* values, int64_t count) {
  Vec<double> sums[4] = {};
  for (int64_t i = 0; i < count; i += 4 * lanes<double>) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      sums[v] += widen(values + i + v * lanes<double>);
    }
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
double square_sum(const T* tile, int64_t depth) {
  Vec<double> sums[4] = {};
  for (int64_t i = 0; i < depth * tile_points; i += 4 * lanes<double>) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const Vec<double> value = widen(tile + i + v * lanes<double>);
      sums[v] += value * value;
    }
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// -- Rows --------------------------------------------------------------------

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

template <typename T>
void column_stats(
    const T* rows,
    int64_t n,
    int64_t d,
    const T* rows_end,
    double* sum,
    T* low,
    T* high) {
  constexpr int halves = sizeof(double) / sizeof(T);
  // The vectors at the right edge reach into the next row; what they hold
  // there is dropped. The last of them would reach past the end.
  for (int64_t k = 0; k < d; k += lanes<T>) {
    Vec<double> sums[halves] = {};
    Vec<T> lows = load_before(rows + k, rows_end);
    Vec<T> highs = lows;
    const auto add = [&](const T* values) KDCI_ALWAYS_INLINE {
      const Vec<T> value = load(values);
      lows = value < lows ? value : lows;
      highs = value > highs ? value : highs;
#pragma GCC unroll 2
      for (int h = 0; h < halves; ++h) {
        sums[h] += widen(values + h * lanes<double>);
      }
    };
    int64_t inside = n;
    while (inside > 0 && rows + (inside - 1) * d + k + lanes<T> > rows_end) {
      --inside;
    }
    for (int64_t i = 0; i < inside; ++i) {
      add(rows + i * d + k);
    }
    for (int64_t i = inside; i < n; ++i) {
      T values[lanes<T>];
      store(values, load_before(rows + i * d + k, rows_end));
      add(values);
    }
    const int64_t width = d - k < lanes<T> ? d - k : lanes<T>;
    for (int64_t j = 0; j < width; ++j) {
      sum[k + j] += sums[j / lanes<double>][j % lanes<double>];
      low[k + j] = lows[j] < low[k + j] ? lows[j] : low[k + j];
      high[k + j] = highs[j] > high[k + j] ? highs[j] : high[k + j];
    }
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

template <int... indices>
struct Indices {};

template <int count, int... tail>
struct IndicesUpTo : IndicesUpTo<count - 1, count - 1, tail...> {};

template <int... indices>
struct IndicesUpTo<0, indices...> {
  using type = Indices<indices...>;
};

/// Swaps the two off-diagonal quarters of pairs of rows `step` apart.
template <int step, typename T, int... j>
KDCI_INLINE void exchange(Vec<T>& upper, Vec<T>& lower, Indices<j...>) {
  constexpr int width = sizeof...(j);
  const Vec<T> a = upper;
  const Vec<T> b = lower;
  upper = __builtin_shufflevector(a, b, ((j & step) ? width + j - step : j)...);
  lower = __builtin_shufflevector(a, b, ((j & step) ? width + j : j + step)...);
}

template <int step, typename T>
KDCI_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (step > 0) {
    using AllLanes = typename IndicesUpTo<lanes<T>>::type;
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes<T>; ++i) {
      if ((i & step) == 0) {
        exchange<step, T>(rows[i], rows[i + step], AllLanes());
      }
    }
    transpose<step / 2, T>(rows);
  }
}

template <typename T>
void center_tile(
    const T* rows,
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
        block[r] = i + r < count
            ? load_before(rows + (i + r) * d + k, rows_end) * scales - shifts
            : Vec<T>{};
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
void add_products(
    const T* rows,
    int64_t n,
    int64_t stride,
    int64_t first,
    int64_t last,
    int64_t column,
    int64_t count,
    T* tile,
    bool accumulated) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(
        last - first, [&](auto group, int64_t offset) KDCI_ALWAYS_INLINE {
          constexpr int vectors = decltype(size)::value;
          constexpr int width = decltype(group)::value;
          Block<T, width, vectors> block = {};
          accumulate<false, T, width, vectors>(
              rows + column + i,
              n,
              rows + first + offset,
              block,
              stride,
              stride);
          T* target = tile + (first + offset) * tile_points + i;
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              T* to = target + c * tile_points + v * lanes<T>;
              store(to, accumulated ? load(to) + block[c][v] : block[c][v]);
            }
          }
        });
  });
}

/// Sums of products of coordinates i..i+rows of `a` and j..j+columns of `b`.
template <int rows, int columns, typename T>
KDCI_INLINE void inner_block(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    double* products,
    int64_t stride) {
  Vec<double> sums[rows][columns] = {};
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t lane = 0; lane < tile_points; lane += lanes<double>) {
      const int64_t at = tile * depth * tile_points + lane;
      Vec<double> right[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        right[c] = widen(b + at + c * tile_points);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Vec<double> left = widen(a + at + r * tile_points);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
          sums[r][c] += left * right[c];
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      products[r * stride + c] = sum_lanes(sums[r][c]);
    }
  }
}

template <typename T>
void inner_products(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    double* products) {
  constexpr int rows = 4;
  constexpr int columns = vector_bytes == 64 ? 4 : 2;
  for (int64_t i = 0; i < depth; i += rows) {
    for (int64_t j = 0; j < i + rows; j += columns) {
      inner_block<rows, columns>(
          a + i * tile_points,
          b + j * tile_points,
          num_tiles,
          depth,
          products + i * depth + j,
          depth);
    }
  }
}

// -- Points ------------------------------------------------------------------

template <typename T>
void project_tile(
    const T* tile,
    int64_t count,
    int64_t depth,
    const T* columns,
    int64_t q,
    T* projected) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(q, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int vectors = decltype(size)::value;
      constexpr int width = decltype(group)::value;
      Block<T, width, vectors> block = {};
      accumulate<false, T, width, vectors>(
          tile + i, depth, columns + first * depth, block);
      T* target = projected + first * tile_points + i;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          store(target + c * tile_points + v * lanes<T>, block[c][v]);
        }
      }
    });
  });
}

template <typename T>
void seed_tiles(
    const T* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    T* nearest,
    const T* chosen,
    const T* columns,
    int64_t candidates,
    double* sums) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* points = tiles + tile * depth * tile_points;
    T* lowest = nearest + tile * tile_points;
    if (chosen != nullptr) {
      for (int64_t i = 0; i < tile_points; i += block_points<T>) {
        Block<T, 1> block = {};
        accumulate<true, T, 1, num_vectors>(points + i, depth, chosen, block);
#pragma GCC unroll 4
        for (int64_t v = 0; v < num_vectors; ++v) {
          const Vec<T> old = load(lowest + i + v * lanes<T>);
          store(
              lowest + i + v * lanes<T>, block[0][v] < old ? block[0][v] : old);
        }
      }
    }
    if (candidates == 0) {
      sums[tile] = sum_all(lowest, tile_points);
      continue;
    }
    T potentials[group_columns][tile_points];
    for_groups(candidates, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int width = decltype(group)::value;
      for (int64_t i = 0; i < tile_points; i += block_points<T>) {
        Block<T, width> block = {};
        accumulate<true, T, width, num_vectors>(
            points + i, depth, columns + first * depth, block);
#pragma GCC unroll 4
        for (int64_t v = 0; v < num_vectors; ++v) {
          const Vec<T> old = load(lowest + i + v * lanes<T>);
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
            store(
                potentials[c] + i + v * lanes<T>,
                block[c][v] < old ? block[c][v] : old);
          }
        }
      }
      for (int c = 0; c < width; ++c) {
        sums[tile * candidates + first + c] =
            sum_all(potentials[c], tile_points);
      }
    });
  }
}

/// The nearest of the packed columns for each point of a tile.
template <bool exact, typename T, typename IndexLane>
KDCI_INLINE void nearest_columns(
    const T* points,
    int64_t depth,
    const T* columns,
    const T* bias,
    int64_t num_columns,
    IndexLane* nearest) {
  using Index = Mask<T>;
  for (int64_t i = 0; i < tile_points; i += block_points<T>) {
    Vec<T> best[num_vectors];
    Index index[num_vectors];
    for (int64_t v = 0; v < num_vectors; ++v) {
      best[v] = broadcast(static_cast<T>(__builtin_inf()));
      index[v] = Index{};
    }
    for_groups(num_columns, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int width = decltype(group)::value;
      Block<T, width> block;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
        const Vec<T> start = exact ? Vec<T>{} : broadcast(bias[first + c]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < num_vectors; ++v) {
          block[c][v] = start;
        }
      }
      accumulate<exact, T, width, num_vectors>(
          points + i, depth, columns + first * depth, block);
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
        const Index center = static_cast<IndexLane>(first + c) - Index{};
#pragma GCC unroll 4
        for (int64_t v = 0; v < num_vectors; ++v) {
          const Index better = block[c][v] < best[v];
          best[v] = better ? block[c][v] : best[v];
          index[v] = better ? center : index[v];
        }
      }
    });
    for (int64_t v = 0; v < num_vectors; ++v) {
      for (int64_t j = 0; j < lanes<T>; ++j) {
        nearest[i + v * lanes<T> + j] = index[v][j];
      }
    }
  }
}

template <typename T>
void assign_tiles(
    const T* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    int64_t n,
    const T* columns,
    const T* bias,
    int64_t num_centers,
    int64_t* labels,
    int32_t* previous,
    uint64_t* moved) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* points = tiles + tile * depth * tile_points;
    decltype(Mask<T>{}[0] + 0) nearest[tile_points];
    if (bias == nullptr) {
      nearest_columns<true>(points, depth, columns, bias, num_centers, nearest);
    } else {
      nearest_columns<false>(
          points, depth, columns, bias, num_centers, nearest);
    }
    const int64_t start = tile * tile_points;
    const int64_t count = n - start < tile_points ? n - start : tile_points;
    uint64_t changes = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t old = labels[start + i];
      changes |= static_cast<uint64_t>(old != nearest[i]) << i;
      previous[start + i] = static_cast<int32_t>(old);
      labels[start + i] = nearest[i];
    }
    moved[tile] = changes;
  }
}

template <typename T>
void add_points(
    const T* tiles,
    int64_t depth,
    int64_t first,
    int64_t last,
    int64_t n,
    const int64_t* labels,
    int64_t num_centers,
    double* sums) {
  for (int64_t start = 0; start < n; start += tile_points) {
    const int64_t count = n - start < tile_points ? n - start : tile_points;
    for (int64_t k = first; k < last; ++k) {
      const T* points = tiles + start * depth + k * tile_points;
      double* sum = sums + k * num_centers;
      for (int64_t i = 0; i < count; ++i) {
        sum[labels[start + i]] += points[i];
      }
    }
  }
}

template <typename T>
void move_points(
    const T* tiles,
    int64_t depth,
    int64_t first,
    int64_t last,
    int64_t n,
    const int64_t* labels,
    const int32_t* previous,
    const uint64_t* moved,
    int64_t num_centers,
    double* sums) {
  for (int64_t start = 0; start < n; start += tile_points) {
    const T* points = tiles + start * depth;
    uint64_t changes = moved[start / tile_points];
    for (; changes != 0; changes &= changes - 1) {
      const int64_t i = __builtin_ctzll(changes);
      double* from = sums + previous[start + i];
      double* to = sums + labels[start + i];
      for (int64_t k = first; k < last; ++k) {
        const double value = points[k * tile_points + i];
        from[k * num_centers] -= value;
        to[k * num_centers] += value;
      }
    }
  }
}

template <typename T>
void own_distances(
    const T* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    int64_t n,
    const T* centers,
    int64_t num_centers,
    const int64_t* labels,
    T* distances,
    double* sums) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t start = tile * tile_points;
    const int64_t count = n - start < tile_points ? n - start : tile_points;
    const T* points = tiles + start * depth;
    double squares[tile_points] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const T* center = centers + k * num_centers;
      for (int64_t i = 0; i < count; ++i) {
        const double difference =
            static_cast<double>(points[k * tile_points + i]) -
            static_cast<double>(center[labels[start + i]]);
        squares[i] += difference * difference;
      }
    }
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      distances[start + i] = static_cast<T>(squares[i]);
      sum += squares[i];
    }
    sums[tile] = sum;
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
    for (int64_t k = first; k < last; ++k) {
      sum[k] += rows[i * d + k];
    }
  }
}

template <typename T>
constexpr KmeansKernels<T> table = {
    column_stats<T>,
    center_rows<T>,
    center_tile<T>,
    project_tile<T>,
    add_products<T>,
    inner_products<T>,
    square_sum<T>,
    seed_tiles<T>,
    assign_tiles<T>,
    add_points<T>,
    move_points<T>,
    own_distances<T>,
    add_rows<T>,
};

} // namespace

extern const KmeansKernels<float> kmeans_kernels_float = table<float>;
extern const KmeansKernels<double> kmeans_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
