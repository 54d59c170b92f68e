// SPDX-License-Identifier: Apache-2.0
//
// Lloyd's iterations and the dictionary made of their result. A block labels
// its own rows and notes in shared memory what changed labels change in the
// sums of clusters; the sums are integers, so any order gives the same bits.
#pragma once

#include <cuda_pipeline.h>
#include <math.h>

#include "../common/lloyd.h"
#include "block.cuh"
#include "dictionary.h"
#include "rows.cuh"
#include "team.cuh"

namespace kdci::cuda {

// Rows that a block labels at once: 8 to a thread, 16 threads beside each other
// share them and have 1, 2 or 4 centres each.
constexpr int kTileRows = 128;
constexpr int kThreadRows = kTileRows / 16;
constexpr int kMaxThreadColumns = 4;
// Vectors of a row that are brought to shared memory at once, where it has no
// room for whole rows.
constexpr int kStageVectors = 8;
template <typename A>
constexpr int kStageStride = (kStageVectors + 1) * kVector<A>;
// Rows whose distances are summed up at a time, for the inertia.
constexpr int64_t kSliceRows = 256;

/// Rows of a tile with a new label, and those whose nearest centre rounding
/// leaves open.
struct TileChanges {
  int open_count;
  int open[kTileRows];
  int count;
  int row[kTileRows];
  int from[kTileRows];
  int to[kTileRows];
};

__device__ inline TileChanges& tile_changes() {
  __shared__ TileChanges changes;
  return changes;
}

/// Sums and counts of the rows of each cluster.
struct ClusterSums {
  Word* sums;   // [words, clusters * q]
  Word* counts; // [clusters]
};

template <typename A>
__device__ ClusterSums
shared_sums(const Clustering<A>& p, const SharedLayout& layout) {
  Word* sums = shared_at<Word>(layout.sums);
  return {sums, sums + kWords<A> * p.clusters * p.q};
}

/// Lanes that share a row, each with every so many-th column: a power of two.
__device__ inline int lanes_for(int64_t columns) {
  int lanes = 1;
  while (lanes < columns && lanes < 32) {
    lanes *= 2;
  }
  return lanes;
}

/// Adds the rows of `changes`, of the tile that starts at row `begin`, to the
/// sums of their new clusters, and takes them from the old.
template <typename A>
__device__ __forceinline__ void move_rows(
    const Clustering<A>& p,
    const TileChanges& changes,
    int64_t begin,
    ClusterSums to) {
  const int lanes = lanes_for(p.q);
  const int lane = threadIdx.x % lanes;
  const int64_t count = p.clusters * p.q;
  for (int i = threadIdx.x / lanes; i < changes.count;
       i += blockDim.x / lanes) {
    const int from = changes.from[i];
    const int into = changes.to[i];
    const A* row = p.points + (begin + changes.row[i]) * p.stride;
    for (int64_t j = lane; j < p.q; j += lanes) {
      const double value = static_cast<double>(row[j]);
      if (from >= 0) {
        fixed_add<A>(to.sums, count, from * p.q + j, p.of_points, value, -1);
      }
      fixed_add<A>(to.sums, count, into * p.q + j, p.of_points, value, 1);
    }
    if (lane == 0) {
      if (from >= 0) {
        atomicAdd(to.counts + from, ~Word(0));
      }
      atomicAdd(to.counts + into, Word(1));
    }
  }
}

/// Labels the block's own rows with their nearest centres (the lowest index of
/// equals) and returns how many labels changed. `reach` is the largest norm of
/// a centre.
///
/// Nearest is the centre with the least |c|^2 / 2 - x c. Where the two least of
/// these are closer than rounding can tell apart, the row is decided by its
/// distances in float64, so labels do not depend on how a tile is computed.
template <typename A, int kColumns>
__device__ __noinline__ int64_t assign_rows(
    const Clustering<A>& p,
    const SharedLayout& layout,
    const OwnRows& own,
    bool first,
    A reach) {
  constexpr int kSide = 16 * kColumns;
  TileChanges& changes = tile_changes();
  const int tx = threadIdx.x % 16;
  const int ty = threadIdx.x / 16;
  const bool points_there = layout.points >= 0;
  const bool centers_there = layout.centers >= 0;
  const int clusters = static_cast<int>(p.clusters);
  const int vectors = static_cast<int>(p.stride / kVector<A>);
  const int step =
      points_there && centers_there ? vectors : minimum(vectors, kStageVectors);
  const int chunks = (vectors + step - 1) / step;
  const int column_tiles = (clusters + kSide - 1) / kSide;
  const int row_tiles =
      static_cast<int>(ceil_div(own.end - own.begin, int64_t(kTileRows)));
  const int units = row_tiles * column_tiles * chunks;
  const int row_stride = static_cast<int>(shared_stride<A>(p.stride));

  // Buffers alternate with what they are filled for: units, or, if a chunk is a
  // whole row, tiles of rows.
  A* shared = shared_at<A>(0);
  const auto row_buffer = [&](int tile, int unit) {
    return layout.stage_points / int(sizeof(A)) +
        (chunks > 1 ? unit : tile) % 2 * kTileRows * kStageStride<A>;
  };
  const auto center_buffer = [&](int unit) {
    return layout.stage_centers / int(sizeof(A)) +
        unit % 2 * 16 * kMaxThreadColumns * kStageStride<A>;
  };
  const auto fill = [&](int buffer,
                        const A* from,
                        int rows,
                        int64_t begin,
                        int64_t last,
                        int chunk) {
    const int width = minimum(step, vectors - chunk * step);
    for (int e = threadIdx.x; e < rows * width; e += blockDim.x) {
      const int row = e / width;
      const int v = e % width * kVector<A>;
      __pipeline_memcpy_async(
          shared + buffer + row * kStageStride<A> + v,
          from + minimum(begin + row, last) * p.stride +
              chunk * step * kVector<A> + v,
          16);
    }
  };
  const auto stage = [&](int unit) {
    const int chunk = unit % chunks;
    const int column_tile = unit / chunks % column_tiles;
    const int tile = unit / chunks / column_tiles;
    if (!points_there && (chunks > 1 || column_tile == 0)) {
      fill(
          row_buffer(tile, unit),
          p.points,
          kTileRows,
          own.begin + int64_t(tile) * kTileRows,
          own.end - 1,
          chunk);
    }
    if (!centers_there) {
      fill(
          center_buffer(unit),
          p.centers,
          kSide,
          int64_t(column_tile) * kSide,
          p.clusters - 1,
          chunk);
    }
  };

  // Of x c: q + 1 roundings of at most |x||c| eps / 2; of the rest: two more.
  const A rounding = (sizeof(A) == 4 ? A(1.25e-7) : A(2.4e-16));
  const A per_norm = rounding * static_cast<A>(p.q + 3) * reach;
  const A always = rounding * reach * reach;

  if (threadIdx.x == 0) {
    changes.open_count = 0;
    changes.count = 0;
  }
  const bool staged = !points_there || !centers_there;
  if (staged && units > 0) {
    stage(0);
  }
  __pipeline_commit();
  int64_t changed = 0;
  int unit = 0;
  for (int tile = 0; tile < row_tiles; ++tile) {
    A least[kThreadRows];
    A second[kThreadRows];
    int nearest[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      least[i] = INFINITY;
      second[i] = INFINITY;
      nearest[i] = 0;
    }
    for (int column = 0; column < clusters; column += kSide) {
      A sum[kThreadRows][kColumns] = {};
      for (int chunk = 0; chunk < chunks; ++chunk, ++unit) {
        if (staged) {
          if (unit + 1 < units) {
            stage(unit + 1);
          }
          __pipeline_commit();
          __pipeline_wait_prior(1);
          __syncthreads();
        }
        // In elements of the shared memory.
        const int offset = chunk * step * kVector<A>;
        const int x = points_there
            ? layout.points / int(sizeof(A)) +
                (tile * kTileRows + ty) * row_stride + offset
            : row_buffer(tile, unit) + ty * kStageStride<A>;
        const int x_step = 16 * (points_there ? row_stride : kStageStride<A>);
        int c[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          c[j] = centers_there
              ? layout.centers / int(sizeof(A)) +
                  minimum(column + tx + 16 * j, clusters - 1) * row_stride +
                  offset
              : center_buffer(unit) + (tx + 16 * j) * kStageStride<A>;
        }
        const int width = minimum(step, vectors - chunk * step) * kVector<A>;
        // Not unrolled: there are products enough to hide the loads behind, and
        // no registers for more.
#pragma unroll 1
        for (int v = 0; v < width; v += kVector<A>) {
          Vector<A> right[kColumns];
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            right[j] = load_vector(shared + c[j] + v);
          }
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const Vector<A> left = load_vector(shared + x + i * x_step + v);
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
#pragma unroll
              for (int e = 0; e < kVector<A>; ++e) {
                sum[i][j] += left.v[e] * right[j].v[e];
              }
            }
          }
        }
        if (staged) {
          __syncthreads(); // before the buffers are filled again
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int center = column + tx + 16 * j;
        if (center < clusters) {
          const A half_square = p.half_squares[center];
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const A score = half_square - sum[i][j];
            const bool better = score < least[i];
            second[i] = minimum(second[i], better ? least[i] : score);
            nearest[i] = better ? center : nearest[i];
            least[i] = better ? score : least[i];
          }
        }
      }
    }

    const int64_t begin = own.begin + int64_t(tile) * kTileRows;
    const auto label_row = [&](int row, int label) {
      const int old = first ? -1 : static_cast<int>(p.labels[begin + row]);
      if (old != label) {
        p.labels[begin + row] = label;
        const int place = atomicAdd(&changes.count, 1);
        changes.row[place] = row;
        changes.from[place] = old;
        changes.to[place] = label;
      }
    };
    __syncthreads(); // the counts are zero
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      // The 16 threads of a row are neighbours in a warp.
      for (int offset = 8; offset > 0; offset /= 2) {
        const A score = __shfl_xor_sync(0xffffffffu, least[i], offset);
        const A other = __shfl_xor_sync(0xffffffffu, second[i], offset);
        const int center = __shfl_xor_sync(0xffffffffu, nearest[i], offset);
        const bool better =
            score < least[i] || (score == least[i] && center < nearest[i]);
        second[i] =
            minimum(minimum(second[i], other), better ? least[i] : score);
        nearest[i] = better ? center : nearest[i];
        least[i] = better ? score : least[i];
      }
      const int row = ty + 16 * i;
      if (tx == i && begin + row < own.end) {
        if (second[i] - least[i] <= per_norm * p.norms[begin + row] + always) {
          changes.open[atomicAdd(&changes.open_count, 1)] = row;
        } else {
          label_row(row, nearest[i]);
        }
      }
    }
    __syncthreads();
    for (int o = threadIdx.x / 32; o < changes.open_count;
         o += blockDim.x / 32) {
      const int row = changes.open[o];
      const A* x = p.points + (begin + row) * p.stride;
      double distance = INFINITY;
      int center = 0;
      for (int k = threadIdx.x % 32; k < clusters; k += 32) {
        const A* c = p.centers + k * p.stride;
        double squared = 0;
        for (int64_t j = 0; j < p.q; ++j) {
          const double difference =
              static_cast<double>(x[j]) - static_cast<double>(c[j]);
          squared += difference * difference;
        }
        if (squared < distance) {
          distance = squared;
          center = k;
        }
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        const double that = __shfl_xor_sync(0xffffffffu, distance, offset);
        const int other = __shfl_xor_sync(0xffffffffu, center, offset);
        if (that < distance || (that == distance && other < center)) {
          distance = that;
          center = other;
        }
      }
      if (threadIdx.x % 32 == 0) {
        label_row(row, center);
      }
    }
    __syncthreads();
    if (layout.sums >= 0) {
      move_rows(p, changes, begin, shared_sums(p, layout));
    } else {
      move_rows(p, changes, begin, {p.sums, p.counts});
    }
    changed += changes.count;
    __syncthreads();
    if (threadIdx.x == 0) {
      changes.open_count = 0;
      changes.count = 0;
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  return changed;
}

/// Adds what the block has noted in shared memory to the team's sums.
template <typename A>
__device__ void flush_sums(
    const Clustering<A>& p,
    const SharedLayout& layout,
    const ClusterSums& total) {
  const ClusterSums mine = shared_sums(p, layout);
  const auto move = [](Word* from, Word* to, int64_t count) {
    for (int64_t e = threadIdx.x; e < count; e += blockDim.x) {
      const Word value = from[e];
      if (value != 0) {
        atomicAdd(to + e, value);
        from[e] = 0;
      }
    }
  };
  move(mine.sums, total.sums, kWords<A> * p.clusters * p.q);
  move(mine.counts, total.counts, p.clusters);
}

/// Calls `set(k, lane)` for each centre, by a warp that has it to itself, and
/// notes half the square that this returns, which the lanes add up.
template <typename A, typename Set>
__device__ void set_centers(
    const Clustering<A>& p,
    int rank,
    int size,
    const Set& set) {
  const int lane = threadIdx.x % 32;
  const int warps = blockDim.x / 32;
  for (int64_t k = rank * warps + threadIdx.x / 32; k < p.clusters;
       k += size * warps) {
    const double square = warp_reduce(set(k, lane), Add());
    if (lane == 0) {
      p.half_squares[k] = static_cast<A>(square / 2);
    }
  }
}

/// The means of the kept side, or of the other one: [clusters, stride].
template <typename A>
__device__ A* means_of(const Clustering<A>& p, int side) {
  return p.means + side * p.clusters * p.stride;
}

/// Puts the centres where the means are.
template <typename A>
__device__ void put_centers_on_means(
    const Clustering<A>& p,
    int side,
    int rank,
    int size) {
  const A* means = means_of(p, side);
  set_centers(p, rank, size, [&](int64_t k, int lane) {
    double square = 0;
    for (int64_t j = lane; j < p.q; j += 32) {
      const A value = means[k * p.stride + j];
      p.centers[k * p.stride + j] = value;
      square += static_cast<double>(value) * static_cast<double>(value);
    }
    return square;
  });
}

/// Writes the means of the centres' rows to the side that is not `kept`, moves
/// the centres `ahead` times the step from the kept means beyond them, and
/// notes each cluster's part of the sum of squares between the clusters.
template <typename A>
__device__ void update_centers(
    const Clustering<A>& p,
    const ClusterSums& total,
    int kept,
    double ahead,
    int rank,
    int size) {
  const A* last = means_of(p, kept);
  A* fresh = means_of(p, 1 - kept);
  set_centers(p, rank, size, [&](int64_t k, int lane) {
    const auto count = static_cast<long long>(total.counts[k]);
    const auto divisor = static_cast<double>(count);
    double square = 0;
    double between = 0;
    for (int64_t j = lane; j < p.q; j += 32) {
      const int64_t at = k * p.stride + j;
      A mean = last[at];
      if (count > 0) {
        const double sum = fixed_value<A>(
            total.sums, p.clusters * p.q, k * p.q + j, p.of_points);
        mean = static_cast<A>(sum / divisor);
        between += sum * sum / divisor;
      }
      const double step =
          static_cast<double>(mean) - static_cast<double>(last[at]);
      const A center = static_cast<A>(static_cast<double>(mean) + ahead * step);
      fresh[at] = mean;
      p.centers[at] = center;
      square += static_cast<double>(center) * static_cast<double>(center);
    }
    between = warp_reduce(between, Add());
    if (lane == 0) {
      p.between[k] = between;
    }
    return square;
  });
}

/// Copies the centres to shared memory, if they have room there, and returns
/// the largest of their norms.
template <typename A>
__device__ A load_centers(const Clustering<A>& p, const SharedLayout& layout) {
  if (layout.centers >= 0) {
    copy_rows(
        p.centers,
        0,
        nullptr,
        p.clusters,
        p.stride,
        shared_at<A>(layout.centers));
  }
  A square = 0;
  for (int64_t k = threadIdx.x; k < p.clusters; k += blockDim.x) {
    square = maximum(square, 2 * p.half_squares[k]);
  }
  return sqrt(block_reduce(square, Max()));
}

/// Norms of the points, and the sums of their squares by slices.
template <typename A>
__device__ void point_norms(const Clustering<A>& p, int rank, int size) {
  const int lane = threadIdx.x % 32;
  for (int64_t slice = rank; slice < p.slices; slice += size) {
    const int64_t end = minimum(p.n, (slice + 1) * kSliceRows);
    double sum = 0;
    for (int64_t i = slice * kSliceRows + threadIdx.x / 32; i < end;
         i += blockDim.x / 32) {
      double square = 0;
      for (int64_t j = lane; j < p.q; j += 32) {
        const double value = static_cast<double>(p.points[i * p.stride + j]);
        square += value * value;
      }
      square = warp_reduce(square, Add());
      if (lane == 0) {
        p.norms[i] = static_cast<A>(sqrt(square));
        sum += square;
      }
    }
    sum = block_reduce(sum, Add());
    if (threadIdx.x == 0) {
      p.slice_sum[slice] = sum;
    }
  }
}

/// Squared distances to the assigned centres, by slices.
template <typename A>
__device__ void inertia_partials(const Clustering<A>& p, int rank, int size) {
  const int lane = threadIdx.x % 32;
  for (int64_t slice = rank; slice < p.slices; slice += size) {
    const int64_t end = minimum(p.n, (slice + 1) * kSliceRows);
    double sum = 0;
    for (int64_t i = slice * kSliceRows + threadIdx.x / 32; i < end;
         i += blockDim.x / 32) {
      const A* x = p.points + i * p.stride;
      const A* c = p.centers + p.labels[i] * p.stride;
      for (int64_t j = lane; j < p.q; j += 32) {
        const double difference =
            static_cast<double>(x[j]) - static_cast<double>(c[j]);
        sum += difference * difference;
      }
    }
    sum = block_reduce(sum, Add());
    if (threadIdx.x == 0) {
      p.slice_sum[slice] = sum;
    }
  }
}

/// The sum of `count` values, in every thread of the block.
__device__ inline double block_sum(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t e = threadIdx.x; e < count; e += blockDim.x) {
    sum += values[e];
  }
  return block_reduce(sum, Add());
}

/// Rows lent to empty clusters for one update of the centres, or given back.
template <typename A>
__device__ void lend_rows(
    const Clustering<A>& p,
    const ClusterSums& total,
    int64_t rows,
    int sign) {
  const int64_t count = p.clusters * p.q;
  for (int64_t m = 0; m < rows; ++m) {
    const A* row = p.points + p.moved[3 * m] * p.stride;
    const int64_t to = p.moved[3 * m + 1];
    const int64_t from = p.moved[3 * m + 2];
    for (int64_t j = threadIdx.x; j < p.q; j += blockDim.x) {
      const double value = static_cast<double>(row[j]);
      fixed_add<A>(
          total.sums, count, from * p.q + j, p.of_points, value, -sign);
      fixed_add<A>(total.sums, count, to * p.q + j, p.of_points, value, sign);
    }
    if (threadIdx.x == 0) {
      atomicAdd(total.counts + from, static_cast<Word>(-sign));
      atomicAdd(total.counts + to, static_cast<Word>(sign));
    }
  }
}

/// Finds for each empty cluster the row farthest from its own centre, the
/// lowest of equals, and lends it to the cluster. Returns how many were lent,
/// the same in all blocks. Clusters that lose their last row on the way are not
/// empty ones.
template <typename A, typename Team>
__device__ int64_t lend_to_empty_clusters(
    const Clustering<A>& p,
    const ClusterSums& total,
    const OwnRows& own,
    const Team& team) {
  int empty = 0;
  for (int64_t k = threadIdx.x; k < p.clusters; k += blockDim.x) {
    empty |= total.counts[k] == 0 ? 1 : 0;
  }
  if (!block_reduce(empty, Max())) {
    return 0;
  }
  const int64_t start = own.begin + threadIdx.x;
  for (int64_t i = start; i < own.end; i += blockDim.x) {
    const A* x = p.points + i * p.stride;
    const A* c = p.centers + p.labels[i] * p.stride;
    A sum = 0;
    for (int64_t j = 0; j < p.q; ++j) {
      sum += (x[j] - c[j]) * (x[j] - c[j]);
    }
    p.distances[i] = sum;
  }
  int64_t lent = 0;
  for (int64_t k = 0; k < p.clusters; ++k) {
    if (total.counts[k] != 0) {
      continue;
    }
    Indexed<A> farthest = {A(0), p.n};
    for (int64_t i = start; i < own.end; i += blockDim.x) {
      if (p.distances[i] > farthest.value) {
        farthest = {p.distances[i], i};
      }
    }
    farthest = block_argmax(farthest);
    const int64_t box = lent % 2 * kMaxTeam;
    if (threadIdx.x == 0) {
      p.far_value[box + team.rank()] = farthest.value;
      p.far_index[box + team.rank()] = farthest.index;
    }
    team.sync();
    farthest = {A(0), p.n};
    for (int r = threadIdx.x; r < team.size(); r += blockDim.x) {
      const Indexed<A> that = {p.far_value[box + r], p.far_index[box + r]};
      if (that.value > farthest.value) {
        farthest = that;
      }
    }
    farthest = block_argmax(farthest);
    if (farthest.index == p.n) {
      break; // every row is at its centre
    }
    if (farthest.index >= own.begin && farthest.index < own.end &&
        (farthest.index - own.begin) % blockDim.x == threadIdx.x) {
      p.distances[farthest.index] = 0;
    }
    if (team.rank() == 0 && threadIdx.x == 0) {
      p.moved[3 * lent] = farthest.index;
      p.moved[3 * lent + 1] = k;
      p.moved[3 * lent + 2] = p.labels[farthest.index];
    }
    ++lent;
  }
  team.sync(); // nobody looks at the counts any more
  if (team.rank() == 0) {
    lend_rows(p, total, lent, 1);
  }
  team.sync();
  return lent;
}

/// Labels, centres and p.counts; returns the number of iterations.
template <typename A, typename Team>
__device__ int64_t
iterate(const Clustering<A>& p, const SharedLayout& layout, const Team& team) {
  const int rank = team.rank();
  const int size = team.size();
  const OwnRows own(p.n, rank, size);
  const int64_t words = kWords<A> * p.clusters * p.q;
  const int64_t thread = int64_t(rank) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(size) * blockDim.x;
  for (int64_t e = thread; e < words; e += threads) {
    p.sums[e] = 0;
  }
  for (int64_t k = thread; k < p.clusters; k += threads) {
    p.counts[k] = 0;
  }
  if (thread < 2) {
    p.changed[thread] = 0;
  }
  ClusterSums total = {p.sums, p.counts};
  const bool flushes = layout.sums >= 0 && size > 1;
  if (layout.sums >= 0) {
    const ClusterSums mine = shared_sums(p, layout);
    for (int64_t e = threadIdx.x; e < words + p.clusters; e += blockDim.x) {
      mine.sums[e] = 0;
    }
    if (!flushes) {
      total = mine;
    }
  }
  point_norms(p, rank, size);
  int kept = 0; // the side of the means after the last iteration
  set_centers(p, rank, size, [&](int64_t k, int lane) {
    double square = 0;
    for (int64_t j = lane; j < p.q; j += 32) {
      const A value = p.centers[k * p.stride + j];
      means_of(p, kept)[k * p.stride + j] = value;
      square += static_cast<double>(value) * static_cast<double>(value);
    }
    return square;
  });
  team.sync();
  const double spread = block_sum(p.slice_sum, p.slices);
  const double rounding = inertia_rounding * spread;
  double inertia = INFINITY;
  bool is_ahead = false; // the centres are not the kept means
  A reach = load_centers(p, layout);
  __syncthreads();

  int64_t iterations = 0;
  bool last = false; // the centres stay, the labels follow them once more
  for (int parity = 0;; parity = 1 - parity) {
    const bool first = iterations == 0;
    const int64_t changed = p.clusters <= 16
        ? assign_rows<A, 1>(p, layout, own, first, reach)
        : p.clusters <= 32
        ? assign_rows<A, 2>(p, layout, own, first, reach)
        : assign_rows<A, kMaxThreadColumns>(p, layout, own, first, reach);
    if (flushes) {
      flush_sums(p, layout, total);
    }
    if (threadIdx.x == 0 && changed != 0) {
      atomicAdd(p.changed + parity, static_cast<Word>(changed));
    }
    team.sync();
    if (last) {
      break;
    }
    ++iterations;
    const bool has_moved = p.changed[parity] != 0;
    if (!has_moved && !is_ahead) {
      break; // the centres are where they belong
    }
    if (thread == 0) {
      p.changed[1 - parity] = 0;
    }
    const int64_t lent = lend_to_empty_clusters(p, total, own, team);
    last = iterations >= p.max_iter;
    const bool goes_ahead =
        p.momentum > 0 && has_moved && iterations > 1 && lent == 0 && !last;
    update_centers(p, total, kept, goes_ahead ? p.momentum : 0, rank, size);
    team.sync();
    if (rank == 0 && lent > 0) {
      lend_rows(p, total, lent, -1);
    }
    const double now = spread - block_sum(p.between, p.clusters);
    if (is_ahead && now > inertia + rounding) {
      is_ahead = false; // that was too far
      put_centers_on_means(p, kept, rank, size);
      team.sync();
    } else {
      const bool converged =
          p.tol > 0 && lent == 0 && inertia - now <= p.tol * now + rounding;
      kept = 1 - kept;
      if (goes_ahead && converged) {
        put_centers_on_means(p, kept, rank, size);
        team.sync();
      }
      is_ahead = goes_ahead && !converged;
      last |= converged;
      inertia = now;
    }
    reach = load_centers(p, layout);
  }
  if (total.counts != p.counts) {
    for (int64_t k = threadIdx.x; k < p.clusters; k += blockDim.x) {
      p.counts[k] = total.counts[k];
    }
  }
  return iterations;
}

/// Sums of the centred and scaled features of each cluster, in p.sums, by
/// groups of columns that have room in shared memory. Needs p.sums to be zero.
template <typename A>
__device__ void feature_sums(
    const Clustering<A>& p,
    const SharedLayout& layout,
    const OwnRows& own) {
  const int64_t count = p.clusters * p.d;
  const int64_t column_words = kWords<A> * p.clusters;
  const int64_t fitting =
      layout.bytes / static_cast<int64_t>(sizeof(Word)) / column_words;
  // Few columns at a time would read the features in short pieces.
  const bool in_shared = fitting >= minimum(p.d, int64_t(16));
  const int64_t columns = in_shared ? minimum(p.d, fitting) : p.d;
  const double scale = p.state->scale;
  Word* mine = shared_at<Word>(0);
  for (int64_t begin = 0; begin < p.d; begin += columns) {
    const int64_t width = minimum(columns, p.d - begin);
    const int lanes = lanes_for(width);
    const int lane = threadIdx.x % lanes;
    const auto add_rows =
        [&](Word* sums, int64_t size, int64_t row_size, int64_t offset) {
          for (int64_t i = own.begin + threadIdx.x / lanes; i < own.end;
               i += blockDim.x / lanes) {
            const int64_t label = p.labels[i];
            for (int64_t j = lane; j < width; j += lanes) {
              const int64_t column = begin + j;
              const double value =
                  static_cast<double>(p.features[i * p.d + column]);
              fixed_add<A>(
                  sums,
                  size,
                  label * row_size + offset + j,
                  p.of_features,
                  (value - p.mean[column]) * scale,
                  1);
            }
          }
        };
    if (!in_shared) {
      add_rows(p.sums, count, p.d, begin);
      continue;
    }
    const int64_t part = p.clusters * width;
    for (int64_t e = threadIdx.x; e < kWords<A> * part; e += blockDim.x) {
      mine[e] = 0;
    }
    __syncthreads();
    add_rows(mine, part, width, 0);
    __syncthreads();
    for (int64_t e = threadIdx.x; e < kWords<A> * part; e += blockDim.x) {
      const int64_t word = e / part;
      const int64_t k = e % part / width;
      const int64_t j = e % part % width;
      if (mine[e] != 0) {
        atomicAdd(p.sums + word * count + k * p.d + begin + j, mine[e]);
      }
    }
    __syncthreads();
  }
}

/// Prototypes, proportions and inertia; NaN where the features are not finite.
template <typename A>
__device__ void write_dictionary(
    const Clustering<A>& p,
    int rank,
    int size,
    int64_t iterations) {
  const bool finite = p.state->finite;
  const double scale = p.state->scale;
  const int64_t first = int64_t(rank) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(size) * blockDim.x;
  for (int64_t e = first; e < p.clusters * p.d; e += step) {
    double value = NAN;
    if (finite) {
      value = p.mean[e % p.d];
      const auto count = static_cast<long long>(p.counts[e / p.d]);
      if (count > 0) {
        const double sum =
            fixed_value<A>(p.sums, p.clusters * p.d, e, p.of_features);
        value += sum / static_cast<double>(count) / scale;
      }
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
  if (rank == 0) {
    const double total = finite ? block_sum(p.slice_sum, p.slices) : NAN;
    if (threadIdx.x == 0) {
      *p.inertia = total / scale / scale;
      *p.num_iter = iterations;
    }
  }
}

/// All of stage lloyd.
template <typename A, typename Team>
__device__ void cluster_rows(
    const Clustering<A>& p,
    const SharedLayout& layout,
    const Team& team) {
  const int rank = team.rank();
  const int size = team.size();
  int64_t iterations = 0;
  if (p.state->finite) {
    iterations = iterate(p, layout, team);
    const int64_t words = kWords<A> * p.clusters * p.d;
    for (int64_t e = int64_t(rank) * blockDim.x + threadIdx.x; e < words;
         e += int64_t(size) * blockDim.x) {
      p.sums[e] = 0;
    }
    inertia_partials(p, rank, size);
    team.sync();
    feature_sums(p, layout, OwnRows(p.n, rank, size));
    team.sync();
  }
  write_dictionary(p, rank, size, iterations);
}

} // namespace kdci::cuda
