// SPDX-License-Identifier: Apache-2.0
//
// k-means on points stored in tiles (see simd/layout.h): k-means++ and Lloyd's
// iterations. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "arena.h"
#include "simd/kmeans.h"

namespace kdci {

/// Copies the columns of matrix [depth, count] into groups of 6 columns; a
/// group takes depth * 6 values, the last one depth * (as many as are left).
template <typename T>
void pack_columns(const T* matrix, int64_t depth, int64_t count, T* columns);

/// Clusters n points of `depth` coordinates into K clusters.
template <typename T>
class Kmeans {
 public:
  Kmeans(
      Arena& arena,
      int64_t n,
      int64_t depth,
      int64_t num_centers,
      int64_t candidates);

  /// Where the points go: tiles of 64.
  T* tiles() {
    return tiles_;
  }

  /// Of many points k-means++ looks at a sample, one from each of equally long
  /// stretches: the clusters that the iterations end with are as good.
  int64_t sample_size() const {
    return sample_size_;
  }
  int64_t sampled_point(int64_t i) const;

  /// Centres [depth, K]: the start of `iterate` and its result.
  T* centers() {
    return centers_;
  }

  /// Chooses points of the sample, which the tiles begin with, as centres by
  /// k-means++ (Arthur & Vassilvitskii, SODA 2007), with uniforms
  /// [K, candidates]: of several candidates the one that leaves the least
  /// potential is kept.
  void choose_centers(const double* uniforms);

  /// Lloyd's iterations until no label changes, or the inertia decreases by at
  /// most `tolerance` times itself. With m_t the means after iteration t the
  /// next centres are m_t + momentum (m_t - m_(t-1)); where that made the
  /// inertia rise, iterating goes on from the last means. Writes labels [n];
  /// returns the iterations made.
  int64_t iterate(
      int64_t max_iter,
      double tolerance,
      double momentum,
      int64_t* labels);

  /// Sum of the squared distances of the points to their centres.
  double inertia(const int64_t* labels);

  /// Rows in each cluster [K].
  const int64_t* counts() const {
    return counts_;
  }

 private:
  int64_t draw(double threshold, int64_t chosen) const;
  void copy_point(int64_t row, T* point, int64_t stride) const;
  int64_t assign(int64_t* labels);
  void prepare_products(Assignment<T>& task);
  bool find_means(const int64_t* labels, double& between);
  void measure_drift();
  double own_distances(const int64_t* labels);
  int64_t grain(int64_t columns) const;

  int64_t n_;
  int64_t depth_;
  int64_t num_centers_;
  int64_t candidates_;
  int64_t num_tiles_;
  // Small problems: where there is little to do exactness costs nothing, and
  // clusters of a few points can be closer to each other than products resolve.
  bool small_;
  int64_t sample_size_;  // points to choose centres from
  int64_t sample_tiles_; // tiles of these

  T* tiles_;        // [num_tiles, depth, 64]
  T* centers_;      // [depth, K]
  T* before_;       // [depth, K]: centres before the last move
  T* means_;        // [depth, K]: of the clusters after the last iteration
  T* fresh_;        // [depth, K]: of the clusters now
  T* packed_;       // centres or candidates, packed
  uint32_t* pairs_; // centres as 16-bit integers, packed in pairs
  T* bias_;         // [K]
  T* drift_;        // [K]
  bool has_slack_ = false;
  // The slack of each point, or its squared distance to its own centre; while
  // centres are being chosen, in the same place, the squared distances of the
  // sample's points to the nearest one and each of the candidates.
  T* slack_;            // [num_tiles * 64]
  T* nearest_;          // [sample_tiles, candidates, 64]
  T* candidate_points_; // [depth, candidates]
  double* tile_sums_;   // [sample_tiles, candidates], at least [num_tiles]
  double* cumulative_;  // [sample_tiles]
  int64_t* sums_;       // [K, depth], times sum_scale_
  int64_t* counts_;     // [K]
  double sum_scale_ = 1;
};

} // namespace kdci
