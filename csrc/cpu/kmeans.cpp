// SPDX-License-Identifier: Apache-2.0
#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/lloyd.h"
#include "../common/stable.h"
#include "simd/kmeans.h"
#include "tiles.h"

namespace kdci {
namespace {

// From this many centres on the bits that an index takes of a 32-bit score
// would count for more than the rounding to 16-bit integers.
constexpr int64_t coarse_centers = 1 << 14;

// Of the points' sum of squares this much must be left, lest its rounding
// shows.
constexpr double enough_left = 1e-3;

} // namespace

template <typename T>
Kmeans<T>::Kmeans(
    Arena& arena,
    int64_t n,
    int64_t depth,
    int64_t num_centers,
    int64_t candidates)
    : n_(n),
      depth_(depth),
      num_centers_(num_centers),
      num_tiles_((n + tile_points - 1) / tile_points),
      small_(n <= 16 * num_centers || n * num_centers * depth <= (1 << 18)) {
  tiles_ = arena.take<T>(num_tiles_ * depth * tile_points);
  centers_ = arena.take<T>(depth * num_centers);
  Arena shared = arena;
  seeding_.emplace(
      shared, n, depth, num_centers, candidates, !small_, tiles_, centers_);
  arena.include(shared);
  before_ = arena.take<T>(small_ ? 0 : depth * num_centers);
  means_ = arena.take<T>(depth * num_centers);
  fresh_ = arena.take<T>(depth * num_centers);
  packed_ = arena.take<T>(depth * num_centers);
  pairs_ = arena.take<uint32_t>(small_ ? 0 : (depth + 1) / 2 * num_centers);
  bias_ = arena.take<T>(num_centers);
  drift_ = arena.take<T>(num_centers);
  slack_ = arena.take<T>(tile_points * num_tiles_);
  tile_sums_ = arena.take<double>(num_tiles_);
  sums_ = arena.take<int64_t>(depth * num_centers);
  counts_ = arena.take<int64_t>(num_centers);
}

template <typename T>
int64_t Kmeans<T>::iterate(
    int64_t max_iter,
    double tolerance,
    double momentum,
    int64_t* labels) {
  const auto& kernels = kmeans_kernels<T>();
  torch::stable::parallel_for(
      0, num_tiles_, tile_grain(depth_, 1), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          tile_sums_[tile] =
              kernels.square_sum(tiles_ + tile * depth_ * tile_points, depth_);
        }
      });
  total_ = std::accumulate(tile_sums_, tile_sums_ + num_tiles_, 0.0);
  // No coordinate is larger than the root of its tile's sum of squares, and no
  // sum larger than n times that: it must stay below 2^62.
  const double largest =
      std::sqrt(*std::max_element(tile_sums_, tile_sums_ + num_tiles_));
  sum_scale_ = std::ldexp(1.0, 61 - std::ilogb(std::max(largest, 1e-280) * n_));

  std::fill_n(labels, n_, -1);
  std::fill_n(sums_, depth_ * num_centers_, 0);
  std::fill_n(counts_, num_centers_, 0);
  has_slack_ = false;
  const int64_t size = depth_ * num_centers_;
  std::copy_n(centers_, size, means_);
  double inertia = std::numeric_limits<double>::infinity();
  bool is_ahead = false; // the centres are not the means of the last labels
  int64_t iteration = 0;
  for (bool is_last = false; !is_last;) {
    ++iteration;
    const bool has_moved = assign(labels) > 0;
    if (!has_moved && !is_ahead) {
      return iteration;
    }
    is_last = iteration == max_iter;
    if (!small_) {
      std::copy_n(centers_, size, before_);
    }
    double between = 0;
    const bool is_relocated = find_means(labels, between);
    const double before = inertia;
    inertia = total_ - between;
    if (is_ahead && inertia > before + inertia_rounding * total_) {
      inertia = before;
      is_ahead = false;
      std::copy_n(means_, size, centers_);
    } else {
      is_last |= tolerance > 0 && !is_relocated &&
          before - inertia <= tolerance * inertia + inertia_rounding * total_;
      is_ahead = momentum > 0 && has_moved && iteration > 1 && !is_relocated &&
          !is_last;
      const double ahead = is_ahead ? momentum : 0;
      for (int64_t i = 0; i < size; ++i) {
        const double mean = fresh_[i];
        centers_[i] = static_cast<T>(mean + ahead * (mean - means_[i]));
      }
      std::swap(means_, fresh_);
    }
    if (!small_) {
      measure_drift();
    }
  }
  assign(labels);
  return iteration;
}

/// Brings labels, sums and counts up to date with the centres; returns how many
/// labels changed.
template <typename T>
int64_t Kmeans<T>::assign(int64_t* labels) {
  const auto& kernels = kmeans_kernels<T>();
  pack_columns(centers_, depth_, num_centers_, packed_);
  Assignment<T> task = {};
  task.tiles = tiles_;
  task.n = n_;
  task.depth = depth_;
  task.num_centers = num_centers_;
  task.columns = packed_;
  task.labels = labels;
  task.slack = slack_;
  task.sum_scale = sum_scale_;
  if (!small_) {
    task.bias = bias_;
    task.drift = has_slack_ ? drift_ : nullptr;
    prepare_products(task);
  }
  // Each part of the tiles has its own memory, kept for the next iteration.
  const auto parts = std::clamp<int64_t>(
      num_tiles_ / tile_grain(depth_, num_centers_),
      1,
      torch::stable::get_num_threads());
  parts_.resize(parts);
  const int64_t num_sums = depth_ * num_centers_;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Part& part = parts_[i];
      part.scratch.resize(
          small_ ? 0 : kernels.assign_scratch(depth_, num_centers_));
      Assignment<T> its_task = task;
      its_task.sums = sums_;
      its_task.counts = counts_;
      if (parts > 1) {
        part.sums.assign(num_sums + num_centers_, 0);
        its_task.sums = part.sums.data();
        its_task.counts = part.sums.data() + num_sums;
      }
      part.moves = kernels.assign_tiles(
          its_task,
          i * num_tiles_ / parts,
          (i + 1) * num_tiles_ / parts,
          part.scratch.data());
    }
  });
  int64_t moves = 0;
  for (const Part& part : parts_) {
    moves += part.moves;
    for (int64_t i = 0; parts > 1 && i < num_sums; ++i) {
      sums_[i] += part.sums[i];
    }
    for (int64_t c = 0; parts > 1 && c < num_centers_; ++c) {
      counts_[c] += part.sums[num_sums + c];
    }
  }
  has_slack_ = !small_;
  return moves;
}

/// Adds what comparing products takes.
template <typename T>
void Kmeans<T>::prepare_products(Assignment<T>& task) {
  std::vector<double> squares(num_centers_);
  for (int64_t k = 0; k < depth_; ++k) {
    for (int64_t c = 0; c < num_centers_; ++c) {
      const double value = centers_[k * num_centers_ + c];
      squares[c] += value * value;
    }
  }
  double largest = 0;
  for (int64_t c = 0; c < num_centers_; ++c) {
    bias_[c] = static_cast<T>(squares[c] / 2);
    largest = std::max(largest, squares[c]);
  }
  // An upper bound must stay one as a T.
  task.largest_center = static_cast<T>(std::sqrt(largest) * (1 + 1e-6));
  if (!has_integer_kernels<T>() ||
      !(task.largest_center > std::numeric_limits<float>::min()) ||
      num_centers_ > coarse_centers) {
    return;
  }
  task.pairs = pairs_;
  while (task.column_bits < num_centers_ - 1) {
    task.column_bits = 2 * task.column_bits + 1;
  }
  task.pair_scale = 32000 / static_cast<float>(task.largest_center);
  const auto rounded = [&](T value) {
    return static_cast<uint16_t>(std::lrint(-value * task.pair_scale));
  };
  uint32_t* pair = pairs_;
  for (int64_t first = 0; first < num_centers_; first += group_columns) {
    const int64_t width = std::min(group_columns, num_centers_ - first);
    const T* group = packed_ + first * depth_;
    for (int64_t k = 0; k < depth_; k += 2) {
      for (int64_t c = 0; c < width; ++c) {
        const T* value = group + k * width + c;
        const uint32_t odd = k + 1 < depth_ ? rounded(value[width]) : 0;
        *pair++ = rounded(*value) | odd << 16;
      }
    }
  }
}

/// Finds the means of the clusters, and their sum of squares about the origin,
/// weighted by counts. An empty cluster takes the point farthest from its own
/// centre, as in scikit-learn, and keeps its last mean if all points are
/// centres. Returns whether any took one.
template <typename T>
bool Kmeans<T>::find_means(const int64_t* labels, double& between) {
  const int64_t* sums = sums_;
  const int64_t* counts = counts_;
  std::vector<int64_t> adjusted_sums;
  std::vector<int64_t> adjusted_counts;
  const int64_t num_empty = std::count(counts_, counts_ + num_centers_, 0);
  const bool is_relocated = num_empty > 0 && own_distances(labels) > 0;
  if (is_relocated) {
    adjusted_sums.assign(sums_, sums_ + depth_ * num_centers_);
    adjusted_counts.assign(counts_, counts_ + num_centers_);
    std::vector<int64_t> rows(n_);
    std::iota(rows.begin(), rows.end(), 0);
    std::partial_sort(
        rows.begin(),
        rows.begin() + num_empty,
        rows.end(),
        [&](int64_t a, int64_t b) {
          return slack_[a] > slack_[b] || (slack_[a] == slack_[b] && a < b);
        });
    std::vector<T> point(depth_);
    auto row = rows.begin();
    for (int64_t c = 0; c < num_centers_; ++c) {
      if (counts_[c] != 0 || !(slack_[*row] > 0)) {
        continue;
      }
      const int64_t donor = labels[*row];
      copy_point(tiles_, depth_, *row, point.data(), 1);
      for (int64_t k = 0; k < depth_; ++k) {
        const int64_t value = std::llrint(point[k] * sum_scale_);
        adjusted_sums[donor * depth_ + k] -= value;
        adjusted_sums[c * depth_ + k] = value;
      }
      --adjusted_counts[donor];
      adjusted_counts[c] = 1;
      if (++row == rows.begin() + num_empty) {
        break;
      }
    }
    sums = adjusted_sums.data();
    counts = adjusted_counts.data();
  }
  between = 0;
  for (int64_t c = 0; c < num_centers_; ++c) {
    T* fresh = fresh_ + c;
    if (counts[c] == 0) {
      for (int64_t k = 0; k < depth_; ++k) {
        fresh[k * num_centers_] = means_[k * num_centers_ + c];
      }
      continue;
    }
    const double factor = 1 / (counts[c] * sum_scale_);
    double squares[4] = {};
    for (int64_t k = 0; k < depth_; ++k) {
      const double mean = sums[c * depth_ + k] * factor;
      squares[k % 4] += mean * mean;
      fresh[k * num_centers_] = static_cast<T>(mean);
    }
    between +=
        counts[c] * ((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }
  return is_relocated;
}

/// How much slack a point of each cluster loses: as much as its own centre
/// moved, and as much as any other did.
template <typename T>
void Kmeans<T>::measure_drift() {
  std::vector<double> distance(num_centers_);
  for (int64_t k = 0; k < depth_; ++k) {
    for (int64_t c = 0; c < num_centers_; ++c) {
      const int64_t at = k * num_centers_ + c;
      const double step = static_cast<double>(centers_[at]) - before_[at];
      distance[c] += step * step;
    }
  }
  int64_t farthest = 0;
  for (int64_t c = 0; c < num_centers_; ++c) {
    distance[c] = std::sqrt(distance[c]);
    farthest = distance[c] > distance[farthest] ? c : farthest;
  }
  double second = 0;
  for (int64_t c = 0; c < num_centers_; ++c) {
    second = c == farthest ? second : std::max(second, distance[c]);
  }
  for (int64_t c = 0; c < num_centers_; ++c) {
    const double others = c == farthest ? second : distance[farthest];
    drift_[c] = static_cast<T>((distance[c] + others) * (1 + 1e-6));
  }
}

/// Fills slack_ with the squared distance of each point to its centre; returns
/// their sum.
template <typename T>
double Kmeans<T>::own_distances(const int64_t* labels) {
  has_slack_ = false;
  const auto& kernels = kmeans_kernels<T>();
  torch::stable::parallel_for(
      0, num_tiles_, tile_grain(depth_, 4), [&](int64_t begin, int64_t end) {
        kernels.own_distances(
            tiles_,
            depth_,
            begin,
            end,
            n_,
            centers_,
            num_centers_,
            labels,
            slack_,
            tile_sums_);
      });
  return std::accumulate(tile_sums_, tile_sums_ + num_tiles_, 0.0);
}

template <typename T>
double Kmeans<T>::inertia(const int64_t* labels) {
  // |x|^2 - 2 x.c + |c|^2, summed by cluster.
  double sum = total_;
  for (int64_t c = 0; c < num_centers_; ++c) {
    double product = 0;
    double square = 0;
    for (int64_t k = 0; k < depth_; ++k) {
      const double center = centers_[k * num_centers_ + c];
      product += sums_[c * depth_ + k] * center;
      square += center * center;
    }
    sum += counts_[c] * square - 2 * product / sum_scale_;
  }
  return sum > enough_left * total_ ? sum : own_distances(labels);
}

template class Kmeans<float>;
template class Kmeans<double>;

} // namespace kdci
