// SPDX-License-Identifier: Apache-2.0
#include "seeding.h"

#include "tile.h"

namespace kdci::KDCI_SIMD {
namespace {

template <typename T>
void seed_tiles(
    const T* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    const T* columns,
    int64_t candidates,
    int64_t stride,
    int64_t chosen,
    T* nearest,
    double* sums) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const T* points = tiles + tile * depth * tile_points;
    T* distances = nearest + tile * stride * tile_points;
    T lowest[tile_points];
    for (int64_t i = 0; i < tile_points; i += lanes<T>) {
      store(lowest + i, load(distances + chosen * tile_points + i));
    }
    for_groups(candidates, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int width = decltype(group)::value;
      T* left = distances + first * tile_points;
      for (int64_t i = 0; i < tile_points; i += block_points<T>) {
        Block<T, width> block = {};
        accumulate<Term::squared_difference, T, width, num_vectors>(
            points + i, depth, columns + first * depth, block);
#pragma GCC unroll 4
        for (int64_t v = 0; v < num_vectors; ++v) {
          const Vec<T> old = load(lowest + i + v * lanes<T>);
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
            store(
                left + c * tile_points + i + v * lanes<T>,
                block[c][v] < old ? block[c][v] : old);
          }
        }
      }
      for (int c = 0; c < width; ++c) {
        sums[tile * stride + first + c] =
            sum_all(left + c * tile_points, tile_points);
      }
    });
  }
}

#if defined(__AVX512VNNI__)

float largest_square(const float* tile, int64_t depth) {
  float squares[tile_points];
  square_lengths(tile, tile_points, depth, squares);
  return largest_of(squares);
}

void round_points(
    const float* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    float scale,
    uint32_t* pairs,
    int32_t* squares) {
  const int64_t half = (depth + 1) / 2;
  for (int64_t tile = begin; tile < end; ++tile) {
    uint32_t* to = pairs + tile * half * tile_points;
    round_to_pairs(
        tiles + tile * depth * tile_points, tile_points, depth, scale, to);
    for (int64_t i = 0; i < tile_points; i += lanes<int32_t>) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = 0; k < half; ++k) {
        const __m512i pair = _mm512_loadu_si512(to + k * tile_points + i);
        sum = _mm512_dpwssd_epi32(sum, pair, pair);
      }
      _mm512_storeu_si512(squares + tile * tile_points + i, sum);
    }
  }
}

/// The sum of a tile's distances.
double sum_all(const int32_t* values) {
  Vec<double> sums[2] = {};
  for (int64_t i = 0; i < tile_points; i += lanes<int32_t>) {
    const __m512i part = _mm512_loadu_si512(values + i);
    sums[0] += (Vec<double>)_mm512_cvtepi32_pd(_mm512_castsi512_si256(part));
    sums[1] +=
        (Vec<double>)_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(part, 1));
  }
  return sum_lanes(sums[0] + sums[1]);
}

void seed_pair_tiles(
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
    double* sums) {
  static_assert(block_points<int32_t> == tile_points);
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint32_t* points = pairs + tile * half * tile_points;
    int32_t* distances = nearest + tile * stride * tile_points;
    __m512i lowest[num_vectors];
    __m512i square[num_vectors];
    for (int v = 0; v < num_vectors; ++v) {
      const int64_t i = v * lanes<int32_t>;
      lowest[v] = _mm512_loadu_si512(distances + chosen * tile_points + i);
      square[v] = _mm512_loadu_si512(squares + tile * tile_points + i);
    }
    for_groups(candidates, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int width = decltype(group)::value;
      Block<int32_t, width> block = {};
      accumulate_words<Packing::pairs, width, num_vectors>(
          points, half, columns + first * half, block);
      int32_t* left = distances + first * tile_points;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
        const __m512i column = _mm512_set1_epi32(column_squares[first + c]);
#pragma GCC unroll 4
        for (int v = 0; v < num_vectors; ++v) {
          // |x|^2 + |c|^2 - 2 x.c
          const __m512i distance = _mm512_sub_epi32(
              _mm512_add_epi32(square[v], column),
              _mm512_slli_epi32((__m512i)block[c][v], 1));
          _mm512_storeu_si512(
              left + c * tile_points + v * lanes<int32_t>,
              _mm512_min_epi32(distance, lowest[v]));
        }
      }
      for (int c = 0; c < width; ++c) {
        sums[tile * stride + first + c] = sum_all(left + c * tile_points);
      }
    });
  }
}

#endif

} // namespace

extern const SeedingKernels<float> seeding_kernels_float = {seed_tiles<float>};
extern const SeedingKernels<double> seeding_kernels_double = {
    seed_tiles<double>};

#if defined(__AVX512VNNI__)
extern const PairSeedingKernels pair_seeding_kernels = {
    largest_square,
    round_points,
    seed_pair_tiles};
#else
extern const PairSeedingKernels pair_seeding_kernels = {};
#endif

} // namespace kdci::KDCI_SIMD
