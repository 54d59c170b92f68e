// SPDX-License-Identifier: Apache-2.0
//
// The rows to cluster: centred, scaled and projected on the leading principal
// directions. Only the subspace matters, since distances do not change under a
// rotation.
#pragma once

#include <math.h>

#include "block.cuh"
#include "dictionary.h"
#include "team.cuh"

namespace kdci::cuda {

/// Row `r`, column `c` of the centred and scaled features.
template <typename A>
struct Centered {
  const A* rows;
  int64_t d;
  const double* mean;
  double scale;

  __device__ A operator()(int64_t r, int64_t c) const {
    const double value = static_cast<double>(rows[r * d + c]);
    return static_cast<A>((value - mean[c]) * scale);
  }
};

template <typename A>
__device__ Centered<A> centered(const Projection<A>& p) {
  return {p.features, p.d, p.mean, p.state->scale};
}

template <typename A>
__device__ void column_sums(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  __shared__ double lane_sum[8][33];
  const int x = threadIdx.x % 32;
  const int y = threadIdx.x / 32;
  const int64_t tiles = ceil_div(p.d, 32);
  for (int64_t item = block; item < p.slices * tiles; item += blocks) {
    const int64_t slice = item / tiles;
    const int64_t column = item % tiles * 32 + x;
    const int64_t end = minimum(p.n, (slice + 1) * p.slice_rows);
    double sum = 0;
    if (column < p.d) {
#pragma unroll 8
      for (int64_t r = slice * p.slice_rows + y; r < end; r += 8) {
        sum += static_cast<double>(p.features[r * p.d + column]);
      }
    }
    lane_sum[y][x] = sum;
    __syncthreads();
    if (y == 0 && column < p.d) {
      for (int lane = 1; lane < 8; ++lane) {
        sum += lane_sum[lane][x];
      }
      p.column_partial[slice * p.d + column] = sum;
    }
    __syncthreads();
  }
}

template <typename A>
__device__ void column_means(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  __shared__ double lane_sum[8][33];
  const int x = threadIdx.x % 32;
  const int y = threadIdx.x / 32;
  for (int64_t item = block; item < ceil_div(p.d, 32); item += blocks) {
    const int64_t column = item * 32 + x;
    double sum = 0;
    if (column < p.d) {
      for (int64_t slice = y; slice < p.slices; slice += 8) {
        sum += p.column_partial[slice * p.d + column];
      }
    }
    lane_sum[y][x] = sum;
    __syncthreads();
    if (y == 0 && column < p.d) {
      for (int lane = 1; lane < 8; ++lane) {
        sum += lane_sum[lane][x];
      }
      p.mean[column] = sum / static_cast<double>(p.n);
    }
    __syncthreads();
  }
}

template <typename A>
__device__ void spread_partials(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  for (int64_t slice = block; slice < p.slices; slice += blocks) {
    const int64_t end = minimum(p.n, (slice + 1) * p.slice_rows);
    double largest = 0;
    for (int64_t r = slice * p.slice_rows + threadIdx.x / 32; r < end; r += 8) {
      for (int64_t c = threadIdx.x % 32; c < p.d; c += 32) {
        const double value = static_cast<double>(p.features[r * p.d + c]);
        largest = maximum(largest, fabs(value - p.mean[c]));
      }
    }
    largest = block_reduce(largest, Max());
    if (threadIdx.x == 0) {
      p.spread_partial[slice] = largest;
    }
  }
}

template <typename A>
__device__ void set_scale(const Projection<A>& p) {
  int bad = 0;
  for (int64_t c = threadIdx.x; c < p.d; c += blockDim.x) {
    bad |= isfinite(p.mean[c]) ? 0 : 1;
  }
  // A starting prototype of NaN would pass for an empty cluster.
  for (int64_t e = threadIdx.x; e < p.initial_rows * p.d; e += blockDim.x) {
    bad |= isfinite(p.initial[e]) ? 0 : 1;
  }
  double largest = 0;
  for (int64_t slice = threadIdx.x; slice < p.slices; slice += blockDim.x) {
    largest = maximum(largest, p.spread_partial[slice]);
  }
  bad = block_reduce(bad, Max());
  largest = block_reduce(largest, Max());
  if (threadIdx.x == 0) {
    DictionaryState state = {};
    // The difference of two finite float64 numbers can overflow.
    state.finite = bad == 0 && isfinite(largest);
    int exponent = 0;
    if (state.finite) {
      frexp(largest, &exponent);
    }
    // 2^1000 is representable with any float64 value below 2^-1000.
    state.scale = ldexp(1.0, -maximum(exponent, -1000));
    *p.state = state;
  }
}

/// q == d: the centred rows themselves, filled up with zeros.
template <typename A>
__device__ void copy_centered(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks,
    bool initial) {
  Centered<A> source = centered(p);
  source.rows = initial ? p.initial : p.features;
  A* out = initial ? p.initial_points : p.points;
  const int64_t rows = initial ? p.initial_rows : p.n;
  for (int64_t r = block * 8 + threadIdx.x / 32; r < rows; r += blocks * 8) {
    for (int64_t c = threadIdx.x % 32; c < p.stride; c += 32) {
      out[r * p.stride + c] = c < p.d ? source(r, c) : A(0);
    }
  }
}

/// Upper triangle, by tiles, of Y^T Y or Y Y^T over a slice of the depth.
template <typename A>
__device__ void scatter_partials(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  constexpr int64_t side = Tile<A, 4>::kSide;
  const Centered<A> y = centered(p);
  const bool gram = p.gram;
  const int64_t tiles = ceil_div(p.subspace.m, side);
  const int64_t depth = gram ? p.d : p.n;
  const int64_t slice_depth = ceil_div(depth, p.scatter_slices);
  const int64_t items = p.scatter_slices * tiles * tiles;
  for (int64_t item = block; item < items; item += blocks) {
    const int64_t slice = item / (tiles * tiles);
    const int64_t row = item / tiles % tiles * side;
    const int64_t column = item % tiles * side;
    if (column < row) {
      continue;
    }
    Tile<A, 4> tile;
    tile.clear();
    tile.accumulate(
        row,
        column,
        p.subspace.m,
        p.subspace.m,
        minimum(depth, slice * slice_depth),
        minimum(depth, (slice + 1) * slice_depth),
        gram,
        gram,
        [=](int64_t i, int64_t k) { return gram ? y(i, k) : y(k, i); },
        [=](int64_t k, int64_t j) { return gram ? y(j, k) : y(k, j); },
        MultiplyAdd());
    double* out = p.scatter_partial + slice * p.subspace.m * p.subspace.m;
    const int64_t m = p.subspace.m;
    tile.store(row, column, m, m, [=](int64_t i, int64_t j, double sum) {
      out[i * m + j] = sum;
    });
  }
}

template <typename A>
__device__ void scatter_sum(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  const int64_t size = p.subspace.m * p.subspace.m;
  for (int64_t e = block * blockDim.x + threadIdx.x; e < size;
       e += blocks * blockDim.x) {
    const int64_t i = e / p.subspace.m;
    const int64_t j = e % p.subspace.m;
    const int64_t source = i <= j ? e : j * p.subspace.m + i;
    double sum = 0;
    for (int64_t slice = 0; slice < p.scatter_slices; ++slice) {
      sum += p.scatter_partial[slice * size + source];
    }
    p.subspace.scatter[e] = sum;
  }
}

constexpr int64_t kDirectionSide = Tile<double, 2>::kSide;

/// Y^T U / sqrt(eigenvalue): from eigenvectors of Y Y^T to those of Y^T Y.
template <typename A>
__device__ void form_directions(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks) {
  const Centered<A> y = centered(p);
  const double* leading = p.subspace.leading;
  const double* values = p.subspace.values;
  double* out = p.directions;
  const int64_t q = p.q;
  // Y Y^T is made of sums in A, and so are its smallest eigenvalues: to
  // divide by less than their rounding would blow noise up.
  const double negligible = (sizeof(A) == 4 ? 5e-7 : 1e-14) * values[0];
  const int64_t tiles = ceil_div(q, kDirectionSide);
  const int64_t items = ceil_div(p.d, kDirectionSide) * tiles;
  for (int64_t item = block; item < items; item += blocks) {
    const int64_t row = item / tiles * kDirectionSide;
    const int64_t column = item % tiles * kDirectionSide;
    Tile<double, 2> tile;
    tile.clear();
    tile.accumulate(
        row,
        column,
        p.d,
        q,
        0,
        p.n,
        false,
        false,
        [=](int64_t i, int64_t k) { return static_cast<double>(y(k, i)); },
        [=](int64_t k, int64_t j) { return leading[k * q + j]; },
        MultiplyAdd());
    tile.store(row, column, p.d, q, [=](int64_t i, int64_t j, double sum) {
      // A direction without variance has no say in distances.
      const bool kept = values[j] > negligible;
      out[i * q + j] = kept ? sum / sqrt(values[j]) : 0;
    });
  }
}

/// points = Y * directions.
template <typename A>
__device__ void project(
    const Projection<A>& p,
    int64_t block,
    int64_t blocks,
    bool initial) {
  constexpr int64_t side = Tile<A, 4>::kSide;
  Centered<A> y = centered(p);
  y.rows = initial ? p.initial : p.features;
  A* out = initial ? p.initial_points : p.points;
  const double* directions = p.directions;
  const int64_t rows = initial ? p.initial_rows : p.n;
  const int64_t q = p.q;
  const int64_t stride = p.stride;
  const int64_t tiles = ceil_div(stride, side);
  for (int64_t item = block; item < ceil_div(rows, side) * tiles;
       item += blocks) {
    const int64_t row = item / tiles * side;
    const int64_t column = item % tiles * side;
    Tile<A, 4> tile;
    tile.clear();
    tile.accumulate(
        row,
        column,
        rows,
        stride,
        0,
        p.d,
        true,
        false,
        y,
        [=](int64_t k, int64_t j) {
          return j < q ? static_cast<A>(directions[k * q + j]) : A(0);
        },
        MultiplyAdd());
    tile.store(
        row, column, rows, stride, [=](int64_t i, int64_t j, double sum) {
          out[i * stride + j] = static_cast<A>(sum);
        });
  }
}

/// Mean and scale of the features, and then the points themselves or the
/// scatter matrix of which the directions are to be found. p.state->finite says
/// whether there is anything to go on with.
template <typename A, typename Team>
__device__ __noinline__ void prepare(const Projection<A>& p, const Team& team) {
  const int64_t rank = team.rank();
  const int64_t size = team.size();
  column_sums(p, rank, size);
  team.sync();
  column_means(p, rank, size);
  team.sync();
  spread_partials(p, rank, size);
  team.sync();
  if (rank == 0) {
    set_scale(p);
  }
  team.sync();
  if (!p.state->finite) {
    return;
  }
  if (p.q == p.d) {
    copy_centered(p, rank, size, false);
    copy_centered(p, rank, size, true);
  } else {
    scatter_partials(p, rank, size);
    team.sync();
    scatter_sum(p, rank, size);
  }
  team.sync();
}

/// The points, once the subspace is found.
template <typename A, typename Team>
__device__ __noinline__ void project_all(
    const Projection<A>& p,
    const Team& team) {
  const int64_t rank = team.rank();
  const int64_t size = team.size();
  if (p.gram) {
    form_directions(p, rank, size);
    team.sync();
  }
  project(p, rank, size, false);
  project(p, rank, size, true);
  team.sync();
}

} // namespace kdci::cuda
