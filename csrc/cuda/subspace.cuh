// SPDX-License-Identifier: Apache-2.0
//
// The leading eigenvectors of a scatter matrix. Small ones are solved whole by
// Jacobi rotations, larger ones by Chebyshev-filtered subspace iteration (Zhou,
// Saad, Tiago & Chelikowsky, 2006): filter, orthonormalise, Rayleigh-Ritz step.
#pragma once

#include <math.h>

#include "block.cuh"
#include "dictionary.h"
#include "team.cuh"

namespace kdci::cuda {

// Matrices up to this order are always solved whole.
constexpr int64_t kDirectOrder = 32;
// Columns iterated beyond those that are wanted.
constexpr int64_t kOversampling = 16;
constexpr int kMaxCycles = 12;
constexpr int kMaxDegree = 8;
// Converged when a cycle adds less than this share of captured variance.
constexpr double kCapturedTol = 1e-7;
// Sweeps of Jacobi rotations in the first cycle, whose subspace is a guess yet.
constexpr int kFirstSweeps = 3;
constexpr int kMaxSweeps = 20;

/// The two rows that pair `p` of round `round` rotates: over `players - 1`
/// rounds (a round-robin tournament) every two rows meet once.
__device__ inline void tournament_pair(
    int round,
    int p,
    int players,
    int& i,
    int& j) {
  const int circle = players - 1;
  int a = circle;
  int b = round;
  if (p > 0) {
    a = round + p < circle ? round + p : round + p - circle;
    b = round >= p ? round - p : round - p + circle;
  }
  i = minimum(a, b);
  j = maximum(a, b);
}

/// Eigenvalues (on the diagonal of `g` [b, b]) and eigenvectors (rows of
/// `vectors` [b, b]) of a symmetric matrix, by at most `sweeps` sweeps of
/// cyclic Jacobi rotations in one block. Off-diagonal entries below `precision`
/// of the largest eigenvalue, and of the two they couple, are left. `order`
/// lists the eigenvalues from the largest.
__device__ inline void jacobi_eigen(
    double* g,
    double* vectors,
    int b,
    double* rotations,
    int64_t* order,
    double precision,
    int sweeps) {
  double largest = 0;
  for (int e = threadIdx.x; e < b * b; e += blockDim.x) {
    const bool diagonal = e / b == e % b;
    vectors[e] = diagonal ? 1 : 0;
    if (diagonal) {
      largest = maximum(largest, fabs(g[e]));
    }
  }
  // Also the barrier that makes `vectors` visible.
  const double negligible = precision * block_reduce(largest, Max());
  const double coupled = 100 * precision * precision;
  const int players = b + b % 2;
  const int pairs = players / 2;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    int rotated = 0;
    for (int round = 0; round < players - 1; ++round) {
      for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        int i;
        int j;
        tournament_pair(round, p, players, i, j);
        double cosine = 1;
        double sine = 0;
        if (j < b) {
          const double off = g[i * b + j];
          const double low = g[i * b + i];
          const double high = g[j * b + j];
          if (fabs(off) > negligible &&
              off * off > coupled * fabs(low * high)) {
            const double gap = high - low;
            const double twice = 2 * off;
            const double tangent = (gap < 0 ? -twice : twice) /
                (fabs(gap) + sqrt(gap * gap + twice * twice));
            cosine = rsqrt(1 + tangent * tangent);
            sine = tangent * cosine;
            rotated = 1;
          }
        }
        rotations[2 * p] = cosine;
        rotations[2 * p + 1] = sine;
      }
      __syncthreads();
      // Each 2 x 2 block is read and written by one thread alone.
      for (int e = threadIdx.x; e < pairs * pairs; e += blockDim.x) {
        const int p1 = e / pairs;
        const int p2 = e % pairs;
        const double c1 = rotations[2 * p1];
        const double s1 = rotations[2 * p1 + 1];
        const double c2 = rotations[2 * p2];
        const double s2 = rotations[2 * p2 + 1];
        if (p1 > p2 || (s1 == 0 && s2 == 0)) {
          continue;
        }
        int i1;
        int j1;
        int i2;
        int j2;
        tournament_pair(round, p1, players, i1, j1);
        tournament_pair(round, p2, players, i2, j2);
        // An odd b leaves one row without a partner: index b stands for it.
        const bool has1 = j1 < b;
        const bool has2 = j2 < b;
        const double ii = g[i1 * b + i2];
        const double ij = has2 ? g[i1 * b + j2] : 0;
        const double ji = has1 ? g[j1 * b + i2] : 0;
        const double jj = has1 && has2 ? g[j1 * b + j2] : 0;
        const double left_ii = c1 * ii - s1 * ji;
        const double left_ij = c1 * ij - s1 * jj;
        const double left_ji = s1 * ii + c1 * ji;
        const double left_jj = s1 * ij + c1 * jj;
        const double new_ii = c2 * left_ii - s2 * left_ij;
        const double new_jj = s2 * left_ji + c2 * left_jj;
        double new_ij = s2 * left_ii + c2 * left_ij;
        double new_ji = c2 * left_ji - s2 * left_jj;
        if (p1 == p2) {
          new_ij = 0;
          new_ji = 0;
        }
        g[i1 * b + i2] = new_ii;
        g[i2 * b + i1] = new_ii;
        if (has2) {
          g[i1 * b + j2] = new_ij;
          g[j2 * b + i1] = new_ij;
        }
        if (has1) {
          g[j1 * b + i2] = new_ji;
          g[i2 * b + j1] = new_ji;
        }
        if (has1 && has2) {
          g[j1 * b + j2] = new_jj;
          g[j2 * b + j1] = new_jj;
        }
      }
      for (int e = threadIdx.x; e < pairs * b; e += blockDim.x) {
        const int p = e / b;
        const int k = e % b;
        const double cosine = rotations[2 * p];
        const double sine = rotations[2 * p + 1];
        if (sine == 0) {
          continue;
        }
        int i;
        int j;
        tournament_pair(round, p, players, i, j);
        const double vi = vectors[i * b + k];
        const double vj = vectors[j * b + k];
        vectors[i * b + k] = cosine * vi - sine * vj;
        vectors[j * b + k] = sine * vi + cosine * vj;
      }
      __syncthreads();
    }
    if (!block_reduce(rotated, Max())) {
      break;
    }
  }
  for (int k = threadIdx.x; k < b; k += blockDim.x) {
    const double value = g[k * b + k];
    int rank = 0;
    for (int other = 0; other < b; ++other) {
      const double that = g[other * b + other];
      rank += that > value || (that == value && other < k) ? 1 : 0;
    }
    order[rank] = k;
  }
  __syncthreads();
}

/// The small matrix of a step that one block does, and what goes with it: in
/// shared memory as far as it fits, else in the workspace.
struct SolverMatrices {
  double* rotations; // [2 b + 2]
  double* g;         // [b, b]
  double* vectors;   // [b, b]

  __device__ SolverMatrices(const Subspace& p, int b)
      : rotations(p.rotations), g(p.small), vectors(p.vectors) {
    double* shared = reinterpret_cast<double*>(dynamic_shared);
    int64_t left = p.shared_bytes / static_cast<int64_t>(sizeof(double));
    for (double** part : {&rotations, &g, &vectors}) {
      const int64_t size = part == &rotations ? 2 * b + 2 : int64_t(b) * b;
      if (size > left) {
        return;
      }
      *part = shared;
      shared += size;
      left -= size;
    }
  }
};

/// The whole scatter matrix at once: leading eigenvectors and values.
__device__ inline void solve_directly(const Subspace& p) {
  const int m = static_cast<int>(p.m);
  const SolverMatrices solver(p, m);
  for (int64_t e = threadIdx.x; e < p.m * p.m; e += blockDim.x) {
    solver.g[e] = p.scatter[e];
  }
  __syncthreads();
  jacobi_eigen(
      solver.g,
      solver.vectors,
      m,
      solver.rotations,
      p.order,
      p.precision,
      kMaxSweeps);
  for (int64_t e = threadIdx.x; e < p.m * p.q; e += blockDim.x) {
    p.leading[e] = solver.vectors[p.order[e % p.q] * p.m + e / p.q];
  }
  for (int64_t j = threadIdx.x; j < p.q; j += blockDim.x) {
    p.values[j] = solver.g[p.order[j] * p.m + p.order[j]];
  }
}

/// A fixed pseudo-random start: any generic subspace serves.
__device__ inline void start_subspace(
    const Subspace& p,
    int64_t block,
    int64_t blocks) {
  for (int64_t e = block * blockDim.x + threadIdx.x; e < p.m * p.width;
       e += blocks * blockDim.x) {
    // The finaliser of splitmix64.
    uint64_t bits = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(e + 1);
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    p.even[e] = static_cast<double>(bits >> 11) * 0x1p-52 - 1;
  }
}

/// The subspace that the last filter left.
__device__ inline const double* filtered(const Subspace& p) {
  return p.state->degree % 2 == 0 ? p.even : p.odd;
}

using SolverTile = Tile<double, 2>;

/// left^T right [width, width], over slices of the m rows: of the filtered
/// subspace with itself, or of the basis with its image.
__device__ inline void gram_partials(
    const Subspace& p,
    int64_t block,
    int64_t blocks,
    bool with_image) {
  constexpr int64_t side = SolverTile::kSide;
  const double* left = with_image ? p.basis : filtered(p);
  const double* right = with_image ? p.image : left;
  const int64_t width = p.width;
  const int64_t tiles = ceil_div(width, side);
  const int64_t depth = ceil_div(p.m, p.gram_slices);
  const int64_t items = p.gram_slices * tiles * tiles;
  for (int64_t item = block; item < items; item += blocks) {
    const int64_t slice = item / (tiles * tiles);
    const int64_t row = item / tiles % tiles * side;
    const int64_t column = item % tiles * side;
    SolverTile tile;
    tile.clear();
    tile.accumulate(
        row,
        column,
        width,
        width,
        minimum(p.m, slice * depth),
        minimum(p.m, (slice + 1) * depth),
        false,
        false,
        [=](int64_t i, int64_t k) { return left[k * width + i]; },
        [=](int64_t k, int64_t j) { return right[k * width + j]; },
        MultiplyAdd());
    double* out = p.gram_partial + slice * width * width;
    tile.store(
        row, column, width, width, [=](int64_t i, int64_t j, double sum) {
          out[i * width + j] = sum;
        });
  }
}

/// g = the sum of the slices of gram_partials(), made exactly symmetric.
__device__ inline void sum_gram(const Subspace& p, double* g) {
  const int64_t size = p.width * p.width;
  for (int64_t e = threadIdx.x; e < size; e += blockDim.x) {
    const int64_t mirrored = e % p.width * p.width + e / p.width;
    double sum = 0;
    for (int64_t slice = 0; slice < p.gram_slices; ++slice) {
      // Commutative, so that both triangles get the same bits.
      sum += p.gram_partial[slice * size + e] +
          p.gram_partial[slice * size + mirrored];
    }
    g[e] = sum / 2;
  }
  __syncthreads();
}

/// transform = D L^-T where D G D = L L^T and D makes the diagonal of the Gram
/// matrix G one: then filtered * transform has orthonormal columns. A column
/// that depends on those before it becomes zero.
__device__ inline void orthonormalize(const Subspace& p) {
  const int b = static_cast<int>(p.width);
  const SolverMatrices solver(p, b);
  double* g = solver.g;
  double* inverse = solver.vectors; // its lower triangle
  sum_gram(p, g);
  for (int i = threadIdx.x; i < b; i += blockDim.x) {
    const double norm = g[i * b + i];
    p.values[i] = norm > 0 ? 1 / sqrt(norm) : 0;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < b * b; e += blockDim.x) {
    g[e] *= p.values[e / b] * p.values[e % b];
    inverse[e] = 0;
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  for (int j = 0; j < b; ++j) {
    const double pivot = g[j * b + j];
    const double over_root = pivot > 1e-12 ? 1 / sqrt(pivot) : 0;
    __syncthreads();
    for (int i = threadIdx.x; i < b; i += blockDim.x) {
      if (i >= j) {
        g[i * b + j] *= over_root;
      }
      if (i <= j) {
        inverse[j * b + i] = (i == j ? 1 : inverse[j * b + i]) * over_root;
      }
    }
    __syncthreads();
    for (int i = j + 1 + warp; i < b; i += warps) {
      const double factor = g[i * b + j];
      for (int c = lane; c <= i; c += 32) {
        if (c <= j) {
          inverse[i * b + c] -= factor * inverse[j * b + c];
        } else {
          g[i * b + c] -= factor * g[c * b + j];
        }
      }
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < b * b; e += blockDim.x) {
    const int k = e / b;
    const int c = e % b;
    p.transform[e] = k <= c ? p.values[k] * inverse[c * b + k] : 0;
  }
}

/// out [m, width] = left [m, width] * transform, tile by tile.
template <typename Store>
__device__ void times_transform(
    int64_t item,
    int64_t m,
    int64_t width,
    const double* left,
    const double* transform,
    SolverTile& tile,
    Store store) {
  const int64_t tiles = ceil_div(width, SolverTile::kSide);
  const int64_t row = item / tiles * SolverTile::kSide;
  const int64_t column = item % tiles * SolverTile::kSide;
  tile.clear();
  tile.accumulate(
      row,
      column,
      m,
      width,
      0,
      width,
      true,
      false,
      [=](int64_t i, int64_t k) { return left[i * width + k]; },
      [=](int64_t k, int64_t j) { return transform[k * width + j]; },
      MultiplyAdd());
  tile.store(row, column, m, width, store);
}

inline __host__ __device__ int64_t subspace_tiles(int64_t m, int64_t width) {
  return ceil_div(m, SolverTile::kSide) * ceil_div(width, SolverTile::kSide);
}

__device__ inline void form_basis(
    const Subspace& p,
    int64_t block,
    int64_t blocks) {
  const double* source = filtered(p);
  double* out = p.basis;
  const int64_t width = p.width;
  const int64_t tiles = subspace_tiles(p.m, width);
  for (int64_t item = block; item < tiles; item += blocks) {
    SolverTile tile;
    times_transform(
        item,
        p.m,
        width,
        source,
        p.transform,
        tile,
        [=](int64_t i, int64_t j, double sum) { out[i * width + j] = sum; });
  }
}

/// One tile of scatter * right.
template <typename Store>
__device__ void times_scatter(
    const Subspace& p,
    int64_t item,
    const double* right,
    Store store) {
  const double* scatter = p.scatter;
  const int64_t m = p.m;
  const int64_t width = p.width;
  const int64_t tiles = ceil_div(width, SolverTile::kSide);
  const int64_t row = item / tiles * SolverTile::kSide;
  const int64_t column = item % tiles * SolverTile::kSide;
  SolverTile tile;
  tile.clear();
  tile.accumulate(
      row,
      column,
      m,
      width,
      0,
      m,
      false,
      false,
      // Symmetric, and read along rows.
      [=](int64_t i, int64_t k) { return scatter[k * m + i]; },
      [=](int64_t k, int64_t j) { return right[k * width + j]; },
      MultiplyAdd());
  tile.store(row, column, m, width, store);
}

__device__ inline void form_image(
    const Subspace& p,
    int64_t block,
    int64_t blocks) {
  double* out = p.image;
  const int64_t width = p.width;
  const int64_t tiles = subspace_tiles(p.m, width);
  for (int64_t item = block; item < tiles; item += blocks) {
    times_scatter(p, item, p.basis, [=](int64_t i, int64_t j, double sum) {
      out[i * width + j] = sum;
    });
  }
}

/// Ritz values and vectors, whether they have converged, and otherwise the
/// filter for the next cycle: the Chebyshev polynomial that damps everything
/// below the smallest Ritz value.
__device__ inline void ritz_step(const Subspace& p, int cycle) {
  const int b = static_cast<int>(p.width);
  const SolverMatrices solver(p, b);
  sum_gram(p, solver.g);
  jacobi_eigen(
      solver.g,
      solver.vectors,
      b,
      solver.rotations,
      p.order,
      p.precision,
      cycle == 0 ? kFirstSweeps : kMaxSweeps);
  for (int e = threadIdx.x; e < b * b; e += blockDim.x) {
    p.transform[e] = solver.vectors[p.order[e % b] * b + e / b];
  }
  for (int j = threadIdx.x; j < b; j += blockDim.x) {
    p.values[j] = solver.g[p.order[j] * b + p.order[j]];
  }
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  double captured = 0;
  for (int64_t j = 0; j < p.q; ++j) {
    captured += p.values[j];
  }
  DictionaryState& state = *p.state;
  const bool last = cycle == kMaxCycles - 1;
  // Written so that a NaN ends the search as well.
  if (last ||
      (cycle > 0 && !(captured - state.captured > kCapturedTol * captured))) {
    state.converged = 1;
  }
  state.captured = captured;
  const double top = p.values[0];
  const double bottom = p.values[b - 1];
  if (!(bottom > 1e-10 * top)) {
    // Nothing to damp: one plain power step.
    state.center = 0;
    state.radius = top > 0 ? top : 1;
    state.degree = 1;
    return;
  }
  state.center = bottom / 2;
  state.radius = bottom / 2;
  // The filter may not drown small columns in the rounding of large ones. In
  // later cycles the columns are nearly eigenvectors and bear more growth.
  const double growth = cycle == 0 ? 12 : 24; // ln of twice the bound
  const double reach = acosh((top - state.center) / state.radius);
  const double steps = growth / maximum(reach, 1e-3);
  state.degree = steps < 1 ? 1
      : steps > kMaxDegree ? kMaxDegree
                           : static_cast<int>(steps);
}

/// even = basis * transform = V, odd = (image * transform - c V) / e: the
/// Chebyshev polynomials of degree 0 and 1.
__device__ inline void rotate_basis(
    const Subspace& p,
    int64_t block,
    int64_t blocks) {
  double* even = p.even;
  double* odd = p.odd;
  const double center = p.state->center;
  const double radius = p.state->radius;
  const int64_t width = p.width;
  const int64_t tiles = subspace_tiles(p.m, width);
  for (int64_t item = block; item < tiles; item += blocks) {
    SolverTile tile;
    times_transform(
        item,
        p.m,
        width,
        p.basis,
        p.transform,
        tile,
        [=](int64_t i, int64_t j, double sum) { even[i * width + j] = sum; });
    // The same thread has just written the element it reads.
    times_transform(
        item,
        p.m,
        width,
        p.image,
        p.transform,
        tile,
        [=](int64_t i, int64_t j, double sum) {
          const int64_t e = i * width + j;
          odd[e] = (sum - center * even[e]) / radius;
        });
  }
}

/// T_k = 2 (C - c) / e T_(k-1) - T_(k-2), in the place of T_(k-2).
__device__ inline void filter_step(
    const Subspace& p,
    int64_t block,
    int64_t blocks,
    int step) {
  const double* current = step % 2 == 0 ? p.odd : p.even;
  double* out = step % 2 == 0 ? p.even : p.odd;
  const double center = p.state->center;
  const double factor = 2 / p.state->radius;
  const int64_t width = p.width;
  const int64_t tiles = subspace_tiles(p.m, width);
  for (int64_t item = block; item < tiles; item += blocks) {
    times_scatter(p, item, current, [=](int64_t i, int64_t j, double sum) {
      const int64_t e = i * width + j;
      out[e] = factor * (sum - center * current[e]) - out[e];
    });
  }
}

__device__ inline void take_leading(
    const Subspace& p,
    int64_t block,
    int64_t blocks) {
  for (int64_t e = block * blockDim.x + threadIdx.x; e < p.m * p.q;
       e += blocks * blockDim.x) {
    p.leading[e] = p.even[e / p.q * p.width + e % p.q];
  }
}

/// The leading eigenvectors of p.scatter, by all blocks of a team. All of them
/// must have written it, and it is written over.
template <typename Team>
__device__ __noinline__ void find_subspace(
    const Subspace& p,
    const Team& team) {
  const int64_t rank = team.rank();
  const int64_t size = team.size();
  if (p.direct) {
    if (rank == 0) {
      solve_directly(p);
    }
    team.sync();
    return;
  }
  start_subspace(p, rank, size);
  team.sync();
  for (int cycle = 0;; ++cycle) {
    gram_partials(p, rank, size, false);
    team.sync();
    if (rank == 0) {
      orthonormalize(p);
    }
    team.sync();
    form_basis(p, rank, size);
    team.sync();
    form_image(p, rank, size);
    team.sync();
    gram_partials(p, rank, size, true);
    team.sync();
    if (rank == 0) {
      ritz_step(p, cycle);
    }
    team.sync();
    rotate_basis(p, rank, size);
    team.sync();
    if (p.state->converged) {
      break;
    }
    for (int step = 2; step <= p.state->degree; ++step) {
      filter_step(p, rank, size, step);
      team.sync();
    }
  }
  take_leading(p, rank, size);
  team.sync();
}

} // namespace kdci::cuda
