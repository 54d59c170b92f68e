// SPDX-License-Identifier: Apache-2.0
#include "seeding.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/stable.h"
#include "simd/seeding.h"
#include "tiles.h"

namespace kdci {
namespace {

// Rounding to integers lengthens a squared distance by depth / 6 on average:
// so many times depth it must be, lest points are chosen for their rounding.
constexpr double least_square = 16;

/// Points to look at: all, or where there are at least twice as many, so many
/// of them.
int64_t size_of_sample(int64_t n, int64_t num_centers) {
  const int64_t enough = std::max<int64_t>(8192, 64 * num_centers);
  return n >= 2 * enough ? enough : n;
}

} // namespace

template <typename T>
Seeding<T>::Seeding(
    Arena& arena,
    int64_t n,
    int64_t depth,
    int64_t num_centers,
    int64_t candidates,
    bool is_coarse,
    T* tiles,
    T* centers)
    : n_(n),
      depth_(depth),
      num_centers_(num_centers),
      candidates_(candidates),
      sample_size_(size_of_sample(n, num_centers)),
      sample_tiles_((sample_size_ + tile_points - 1) / tile_points),
      is_coarse_(is_coarse && has_integer_kernels<T>()),
      tiles_(tiles),
      centers_(centers) {
  rows_ = arena.take<int64_t>(candidates);
  candidate_points_ = arena.take<T>(depth * candidates);
  packed_ = arena.take<T>(depth * candidates);
  nearest_ = arena.take<T>(sample_tiles_ * candidates * tile_points);
  tile_sums_ = arena.take<double>(sample_tiles_ * candidates);
  cumulative_ = arena.take<double>(sample_tiles_);
  const int64_t coarse_tiles = is_coarse_ ? sample_tiles_ : 0;
  if (sample_size_ == n) {
    pairs_ =
        arena.take<uint32_t>(coarse_tiles * ((depth + 1) / 2) * tile_points);
  } else if (tiles != nullptr) {
    // What follows the sample is free as yet.
    pairs_ = reinterpret_cast<uint32_t*>(
        tiles + sample_tiles_ * depth * tile_points);
  }
  squares_ = arena.take<int32_t>(coarse_tiles * tile_points);
  candidate_squares_ = arena.take<int32_t>(candidates);
}

/// Scrambled, lest the sample resonates with an order of the points.
template <typename T>
int64_t Seeding<T>::sampled_point(int64_t i) const {
  const int64_t begin = i * n_ / sample_size_;
  const uint64_t length = (i + 1) * n_ / sample_size_ - begin;
  const uint32_t scrambled = static_cast<uint32_t>(i) * 2654435769U;
  return begin + static_cast<int64_t>(scrambled * length >> 32);
}

template <typename T>
void Seeding<T>::choose_centers(const double* uniforms) {
  if (!is_coarse_ || !round_sample() || !choose<int32_t>(uniforms)) {
    choose<T>(uniforms);
  }
}

/// Rounds the sample to integers; false if there is nothing to round.
template <typename T>
bool Seeding<T>::round_sample() {
  if constexpr (sizeof(T) == 4) {
    const auto& kernels = pair_seeding_kernels();
    const int64_t grain = tile_grain(depth_, 2);
    torch::stable::parallel_for(
        0, sample_tiles_, grain, [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            tile_sums_[tile] = kernels.largest_square(
                tiles_ + tile * depth_ * tile_points, depth_);
          }
        });
    const double largest =
        std::sqrt(*std::max_element(tile_sums_, tile_sums_ + sample_tiles_));
    if (!(largest > std::numeric_limits<float>::min())) {
      return false;
    }
    const auto scale = static_cast<float>(longest_seeding_point / largest);
    torch::stable::parallel_for(
        0, sample_tiles_, grain, [&](int64_t begin, int64_t end) {
          kernels.round_points(
              tiles_, depth_, begin, end, scale, pairs_, squares_);
        });
  }
  return true;
}

/// Chooses with squared distances of this type, T or int32_t; false if those
/// of integers do not resolve the points.
template <typename T>
template <typename Distance>
bool Seeding<T>::choose(const double* uniforms) {
  constexpr bool has_pairs = !std::is_same_v<Distance, T>;
  using Value = std::conditional_t<has_pairs, uint32_t, T>;
  auto* nearest = reinterpret_cast<Distance*>(nearest_);
  auto* candidate_points = reinterpret_cast<Value*>(candidate_points_);
  auto* packed = reinterpret_cast<Value*>(packed_);
  const int64_t depth = has_pairs ? (depth_ + 1) / 2 : depth_;
  const int64_t count = num_centers_;
  for (int64_t tile = 0; tile < sample_tiles_; ++tile) {
    const int64_t points =
        std::min(tile_points, sample_size_ - tile * tile_points);
    Distance* distances = nearest + tile * candidates_ * tile_points;
    std::fill_n(
        distances,
        points,
        has_pairs ? std::numeric_limits<Distance>::max()
                  : std::numeric_limits<Distance>::infinity());
    std::fill(distances + points, distances + tile_points, Distance(0));
  }

  int64_t chosen = 0; // of the candidates tried last
  // One pass over the points for each centre, which tries all candidates.
  const auto try_candidates = [&](int64_t candidates) {
    for (int64_t c = 0; c < candidates; ++c) {
      if constexpr (has_pairs) {
        copy_point(pairs_, depth, rows_[c], candidate_points + c, candidates);
        candidate_squares_[c] = squares_[rows_[c]];
      } else {
        copy_point(tiles_, depth, rows_[c], candidate_points + c, candidates);
      }
    }
    pack_columns(candidate_points, depth, candidates, packed);
    torch::stable::parallel_for(
        0,
        sample_tiles_,
        tile_grain(depth, candidates),
        [&](int64_t begin, int64_t end) {
          if constexpr (has_pairs) {
            pair_seeding_kernels().seed_tiles(
                pairs_,
                squares_,
                depth,
                begin,
                end,
                packed,
                candidate_squares_,
                candidates,
                candidates_,
                chosen,
                nearest,
                tile_sums_);
          } else {
            seeding_kernels<T>().seed_tiles(
                tiles_,
                depth,
                begin,
                end,
                packed,
                candidates,
                candidates_,
                chosen,
                nearest,
                tile_sums_);
          }
        });
  };
  // Whatever the first uniform is, it must name a point.
  const double drawn = uniforms[0] * sample_size_;
  rows_[0] =
      drawn > 0 ? static_cast<int64_t>(std::min(drawn, sample_size_ - 1.0)) : 0;
  copy_point(tiles_, depth_, rows_[0], centers_, count);
  try_candidates(1);
  for (int64_t center = 1; center < count; ++center) {
    double total = 0;
    for (int64_t tile = 0; tile < sample_tiles_; ++tile) {
      total += tile_sums_[tile * candidates_ + chosen];
      cumulative_[tile] = total;
    }
    if (has_pairs && total < least_square * depth_ * sample_size_) {
      return false;
    }
    if (!(total > 0)) {
      // Fewer distinct points than centres.
      for (int64_t k = 0; k < depth_; ++k) {
        std::fill_n(
            centers_ + k * count + center, count - center, centers_[k * count]);
      }
      return true;
    }
    for (int64_t c = 0; c < candidates_; ++c) {
      const double uniform = uniforms[center * candidates_ + c];
      rows_[c] = draw(uniform * total, nearest, chosen);
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
    copy_point(tiles_, depth_, rows_[chosen], centers_ + center, count);
  }
  return true;
}

/// The first point of the sample at which the cumulative squared distances
/// that candidate `chosen` left exceed `threshold`.
template <typename T>
template <typename Distance>
int64_t Seeding<T>::draw(
    double threshold,
    const Distance* nearest, // [sample_tiles, candidates, 64]
    int64_t chosen) const {
  int64_t tile =
      std::upper_bound(cumulative_, cumulative_ + sample_tiles_, threshold) -
      cumulative_;
  // Rounding can take the threshold to the total: then it is the last point
  // that is no centre.
  while (tile == sample_tiles_ ||
         (tile > 0 && cumulative_[tile] == cumulative_[tile - 1])) {
    --tile;
  }
  const Distance* distances =
      nearest + (tile * candidates_ + chosen) * tile_points;
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

template class Seeding<float>;
template class Seeding<double>;

} // namespace kdci
