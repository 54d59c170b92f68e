// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of k-means++.
#pragma once

#include <cstdint>

#include "layout.h"
#include "level.h"

namespace kdci {

template <typename T>
struct SeedingKernels {
  /// One round of k-means++ over tiles [begin, end), with packed candidates.
  /// nearest [num_tiles, stride, 64] holds in slot `chosen` the squared
  /// distance of each point to the centres so far, and gets in slot c what
  /// candidate c would leave of it, the sum of which goes to
  /// sums [num_tiles, stride].
  void (*seed_tiles)(
      const T* tiles,
      int64_t depth,
      int64_t begin,
      int64_t end,
      const T* columns,
      int64_t candidates,
      int64_t stride,
      int64_t chosen,
      T* nearest,
      double* sums);
};

KDCI_DECLARE_PER_TYPE(SeedingKernels, seeding_kernels)

/// The same on points rounded to 16-bit integers, no longer than
/// longest_seeding_point. Their squared distances are exact: equal points are
/// at none. The functions are null unless SimdLevel is avx512vnni.
struct PairSeedingKernels {
  /// The largest squared length of a tile's points.
  float (*largest_square)(const float* tile, int64_t depth);

  /// Rounds tiles [begin, end), times `scale`, to pairs
  /// [num_tiles, (depth + 1) / 2, 64] of coordinates 2k, 2k + 1; squares
  /// [num_tiles, 64] are those of the rounded points' lengths.
  void (*round_points)(
      const float* tiles,
      int64_t depth,
      int64_t begin,
      int64_t end,
      float scale,
      uint32_t* pairs,
      int32_t* squares);

  /// As SeedingKernels::seed_tiles, with packed candidates of `half` pairs.
  void (*seed_tiles)(
      const uint32_t* pairs,
      const int32_t* squares,
      int64_t half,
      int64_t begin,
      int64_t end,
      const uint32_t* columns,
      const int32_t* column_squares,
      int64_t candidates,
      int64_t stride,
      int64_t chosen,
      int32_t* nearest,
      double* sums);
};

KDCI_DECLARE_PER_LEVEL(PairSeedingKernels, pair_seeding_kernels)

/// Squared distances of points of twice that length still fit 32 bits, with
/// what rounding lengthens them by.
constexpr float longest_seeding_point = 22000;

} // namespace kdci
