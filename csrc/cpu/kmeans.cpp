// SPDX-License-Identifier: Apache-2.0
#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

#include "../common/lloyd.h"
#include "../common/stable.h"
#include "simd/kmeans.h"

namespace kdci {

template <typename T>
void pack_columns(const T* matrix, int64_t depth, int64_t count, T* columns) {
  for (int64_t first = 0; first < count; first += group_columns) {
    const int64_t width = std::min(group_columns, count - first);
    for (int64_t k = 0; k < depth; ++k) {
      std::copy_n(matrix + k * count + first, width, columns);
      columns += width;
    }
  }
}

template void pack_columns(const float*, int64_t, int64_t, float*);
template void pack_columns(const double*, int64_t, int64_t, double*);

namespace {

// From this many centres on the bits that an index takes of a 32-bit score
// would count for more than the rounding to 16-bit integers.
constexpr int64_t coarse_centers = 1 << 14;

/// Points that k-means++ looks at: all, or where there are at least twice as
/// many, so many of them.
int64_t size_of_sample(int64_t n, int64_t num_centers) {
  const int64_t enough = std::max<int64_t>(8192, 64 * num_centers);
  return n >= 2 * enough ? enough : n;
}

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
      candidates_(candidates),
      num_tiles_((n + tile_points - 1) / tile_points),
      small_(n <= 16 * num_centers || n * num_centers * depth <= (1 << 18)),
      sample_size_(size_of_sample(n, num_centers)),
      sample_tiles_((sample_size_ + tile_points - 1) / tile_points) {
  tiles_ = arena.take<T>(num_tiles_ * depth * tile_points);
  centers_ = arena.take<T>(depth * num_centers);
  before_ = arena.take<T>(small_ ? 0 : depth * num_centers);
  means_ = arena.take<T>(depth * num_centers);
  fresh_ = arena.take<T>(depth * num_centers);
  packed_ = arena.take<T>(depth * std::max(num_centers, candidates));
  pairs_ = arena.take<uint32_t>(small_ ? 0 : (depth + 1) / 2 * num_centers);
  bias_ = arena.take<T>(num_centers);
  drift_ = arena.take<T>(num_centers);
  slack_ = arena.take<T>(
      tile_points * std::max(num_tiles_, sample_tiles_ * candidates));
  nearest_ = slack_;
  candidate_points_ = arena.take<T>(depth * candidates);
  tile_sums_ =
      arena.take<double>(std::max(num_tiles_, sample_tiles_ * candidates));
  cumulative_ = arena.take<double>(sample_tiles_);
  sums_ = arena.take<int64_t>(depth * num_centers);
  counts_ = arena.take<int64_t>(num_centers);
}

/// Tiles per thread at least, for a pass that multiplies every point with
/// `columns` columns: some 20 us of work.
template <typename T>
int64_t Kmeans<T>::grain(int64_t columns) const {
  return std::max<int64_t>(
      1, (1 << 21) / (tile_points * depth_ * std::max<int64_t>(columns, 1)));
}

/// Scrambled, lest the sample resonates with an order of the points.
template <typename T>
int64_t Kmeans<T>::sampled_point(int64_t i) const {
  const int64_t begin = i * n_ / sample_size_;
  const uint64_t length = (i + 1) * n_ / sample_size_ - begin;
  const uint32_t scrambled = static_cast<uint32_t>(i) * 2654435769U;
  return begin + static_cast<int64_t>(scrambled * length >> 32);
}

template <typename T>
void Kmeans<T>::copy_point(int64_t row, T* point, int64_t stride) const {
  const T* from =
      tiles_ + row / tile_points * depth_ * tile_points + row % tile_points;
  for (int64_t k = 0; k < depth_; ++k) {
    point[k * stride] = from[k * tile_points];
  }
}

template <typename T>
void Kmeans<T>::choose_centers(const double* uniforms) {
  const auto& kernels = kmeans_kernels<T>();
  const int64_t count = num_centers_;
  for (int64_t tile = 0; tile < sample_tiles_; ++tile) {
    const int64_t points =
        std::min(tile_points, sample_size_ - tile * tile_points);
    T* distances = nearest_ + tile * candidates_ * tile_points;
    std::fill_n(distances, points, std::numeric_limits<T>::infinity());
    std::fill(distances + points, distances + tile_points, T(0));
  }

  // Whatever the first uniform is, it must name a point.
  const double drawn = uniforms[0] * sample_size_;
  const int64_t first =
      drawn > 0 ? static_cast<int64_t>(std::min(drawn, sample_size_ - 1.0)) : 0;
  copy_point(first, centers_, count);
  copy_point(first, candidate_points_, 1);
  int64_t chosen = 0; // of the candidates tried last
  // One pass over the points for each centre, which tries all candidates.
  const auto try_candidates = [&](int64_t candidates) {
    pack_columns(candidate_points_, depth_, candidates, packed_);
    torch::stable::parallel_for(
        0, sample_tiles_, grain(candidates), [&](int64_t begin, int64_t end) {
          kernels.seed_tiles(
              tiles_,
              depth_,
              begin,
              end,
              packed_,
              candidates,
              candidates_,
              chosen,
              nearest_,
              tile_sums_);
        });
  };
  try_candidates(1);
  for (int64_t center = 1; center < count; ++center) {
    double total = 0;
    for (int64_t tile = 0; tile < sample_tiles_; ++tile) {
      total += tile_sums_[tile * candidates_ + chosen];
      cumulative_[tile] = total;
    }
    if (!(total > 0)) {
      // Fewer distinct points than centres.
      for (int64_t k = 0; k < depth_; ++k) {
        std::fill_n(
            centers_ + k * count + center, count - center, centers_[k * count]);
      }
      return;
    }
    for (int64_t c = 0; c < candidates_; ++c) {
      const double uniform = uniforms[center * candidates_ + c];
      const int64_t row = draw(uniform * total, chosen);
      copy_point(row, candidate_points_ + c, candidates_);
    }
    try_candidates(candidates_);
    // Equal potentials are common (either of the last two rows leaves their
    // distance), and must not be told apart by rounding.
    double least = 0;
    for (int64_t c = 0; c < candidates_; ++c) {
      double potential = 0;
      for (int64_t tile = 0; tile < sample_tiles_; ++tile) {
        potential += tile_sums_[tile * candidates_ + c];
      }
      if (c == 0 || potential < least * (1 - 1e-6)) {
        least = potential;
        chosen = c;
      }
    }
    for (int64_t k = 0; k < depth_; ++k) {
      centers_[k * count + center] =
          candidate_points_[k * candidates_ + chosen];
    }
  }
}

/// The first point of the sample at which the cumulative squared distances
/// that candidate `chosen` left exceed `threshold`.
template <typename T>
int64_t Kmeans<T>::draw(double threshold, int64_t chosen) const {
  int64_t tile =
      std::upper_bound(cumulative_, cumulative_ + sample_tiles_, threshold) -
      cumulative_;
  // Rounding can take the threshold to the total: then it is the last point
  // that is no centre.
  while (tile == sample_tiles_ ||
         (tile > 0 && cumulative_[tile] == cumulative_[tile - 1])) {
    --tile;
  }
  const T* distances = nearest_ + (tile * candidates_ + chosen) * tile_points;
  double sum = tile > 0 ? cumulative_[tile - 1] : 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tile_points; ++i) {
    sum += distances[i];
    if (distances[i] > 0) {
      last = i;
      if (sum > threshold) {
        break;
      }
    }
  }
  return tile * tile_points + last;
}

template <typename T>
int64_t Kmeans<T>::iterate(
    int64_t max_iter,
    double tolerance,
    double momentum,
    int64_t* labels) {
  const auto& kernels = kmeans_kernels<T>();
  torch::stable::parallel_for(
      0, num_tiles_, grain(1), [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
          tile_sums_[tile] =
              kernels.square_sum(tiles_ + tile * depth_ * tile_points, depth_);
        }
      });
  const double total =
      std::accumulate(tile_sums_, tile_sums_ + num_tiles_, 0.0);
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
    inertia = total - between;
    if (is_ahead && inertia > before + inertia_rounding * total) {
      inertia = before;
      is_ahead = false;
      std::copy_n(means_, size, centers_);
    } else {
      is_last |= tolerance > 0 && !is_relocated &&
          before - inertia <= tolerance * inertia + inertia_rounding * total;
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
  const int64_t num_sums = depth_ * num_centers_;
  int64_t moves = 0;
  std::mutex merging;
  torch::stable::parallel_for(
      0, num_tiles_, grain(num_centers_), [&](int64_t begin, int64_t end) {
        std::vector<T> scratch(
            small_ ? 0 : kernels.assign_scratch(depth_, num_centers_));
        Assignment<T> part = task;
        if (begin == 0 && end == num_tiles_) {
          part.sums = sums_;
          part.counts = counts_;
          moves = kernels.assign_tiles(part, begin, end, scratch.data());
          return;
        }
        std::vector<int64_t> sums(num_sums + num_centers_);
        part.sums = sums.data();
        part.counts = sums.data() + num_sums;
        const int64_t moved =
            kernels.assign_tiles(part, begin, end, scratch.data());
        const std::lock_guard<std::mutex> lock(merging);
        moves += moved;
        for (int64_t i = 0; i < num_sums; ++i) {
          sums_[i] += part.sums[i];
        }
        for (int64_t c = 0; c < num_centers_; ++c) {
          counts_[c] += part.counts[c];
        }
      });
  has_slack_ = !small_;
  return moves;
}

/// Turns packed_ into -c, and adds what comparing products takes.
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
  for (int64_t i = 0; i < depth_ * num_centers_; ++i) {
    packed_[i] = -packed_[i];
  }
  if (sizeof(T) > 4 || simd_level() != SimdLevel::avx512vnni ||
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
    return static_cast<uint16_t>(std::lrint(value * task.pair_scale));
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
      copy_point(*row, point.data(), 1);
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
    double square = 0;
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t at = k * num_centers_ + c;
      if (counts[c] == 0) {
        fresh_[at] = means_[at];
        continue;
      }
      const double mean = sums[c * depth_ + k] / (counts[c] * sum_scale_);
      square += mean * mean;
      fresh_[at] = static_cast<T>(mean);
    }
    between += counts[c] * square;
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
      0, num_tiles_, grain(4), [&](int64_t begin, int64_t end) {
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
  return own_distances(labels);
}

template class Kmeans<float>;
template class Kmeans<double>;

} // namespace kdci
