// SPDX-License-Identifier: Apache-2.0
//
// Lloyd's iterations on points stored in tiles (see simd/layout.h). Results do
// not depend on the number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "arena.h"
#include "seeding.h"
#include "simd/kmeans.h"

namespace kdci {

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

  /// Centres [depth, K]: the start of `iterate` and its result.
  T* centers() {
    return centers_;
  }

  /// To be used before `iterate`.
  Seeding<T>& seeding() {
    return *seeding_;
  }

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

  /// Sum of the squared distances of the points to their centres, after
  /// `iterate`.
  double inertia(const int64_t* labels);

  /// Rows in each cluster [K].
  const int64_t* counts() const {
    return counts_;
  }

 private:
  int64_t assign(int64_t* labels);
  void prepare_products(Assignment<T>& task);
  bool find_means(const int64_t* labels, double& between);
  void measure_drift();
  double own_distances(const int64_t* labels);

  int64_t n_;
  int64_t depth_;
  int64_t num_centers_;
  int64_t num_tiles_;
  // Small problems are settled by squared differences at once: where there is
  // little to do bounds and roundings do not pay.
  bool small_;

  T* tiles_;        // [num_tiles, depth, 64]
  T* centers_;      // [depth, K]
  T* before_;       // [depth, K]: centres before the last move
  T* means_;        // [depth, K]: of the clusters after the last iteration
  T* fresh_;        // [depth, K]: of the clusters now
  T* packed_;       // centres, packed
  uint32_t* pairs_; // centres as 16-bit integers, packed in pairs
  T* bias_;         // [K]
  T* drift_;        // [K]
  bool has_slack_ = false;
  T* slack_;          // [num_tiles * 64], or squared distances to own centres
  double* tile_sums_; // [num_tiles]
  int64_t* sums_;     // [K, depth], times sum_scale_
  int64_t* counts_;   // [K]
  double sum_scale_ = 1;
  double total_ = 0; // the sum of squares of all points

  // What a thread needs for its share of an assignment.
  struct Part {
    std::vector<T> scratch;
    std::vector<int64_t> sums; // as sums_ and counts_
    int64_t moves = 0;
  };
  std::vector<Part> parts_;

  // Its memory is that of all of the above but tiles and centres.
  std::optional<Seeding<T>> seeding_;
};

} // namespace kdci
