// SPDX-License-Identifier: Apache-2.0
//
// k-means++ seeding, Lloyd's iterations, and the dictionary made of the result.
// The device decides when to stop; launches after that return at once.
#include <math.h>

#include <type_traits>

#include "block.cuh"
#include "dictionary.h"
#include "phase.cuh"

namespace kdci::cuda {
namespace {

// Multiply-adds of one Lloyd iteration up to which one block does everything.
constexpr int64_t kOneBlockWork = 1 << 20;
constexpr int64_t kOneBlockRows = 4096;
// Partial sums of clusters kept at most.
constexpr int64_t kMaxPartials = 1 << 23;
// Runs of consecutive weights that a draw looks through side by side.
constexpr int kRuns = 64;

template <typename A>
__device__ A squared_distance(const A* a, const A* b, int64_t q) {
  A sum = 0;
  for (int64_t j = 0; j < q; ++j) {
    const A difference = a[j] - b[j];
    sum += difference * difference;
  }
  return sum;
}

struct FirstSeed {
  template <typename A>
  static __device__ void run(const Clustering<A>& p, int64_t block, int64_t) {
    if (block != 0 || threadIdx.x != 0 || !p.state->finite) {
      return;
    }
    const double place = p.uniforms[0] * static_cast<double>(p.n);
    p.chosen[0] = minimum(p.n - 1, static_cast<int64_t>(place));
  }
};

/// Brings the distances up to date with seed `k` and adds them up by slices.
struct UpdateDistances {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks,
      int64_t k) {
    if (!p.state->finite) {
      return;
    }
    const A* seed = p.points + p.chosen[k] * p.q;
    for (int64_t slice = block; slice < p.slices; slice += blocks) {
      const int64_t begin = slice * p.slice_rows;
      const int64_t end = minimum(p.n, begin + p.slice_rows);
      double sum = 0;
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        A distance = squared_distance(p.points + i * p.q, seed, p.q);
        if (k > 0) {
          distance = minimum(distance, p.distances[i]);
        }
        p.distances[i] = distance;
        sum += static_cast<double>(distance);
      }
      sum = block_reduce(sum, Add());
      if (threadIdx.x == 0) {
        p.slice_sum[slice] = sum;
      }
    }
  }
};

/// The first of `count` weights at which `base` plus the running sum exceeds
/// `target`, else the last positive one; -1 if none is positive. `base` becomes
/// the sum before it.
template <typename T>
__device__ int64_t
first_above(const T* weights, int64_t count, double target, double& base) {
  int64_t last = -1;
  double before_last = base;
  double running = base;
  // Unrolled whole for the known number of runs it took 146 registers.
#pragma unroll 4
  for (int64_t i = 0; i < count; ++i) {
    const double weight = static_cast<double>(weights[i]);
    if (weight > 0) {
      last = i;
      before_last = running;
      running += weight;
      if (running > target) {
        break;
      }
    }
  }
  base = before_last;
  return last;
}

/// Adds up kRuns runs of consecutive weights, one to a thread.
template <typename T>
__device__ void sum_runs(const T* weights, int64_t count, double* run_sum) {
  const int64_t run = ceil_div(count, kRuns);
  if (threadIdx.x < kRuns) {
    const int64_t begin = threadIdx.x * run;
    const int64_t end = minimum(count, begin + run);
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      sum += static_cast<double>(weights[i]);
    }
    run_sum[threadIdx.x] = sum;
  }
  __syncthreads();
}

/// first_above() through the runs whose sums are given.
template <typename T>
__device__ int64_t first_above_by_runs(
    const T* weights,
    int64_t count,
    const double* run_sum,
    double target,
    double& base) {
  const int64_t run = ceil_div(count, kRuns);
  const int64_t index =
      first_above(run_sum, static_cast<int64_t>(kRuns), target, base);
  if (index < 0) {
    return -1;
  }
  const int64_t begin = index * run;
  return begin +
      first_above(weights + begin, minimum(run, count - begin), target, base);
}

/// Draws the candidates of round `k`, each with probability proportional to
/// the distances.
struct DrawCandidates {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks,
      int64_t k) {
    if (!p.state->finite) {
      return;
    }
    __shared__ double run_sum[kRuns];
    __shared__ double base;
    __shared__ double target;
    __shared__ int64_t slice;
    for (int64_t l = block; l < p.candidates; l += blocks) {
      sum_runs(p.slice_sum, p.slices, run_sum);
      if (threadIdx.x == 0) {
        double total = 0;
        for (int r = 0; r < kRuns; ++r) {
          total += run_sum[r];
        }
        base = 0;
        target = p.uniforms[k * p.candidates + l] * total;
        slice =
            first_above_by_runs(p.slice_sum, p.slices, run_sum, target, base);
      }
      __syncthreads();
      // No distance is left: every row equals a seed, so repeat the first one.
      int64_t row = p.chosen[0];
      if (slice >= 0) {
        const int64_t begin = slice * p.slice_rows;
        const int64_t count = minimum(p.slice_rows, p.n - begin);
        sum_runs(p.distances + begin, count, run_sum);
        if (threadIdx.x == 0) {
          row = begin +
              first_above_by_runs(
                    p.distances + begin, count, run_sum, target, base);
        }
      }
      if (threadIdx.x == 0) {
        p.candidate[l] = row;
        if (p.candidates == 1) {
          p.chosen[k] = row;
        }
      }
      __syncthreads();
    }
  }
};

/// The potential each candidate would leave, by slices.
struct TryCandidates {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks) {
    if (!p.state->finite) {
      return;
    }
    for (int64_t item = block; item < p.slices * p.candidates; item += blocks) {
      const int64_t slice = item / p.candidates;
      const int64_t begin = slice * p.slice_rows;
      const int64_t end = minimum(p.n, begin + p.slice_rows);
      const A* seed = p.points + p.candidate[item % p.candidates] * p.q;
      double sum = 0;
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const A distance = squared_distance(p.points + i * p.q, seed, p.q);
        sum += static_cast<double>(minimum(distance, p.distances[i]));
      }
      sum = block_reduce(sum, Add());
      if (threadIdx.x == 0) {
        p.potential[item] = sum;
      }
    }
  }
};

/// Keeps the first candidate with the least potential as seed `k`. A later one
/// must be better by more than rounding: exact ties are common (of two rows
/// that are each other's nearest either leaves the same), and CPU and CUDA are
/// to break them alike.
struct ChooseCandidate {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t,
      int64_t k) {
    if (block != 0 || !p.state->finite) {
      return;
    }
    double least = 0;
    int64_t best = 0;
    for (int64_t l = 0; l < p.candidates; ++l) {
      double sum = 0;
      for (int64_t slice = threadIdx.x; slice < p.slices; slice += blockDim.x) {
        sum += p.potential[slice * p.candidates + l];
      }
      sum = block_reduce(sum, Add());
      if (l == 0 || sum < least * (1 - 1e-6)) {
        least = sum;
        best = l;
      }
    }
    if (threadIdx.x == 0) {
      p.chosen[k] = p.candidate[best];
    }
  }
};

struct StartCenters {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks) {
    if (!p.state->finite) {
      return;
    }
    for (int64_t e = block * blockDim.x + threadIdx.x; e < p.clusters * p.q;
         e += blocks * blockDim.x) {
      p.centers[e] = p.has_initial
          ? p.initial_points[e]
          : p.points[p.chosen[e / p.q] * p.q + e % p.q];
    }
  }
};

/// Sum of squares of the (centred) points by slices: with it, the change of
/// the centres at which iterating stops.
struct PointSquares {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks) {
    if (!p.state->finite) {
      return;
    }
    for (int64_t slice = block; slice < p.slices; slice += blocks) {
      const int64_t begin = slice * p.slice_rows * p.q;
      const int64_t end = minimum(p.n, (slice + 1) * p.slice_rows) * p.q;
      double sum = 0;
      for (int64_t e = begin + threadIdx.x; e < end; e += blockDim.x) {
        const double value = static_cast<double>(p.points[e]);
        sum += value * value;
      }
      sum = block_reduce(sum, Add());
      if (threadIdx.x == 0) {
        p.slice_sum[slice] = sum;
      }
    }
  }
};

/// The sum of slice_sum, in every thread of the block.
template <typename A>
__device__ double total_of_slices(const Clustering<A>& p) {
  double sum = 0;
  for (int64_t slice = threadIdx.x; slice < p.slices; slice += blockDim.x) {
    sum += p.slice_sum[slice];
  }
  return block_reduce(sum, Add());
}

struct SetShiftLimit {
  template <typename A>
  static __device__ void run(const Clustering<A>& p, int64_t block, int64_t) {
    if (block != 0 || !p.state->finite) {
      return;
    }
    const double total = total_of_slices(p);
    if (threadIdx.x == 0) {
      const double mean_variance =
          total / static_cast<double>(p.n) / static_cast<double>(p.q);
      p.state->shift_limit = p.tol * mean_variance;
    }
  }
};

/// Labels all rows with their nearest centre (the lowest index of equals).
/// `final` is the pass after the last iteration, needed if centres have moved.
struct Assign {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks,
      bool final) {
    const DictionaryState& state = *p.state;
    if (!state.finite || (final ? state.strict : state.done)) {
      return;
    }
    const bool first = state.iterations == 0;
    using TileOf = Tile<A, 4>;
    constexpr int64_t side = TileOf::kSide;
    const A* points = p.points;
    const A* centers = p.centers;
    const int64_t q = p.q;
    for (int64_t item = block; item < p.row_tiles; item += blocks) {
      const int64_t row = item * side;
      double least[4];
      int64_t nearest[4];
      for (int i = 0; i < 4; ++i) {
        least[i] = INFINITY;
        nearest[i] = 0;
      }
      for (int64_t column = 0; column < p.clusters; column += side) {
        TileOf tile;
        tile.clear();
        tile.accumulate(
            row,
            column,
            p.n,
            p.clusters,
            0,
            q,
            true,
            true,
            [=](int64_t i, int64_t k) { return points[i * q + k]; },
            [=](int64_t k, int64_t j) { return centers[j * q + k]; },
            SquaredDifference());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int64_t center = column + TileOf::thread_column() + 16 * j;
            if (center < p.clusters && tile.sum[i][j] < least[i]) {
              least[i] = tile.sum[i][j];
              nearest[i] = center;
            }
          }
        }
      }
      int changed = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // The 16 threads of a row are neighbours in a warp.
        for (int offset = 8; offset > 0; offset /= 2) {
          const double that = __shfl_xor_sync(0xffffffffu, least[i], offset);
          const int64_t center = __shfl_xor_sync(
              0xffffffffu, static_cast<long long>(nearest[i]), offset);
          if (that < least[i] || (that == least[i] && center < nearest[i])) {
            least[i] = that;
            nearest[i] = center;
          }
        }
        const int64_t r = row + TileOf::thread_row() + 16 * i;
        if (TileOf::thread_column() == 0 && r < p.n) {
          changed += first || p.labels[r] != nearest[i] ? 1 : 0;
          p.labels[r] = nearest[i];
          p.distances[r] = static_cast<A>(least[i]);
        }
      }
      changed = block_reduce(changed, Add());
      if (threadIdx.x == 0) {
        p.changed[item] = changed;
      }
    }
  }
};

/// Lanes that share a slice of rows, each with a column: a power of two.
__host__ __device__ inline int64_t lanes_for(int64_t columns) {
  int64_t lanes = 1;
  while (lanes < columns && lanes < kThreads) {
    lanes *= 2;
  }
  return lanes;
}

__host__ __device__ inline int64_t sum_items(int64_t slices, int64_t columns) {
  const int64_t lanes = lanes_for(columns);
  return ceil_div(slices * ceil_div(columns, lanes) * lanes, kThreads);
}

/// Sums and counts of the rows of each cluster, by slices of the rows. A
/// thread has one column of one slice to itself, so no two add to the same sum.
struct ClusterSums {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks,
      bool of_features) {
    if (!p.state->finite || (!of_features && p.state->done)) {
      return;
    }
    const A* rows = of_features ? p.features : p.points;
    const int64_t columns = of_features ? p.d : p.q;
    const int64_t lanes = lanes_for(columns);
    const int64_t tiles = ceil_div(columns, lanes);
    const int64_t groups = kThreads / lanes;
    const int64_t units = p.sum_slices * tiles;
    for (int64_t unit = block * groups + threadIdx.x / lanes; unit < units;
         unit += blocks * groups) {
      const int64_t slice = unit / tiles;
      const int64_t column = unit % tiles * lanes + threadIdx.x % lanes;
      if (column >= columns) {
        continue;
      }
      double* sums = p.sum_partial + slice * p.clusters * columns + column;
      int32_t* counts = p.count_partial + slice * p.clusters;
      for (int64_t k = 0; k < p.clusters; ++k) {
        sums[k * columns] = 0;
        if (column == 0) {
          counts[k] = 0;
        }
      }
      const int64_t begin = slice * p.sum_rows;
      const int64_t end = minimum(p.n, begin + p.sum_rows);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t label = p.labels[i];
        sums[label * columns] +=
            static_cast<double>(rows[i * columns + column]);
        if (column == 0) {
          ++counts[label];
        }
      }
    }
  }
};

/// The slices' sums added up in order.
struct CombineSums {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks,
      bool of_features) {
    if (!p.state->finite || (!of_features && p.state->done)) {
      return;
    }
    const int64_t columns = of_features ? p.d : p.q;
    const int64_t size = p.clusters * columns;
    for (int64_t e = block * blockDim.x + threadIdx.x; e < size;
         e += blocks * blockDim.x) {
      double sum = 0;
      for (int64_t slice = 0; slice < p.sum_slices; ++slice) {
        sum += p.sum_partial[slice * size + e];
      }
      p.sums[e] = sum;
      if (e % columns == 0) {
        const int64_t k = e / columns;
        int64_t count = 0;
        for (int64_t slice = 0; slice < p.sum_slices; ++slice) {
          count += p.count_partial[slice * p.clusters + k];
        }
        p.counts[k] = count;
      }
    }
  }
};

/// Gives each empty cluster the row farthest from its own centre.
template <typename A>
__device__ void relocate_empty_clusters(const Clustering<A>& p) {
  int empty = 0;
  for (int64_t k = threadIdx.x; k < p.clusters; k += blockDim.x) {
    empty |= p.counts[k] == 0 ? 1 : 0;
  }
  if (!block_reduce(empty, Max())) {
    return;
  }
  // Clusters that lose their last row on the way are not empty ones.
  for (int64_t k = threadIdx.x; k < p.clusters; k += blockDim.x) {
    p.chosen[k] = p.counts[k] == 0 ? 1 : 0;
  }
  __syncthreads();
  for (int64_t k = 0; k < p.clusters; ++k) {
    if (!p.chosen[k]) {
      continue;
    }
    Indexed<A> mine = {A(0), p.n};
    for (int64_t i = threadIdx.x; i < p.n; i += blockDim.x) {
      if (p.distances[i] > mine.value) {
        mine = {p.distances[i], i};
      }
    }
    const Indexed<A> farthest = block_argmax(mine);
    if (farthest.index == p.n) {
      return;
    }
    const int64_t old = p.labels[farthest.index];
    for (int64_t j = threadIdx.x; j < p.q; j += blockDim.x) {
      const double value =
          static_cast<double>(p.points[farthest.index * p.q + j]);
      p.sums[old * p.q + j] -= value;
      p.sums[k * p.q + j] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      --p.counts[old];
      p.counts[k] = 1;
      p.distances[farthest.index] = 0;
    }
    __syncthreads();
  }
}

/// Moves the centres to the means of their rows and decides whether to go on.
struct UpdateCenters {
  template <typename A>
  static __device__ void run(const Clustering<A>& p, int64_t block, int64_t) {
    if (block != 0 || !p.state->finite || p.state->done) {
      return;
    }
    long long changed = 0;
    for (int64_t item = threadIdx.x; item < p.row_tiles; item += blockDim.x) {
      changed += p.changed[item];
    }
    changed = block_reduce(changed, Add());
    double shift = 0;
    // The same labels as before mean that the centres are where they belong.
    if (changed != 0) {
      relocate_empty_clusters(p);
      for (int64_t e = threadIdx.x; e < p.clusters * p.q; e += blockDim.x) {
        const int64_t count = p.counts[e / p.q];
        if (count > 0) {
          const A center =
              static_cast<A>(p.sums[e] / static_cast<double>(count));
          const double moved =
              static_cast<double>(center) - static_cast<double>(p.centers[e]);
          p.centers[e] = center;
          shift += moved * moved;
        }
      }
      shift = block_reduce(shift, Add());
    }
    if (threadIdx.x == 0) {
      DictionaryState& state = *p.state;
      ++state.iterations;
      state.strict = changed == 0;
      state.done = state.strict || shift <= state.shift_limit ||
          state.iterations >= p.max_iter;
    }
  }
};

/// Squared distances to the assigned centres, by slices.
struct InertiaPartials {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks) {
    if (!p.state->finite) {
      return;
    }
    for (int64_t slice = block; slice < p.slices; slice += blocks) {
      const int64_t begin = slice * p.slice_rows;
      const int64_t end = minimum(p.n, begin + p.slice_rows);
      double sum = 0;
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        sum += static_cast<double>(squared_distance(
            p.points + i * p.q, p.centers + p.labels[i] * p.q, p.q));
      }
      sum = block_reduce(sum, Add());
      if (threadIdx.x == 0) {
        p.slice_sum[slice] = sum;
      }
    }
  }
};

/// Prototypes and proportions; NaN where the features are not finite.
struct WritePrototypes {
  template <typename A>
  static __device__ void run(
      const Clustering<A>& p,
      int64_t block,
      int64_t blocks) {
    const bool finite = p.state->finite;
    const int64_t first = block * blockDim.x + threadIdx.x;
    const int64_t step = blocks * blockDim.x;
    for (int64_t e = first; e < p.clusters * p.d; e += step) {
      double value = NAN;
      if (finite) {
        const int64_t count = p.counts[e / p.d];
        value = count > 0 ? p.sums[e] / static_cast<double>(count)
                          : p.mean[e % p.d];
      }
      p.prototypes[e] = static_cast<A>(value);
    }
    for (int64_t k = first; k < p.clusters; k += step) {
      p.proportions[k] = finite
          ? static_cast<A>(
                static_cast<double>(p.counts[k]) / static_cast<double>(p.n))
          : static_cast<A>(NAN);
    }
    if (!finite) {
      for (int64_t i = first; i < p.n; i += step) {
        p.labels[i] = 0;
      }
    }
  }
};

struct WriteSummary {
  template <typename A>
  static __device__ void run(const Clustering<A>& p, int64_t block, int64_t) {
    if (block != 0) {
      return;
    }
    const DictionaryState& state = *p.state;
    const double total = state.finite ? total_of_slices(p) : NAN;
    if (threadIdx.x == 0) {
      *p.inertia = total / state.scale / state.scale;
      *p.num_iter = state.iterations;
    }
  }
};

/// The order of the phases, for either way of running them.
#pragma nv_exec_check_disable
template <typename A, typename Runner>
__host__ __device__ void find_clusters(const Clustering<A>& p, Runner runner) {
  if (!p.has_initial) {
    runner.template run<FirstSeed>(1);
    runner.template run<UpdateDistances>(p.slices, int64_t(0));
    for (int64_t k = 1; k < p.clusters; ++k) {
      runner.template run<DrawCandidates>(p.candidates, k);
      if (p.candidates > 1) {
        runner.template run<TryCandidates>(p.slices * p.candidates);
        runner.template run<ChooseCandidate>(1, k);
      }
      runner.template run<UpdateDistances>(p.slices, k);
    }
  }
  runner.template run<StartCenters>(ceil_div(p.clusters * p.q, kThreads));
  runner.template run<PointSquares>(p.slices);
  runner.template run<SetShiftLimit>(1);
  for (int64_t iteration = 0; iteration < p.max_iter; ++iteration) {
    runner.template run<Assign>(p.row_tiles, false);
    runner.template run<ClusterSums>(sum_items(p.sum_slices, p.q), false);
    runner.template run<CombineSums>(
        ceil_div(p.clusters * p.q, kThreads), false);
    runner.template run<UpdateCenters>(1);
    if constexpr (Runner::kOnDevice) {
      if (!p.state->finite || p.state->done) {
        break;
      }
    }
  }
  runner.template run<Assign>(p.row_tiles, true);
  runner.template run<InertiaPartials>(p.slices);
  runner.template run<ClusterSums>(sum_items(p.sum_slices, p.d), true);
  runner.template run<CombineSums>(ceil_div(p.clusters * p.d, kThreads), true);
  runner.template run<WritePrototypes>(ceil_div(p.clusters * p.d, kThreads));
  runner.template run<WriteSummary>(1);
}

// For float32 alone: it would double the time to compile this file, and float64
// features are rare.
__global__ void __launch_bounds__(kThreads)
    clustering_kernel(const Clustering<float> p) {
  find_clusters(p, InOneBlock<Clustering<float>>{p});
}

} // namespace

template <typename A>
Clustering<A>::Clustering(
    int64_t n,
    int64_t d,
    int64_t q,
    int64_t clusters,
    int64_t candidates,
    Arena& arena)
    : n(n), d(d), q(q), clusters(clusters), candidates(candidates) {
  one_block = n <= kOneBlockRows && n * q * clusters <= kOneBlockWork &&
      n * d <= kOneBlockWork;
  slice_rows = largest(256, ceil_div(n, 1024));
  slices = ceil_div(n, slice_rows);
  row_tiles = ceil_div(n, Tile<A, 4>::kSide);
  const int64_t columns = largest(q, d);
  const int64_t most =
      largest(1, smallest(1024, kMaxPartials / (clusters * columns)));
  sum_rows = largest(32, ceil_div(n, most));
  sum_slices = ceil_div(n, sum_rows);

  distances = arena.take<A>(n);
  slice_sum = arena.take<double>(slices);
  candidate = arena.take<int64_t>(candidates);
  potential = arena.take<double>(slices * candidates);
  chosen = arena.take<int64_t>(clusters);
  centers = arena.take<A>(clusters * q);
  changed = arena.take<int32_t>(row_tiles);
  sum_partial = arena.take<double>(sum_slices * clusters * columns);
  count_partial = arena.take<int32_t>(sum_slices * clusters);
  sums = arena.take<double>(clusters * columns);
  counts = arena.take<int64_t>(clusters);
}

template <typename A>
void Clustering<A>::run(cudaStream_t stream) const {
  if constexpr (std::is_same_v<A, float>) {
    if (one_block) {
      launch(clustering_kernel, 1, kThreads, stream, *this);
      return;
    }
  }
  find_clusters(*this, AsLaunches<Clustering<A>>{*this, stream});
}

template struct Clustering<float>;
template struct Clustering<double>;

} // namespace kdci::cuda
