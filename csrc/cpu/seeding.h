// SPDX-License-Identifier: Apache-2.0
//
// The choice of the first centres. Results do not depend on the number of
// threads.
#pragma once

#include <cstdint>

#include "arena.h"

namespace kdci {

/// k-means++ (Arthur & Vassilvitskii, SODA 2007) on points stored in tiles: of
/// several candidates the one that leaves the least potential is kept. Of many
/// points it looks at a sample, one from each of equally long stretches: the
/// clusters that Lloyd's iterations end with are as good.
template <typename T>
class Seeding {
 public:
  /// Tiles [n / 64, depth, 64] and centres [depth, K] are the caller's. Points
  /// are rounded to 16-bit integers where `is_coarse`, the processor has
  /// products of these, and they resolve the distances.
  Seeding(
      Arena& arena,
      int64_t n,
      int64_t depth,
      int64_t num_centers,
      int64_t candidates,
      bool is_coarse,
      T* tiles,
      T* centers);

  int64_t sample_size() const {
    return sample_size_;
  }
  int64_t sampled_point(int64_t i) const;

  /// Chooses points of the sample, which the tiles begin with, as centres, with
  /// uniforms [K, candidates]. What follows the sample in the tiles is lost.
  void choose_centers(const double* uniforms);

 private:
  template <typename Distance>
  bool choose(const double* uniforms);
  template <typename Distance>
  int64_t draw(double threshold, const Distance* distances, int64_t chosen)
      const;
  bool round_sample();

  int64_t n_;
  int64_t depth_;
  int64_t num_centers_;
  int64_t candidates_;
  int64_t sample_size_;
  int64_t sample_tiles_; // tiles of the sample
  bool is_coarse_;

  T* tiles_;            // [num_tiles, depth, 64]
  T* centers_;          // [depth, K]
  int64_t* rows_;       // [candidates]: which points they are
  T* candidate_points_; // [depth, candidates]
  T* packed_;           // the same, packed
  // The squared distances of the sample's points that each candidate leaves.
  T* nearest_;         // [sample_tiles, candidates, 64]
  double* tile_sums_;  // [sample_tiles, candidates]
  double* cumulative_; // [sample_tiles]
  // The sample as integers, packed in pairs of coordinates 2k, 2k + 1, and the
  // squares of its points' and the candidates' lengths.
  uint32_t* pairs_;            // [sample_tiles, (depth + 1) / 2, 64]
  int32_t* squares_;           // [sample_tiles, 64]
  int32_t* candidate_squares_; // [candidates]
};

} // namespace kdci
