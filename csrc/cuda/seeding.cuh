// SPDX-License-Identifier: Apache-2.0
//
// k-means++ (Arthur & Vassilvitskii, 2007), greedy: of several candidates for
// a centre the one stays that leaves the least potential. Two barriers of the
// team for each centre.
#pragma once

#include <math.h>

#include "block.cuh"
#include "dictionary.h"
#include "rows.cuh"
#include "team.cuh"

namespace kdci::cuda {

// Candidates whose distances a thread finds side by side.
constexpr int kCandidateGroup = 4;

/// Row `i` of a sample of `rows` of the `n` rows: one of each of `rows` strata,
/// scrambled so that periodic data cannot alias.
__device__ inline int64_t sample_row(int64_t i, int64_t rows, int64_t n) {
  if (rows == n) {
    return i;
  }
  const int64_t begin = i * n / rows;
  const int64_t end = (i + 1) * n / rows;
  const uint64_t hash = static_cast<uint32_t>(i) * 2654435769u;
  return begin +
      static_cast<int64_t>(hash * static_cast<uint64_t>(end - begin) >> 32);
}

/// The first of `count` weights at which `base` plus the running sum exceeds
/// `target`, else the last positive one; -1 if none is positive. `base` becomes
/// the sum before it. By all lanes of a warp.
template <typename T>
__device__ int64_t
first_above(const T* weights, int64_t count, double target, double& base) {
  constexpr unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  int64_t last = -1;
  double before_last = base;
  double running = base;
  for (int64_t begin = 0; begin < count; begin += 32) {
    const double weight =
        begin + lane < count ? static_cast<double>(weights[begin + lane]) : 0;
    double sum = weight;
    for (int offset = 1; offset < 32; offset *= 2) {
      const double below = __shfl_up_sync(all, sum, offset);
      sum += lane >= offset ? below : 0;
    }
    const unsigned positive = __ballot_sync(all, weight > 0);
    const unsigned above =
        __ballot_sync(all, weight > 0 && running + sum > target);
    const double before = running + (sum - weight);
    if (above != 0) {
      const int first = __ffs(static_cast<int>(above)) - 1;
      base = __shfl_sync(all, before, first);
      return begin + first;
    }
    if (positive != 0) {
      const int highest = 31 - __clz(static_cast<int>(positive));
      before_last = __shfl_sync(all, before, highest);
      last = begin + highest;
    }
    running += __shfl_sync(all, sum, 31);
  }
  base = before_last;
  return last;
}

/// Chooses p.clusters rows and writes them to p.centers. The team has at most
/// kMaxSeedTeam blocks.
template <typename A, typename Team>
__device__ __noinline__ void seed(
    const Clustering<A>& p,
    const SharedLayout& layout,
    const Team& team) {
  __shared__ double rank_sum[kMaxSeedTeam];
  __shared__ double run_sum[32];
  const int rank = team.rank();
  const int size = team.size();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int draws = static_cast<int>(p.candidates);
  const OwnRows own(p.seed_rows, rank, size);
  const int rows = static_cast<int>(own.end - own.begin);
  const int run = (rows + 31) / 32;

  const bool in_shared = layout.distances >= 0;
  A* distances = in_shared ? shared_at<A>(layout.distances)
                           : p.distances + own.begin; // [rows]
  A* trial = in_shared ? shared_at<A>(layout.trial)
                       : p.trial + own.begin; // [draws, trial_stride]
  const int64_t trial_stride =
      in_shared ? ceil_div(p.seed_rows, size) : p.seed_rows;
  // What this block leaves for the others, and its copy of what they left.
  double* left_potential = shared_at<double>(layout.potential);
  double* potential = left_potential + draws; // [size, count]
  int64_t* left_row = shared_at<int64_t>(layout.drawn);
  int64_t* candidate = left_row + draws; // [draws]
  const auto potential_box = [&](int of) {
    return team.box(left_potential, p.potentials, draws, of);
  };
  const auto row_box = [&](int of) {
    return team.box(left_row, p.draws, draws, of);
  };

  // Whatever the first uniform is, it must name a row.
  const int64_t first = sample_row(
      maximum(
          int64_t(0),
          minimum(
              p.seed_rows - 1,
              static_cast<int64_t>(
                  p.uniforms[0] * static_cast<double>(p.seed_rows)))),
      p.seed_rows,
      p.n);
  for (int i = threadIdx.x; i < rows; i += blockDim.x) {
    distances[i] = INFINITY;
    p.sample[own.begin + i] = sample_row(own.begin + i, p.seed_rows, p.n);
  }
  __syncthreads();
  if (layout.points < 0 && layout.seed_points >= 0) {
    copy_rows(
        p.points,
        own.begin,
        p.sample,
        rows,
        p.stride,
        shared_at<A>(layout.seed_points));
    __syncthreads();
  }
  for (int64_t k = 0; k < p.clusters; ++k) {
    const int count = k == 0 ? 1 : draws;
    if (k == 0) {
      if (threadIdx.x == 0) {
        candidate[0] = first;
      }
    } else {
      double total = 0;
      for (int r = 0; r < size; ++r) {
        total += rank_sum[r];
      }
      // The block that a draw falls in looks for its row.
      const auto find_owner = [&](int l, double& target, double& base) {
        target = p.uniforms[k * draws + l] * total;
        int owner = -1;
        double running = 0;
        base = 0;
        for (int r = 0; r < size; ++r) {
          if (rank_sum[r] > 0) {
            owner = r;
            base = running;
            running += rank_sum[r];
            if (running > target) {
              break;
            }
          }
        }
        return owner;
      };
      double target;
      double base;
      for (int l = warp; l < draws; l += warps) {
        if (find_owner(l, target, base) == rank) {
          const int64_t begin =
              first_above(run_sum, int64_t(32), target, base) * run;
          const int64_t row = begin +
              first_above(distances + begin,
                          minimum(int64_t(run), rows - begin),
                          target,
                          base);
          if (lane == 0) {
            row_box(rank)[l] = p.sample[own.begin + row];
          }
        }
      }
      team.sync();
      for (int l = threadIdx.x; l < draws; l += blockDim.x) {
        const int owner = find_owner(l, target, base);
        // No distance is left: every row equals a seed, so repeat the first.
        candidate[l] = owner < 0 ? first : row_box(owner)[l];
      }
    }
    __syncthreads();

    const int groups = (count + kCandidateGroup - 1) / kCandidateGroup;
    for (int item = threadIdx.x; item < groups * rows; item += blockDim.x) {
      const int group = item / rows * kCandidateGroup;
      const int i = item % rows;
      const A* x = layout.seed_points >= 0
          ? shared_at<A>(layout.seed_points) + i * shared_stride<A>(p.stride)
          : p.points + p.sample[own.begin + i] * p.stride;
      const A* c[kCandidateGroup];
      A sum[kCandidateGroup] = {};
#pragma unroll
      for (int j = 0; j < kCandidateGroup; ++j) {
        c[j] = p.points + candidate[minimum(group + j, count - 1)] * p.stride;
      }
      for (int64_t v = 0; v < p.stride; v += kVector<A>) {
        const Vector<A> left = load_vector(x + v);
#pragma unroll
        for (int j = 0; j < kCandidateGroup; ++j) {
          const Vector<A> right = load_vector(c[j] + v);
#pragma unroll
          for (int e = 0; e < kVector<A>; ++e) {
            const A difference = left.v[e] - right.v[e];
            sum[j] += difference * difference;
          }
        }
      }
      const A nearest = distances[i];
#pragma unroll
      for (int j = 0; j < kCandidateGroup; ++j) {
        if (group + j < count) {
          trial[(group + j) * trial_stride + i] = minimum(sum[j], nearest);
        }
      }
    }
    __syncthreads();
    for (int l = warp; l < count; l += warps) {
      double sum = 0;
      for (int i = lane; i < rows; i += 32) {
        sum += static_cast<double>(trial[l * trial_stride + i]);
      }
      sum = warp_reduce(sum, Add());
      if (lane == 0) {
        potential_box(rank)[l] = sum;
      }
    }
    team.sync();
    for (int e = threadIdx.x; e < size * count; e += blockDim.x) {
      potential[e] = potential_box(e / count)[e % count];
    }
    __syncthreads();

    // The first candidate with the least potential. A later one must be better
    // by more than rounding: exact ties are common (of two rows that are each
    // other's nearest either leaves the same), and CPU and CUDA are to break
    // them alike.
    double least = 0;
    int best = 0;
    for (int l = 0; l < count; ++l) {
      double sum = 0;
      for (int r = 0; r < size; ++r) {
        sum += potential[r * count + l];
      }
      if (l == 0 || sum < least * (1 - 1e-6)) {
        least = sum;
        best = l;
      }
    }
    if (threadIdx.x < static_cast<unsigned>(size)) {
      rank_sum[threadIdx.x] = potential[threadIdx.x * count + best];
    }
    for (int r = warp; r < 32; r += warps) {
      double sum = 0;
      for (int i = r * run + lane; i < minimum(rows, (r + 1) * run); i += 32) {
        const A distance = trial[best * trial_stride + i];
        distances[i] = distance;
        sum += static_cast<double>(distance);
      }
      sum = warp_reduce(sum, Add());
      if (lane == 0) {
        run_sum[r] = sum;
      }
    }
    if (k % size == rank) {
      const A* row = p.points + candidate[best] * p.stride;
      for (int64_t j = threadIdx.x; j < p.stride; j += blockDim.x) {
        p.centers[k * p.stride + j] = row[j];
      }
    }
    __syncthreads();
  }
  team.sync();
}

} // namespace kdci::cuda
