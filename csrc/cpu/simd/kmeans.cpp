// SPDX-License-Identifier: Apache-2.0
#include "kmeans.h"

#include "tile.h"

namespace kdci::KDCI_SIMD {
namespace {

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
constexpr KmeansKernels<T> table = {
    square_sum<T>,
    seed_tiles<T>,
    assign_tiles<T>,
    add_points<T>,
    move_points<T>,
    own_distances<T>,
};

} // namespace

extern const KmeansKernels<float> kmeans_kernels_float = table<float>;
extern const KmeansKernels<double> kmeans_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
