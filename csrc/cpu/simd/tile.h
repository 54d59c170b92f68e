// SPDX-License-Identifier: Apache-2.0
//
// The register-tiled inner loop that every kernel of the dictionary is made
// of, on points in tiles (see level.h for how it is compiled).
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "layout.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {

// Vectors of points that are in work at once: with 6 columns that is 24 of the
// 32 registers of AVX-512, else 12 of 16.
constexpr int num_vectors = vector_bytes == 64 ? 4 : 2;

template <typename T>
constexpr int64_t block_points = num_vectors * lanes<T>;

template <typename T>
using Mask = decltype(Vec<T>{} > Vec<T>{});

template <typename T, int columns, int vectors = num_vectors>
using Block = Vec<T>[columns][vectors];

/// What a coordinate of a point and one of a column add to their block.
enum class Term { product, minus_product, squared_difference };

/// block += these terms of columns [depth][width] and points [depth][64].
template <Term term, typename T, int width, int vectors>
KDCI_INLINE void accumulate(
    const T* points,
    int64_t depth,
    const T* columns,
    Block<T, width, vectors>& block,
    int64_t points_stride = tile_points,
    int64_t columns_stride = width) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> point[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      point[v] = load(points + v * lanes<T>);
    }
#pragma GCC unroll 6
    for (int c = 0; c < width; ++c) {
      const Vec<T> column = broadcast(columns[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if constexpr (term == Term::squared_difference) {
          const Vec<T> difference = point[v] - column;
          block[c][v] += difference * difference;
        } else if constexpr (term == Term::minus_product) {
          block[c][v] -= point[v] * column;
        } else {
          block[c][v] += point[v] * column;
        }
      }
    }
    points += points_stride;
    columns += columns_stride;
  }
}

#if defined(__AVX512VNNI__)

/// squares [64] of the lengths of points [depth][64], of coordinates `stride`
/// apart.
KDCI_INLINE void square_lengths(
    const float* points,
    int64_t stride,
    int64_t depth,
    float* squares) {
  Vec<float> sums[num_vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < num_vectors; ++v) {
      const Vec<float> value = load(points + k * stride + v * lanes<float>);
      sums[v] += value * value;
    }
  }
  for (int v = 0; v < num_vectors; ++v) {
    store(squares + v * lanes<float>, sums[v]);
  }
}

/// The largest of a tile's values, none of them negative.
KDCI_INLINE float largest_of(const float* values) {
  Vec<float> largest = {};
  for (int64_t i = 0; i < tile_points; i += lanes<float>) {
    largest = maximum<float>(load(values + i), largest);
  }
  return largest_lane<float>(largest);
}

/// Two vectors of 16-bit integers as one of pairs, the first one low.
KDCI_INLINE __m512i join_pairs(__m512i first, __m512i second) {
  return _mm512_or_si512(
      _mm512_and_si512(first, _mm512_set1_epi32(0xffff)),
      _mm512_slli_epi32(second, 16));
}

/// pairs [(depth + 1) / 2][64] = coordinates 2k and 2k + 1 of points
/// [depth][64], scaled and rounded; of all coordinates `stride` apart.
KDCI_INLINE void round_to_pairs(
    const float* points,
    int64_t stride,
    int64_t depth,
    float scale,
    uint32_t* pairs) {
  const auto rounded = [&](int64_t k, int64_t i) KDCI_ALWAYS_INLINE {
    return k < depth
        ? _mm512_cvtps_epi32((__m512)(load(points + k * stride + i) * scale))
        : _mm512_setzero_si512();
  };
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t i = 0; i < tile_points; i += lanes<float>) {
      _mm512_storeu_si512(
          pairs + k / 2 * tile_points + i,
          join_pairs(rounded(k, i), rounded(k + 1, i)));
    }
  }
}

/// Integers that a 32-bit word holds.
enum class Packing { pairs, quads };

/// block += columns [words][width] . points [words][64], both of words of
/// integers. The instruction for quads takes unsigned points: 128 is added to
/// each of them, and the block must start from what that adds up to.
template <Packing packing, int width, int vectors>
KDCI_INLINE void accumulate_words(
    const uint32_t* points,
    int64_t words,
    const uint32_t* columns,
    Block<int32_t, width, vectors>& block,
    int64_t points_stride = tile_points,
    int64_t columns_stride = width) {
  const __m512i signs = _mm512_set1_epi8(-128);
  for (int64_t k = 0; k < words; ++k) {
    __m512i point[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      point[v] = _mm512_loadu_si512(points + v * lanes<float>);
      if constexpr (packing == Packing::quads) {
        point[v] = _mm512_xor_si512(point[v], signs);
      }
    }
#pragma GCC unroll 6
    for (int c = 0; c < width; ++c) {
      const __m512i column = _mm512_set1_epi32(columns[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const auto sum = (__m512i)block[c][v];
        block[c][v] = packing == Packing::quads
            ? (Vec<int32_t>)_mm512_dpbusd_epi32(sum, point[v], column)
            : (Vec<int32_t>)_mm512_dpwssd_epi32(sum, point[v], column);
      }
    }
    points += points_stride;
    columns += columns_stride;
  }
}

#endif

template <int width>
struct Width {
  static constexpr int value = width;
};

/// Calls `body` with the width of each group of packed columns as a type and
/// the index of the group's first column.
template <typename Body>
KDCI_INLINE void for_groups(int64_t columns, Body body) {
  int64_t first = 0;
  for (; first + 6 <= columns; first += 6) {
    body(Width<6>(), first);
  }
  switch (columns - first) {
    case 5:
      body(Width<5>(), first);
      break;
    case 4:
      body(Width<4>(), first);
      break;
    case 3:
      body(Width<3>(), first);
      break;
    case 2:
      body(Width<2>(), first);
      break;
    case 1:
      body(Width<1>(), first);
      break;
  }
}

/// Calls `body` with a number of vectors as a type and the index of their first
/// point, until `count` points are covered.
template <typename T, typename Body>
KDCI_INLINE void for_blocks(int64_t count, Body body) {
  int64_t i = 0;
  if constexpr (num_vectors == 4) {
    for (; count - i > 2 * lanes<T>; i += 4 * lanes<T>) {
      body(Width<4>(), i);
    }
  }
  for (; count - i > lanes<T>; i += 2 * lanes<T>) {
    body(Width<2>(), i);
  }
  if (i < count) {
    body(Width<1>(), i);
  }
}

// -- Sums in double ----------------------------------------------------------

KDCI_INLINE Vec<double> widen(const double* from) {
  return load(from);
}

KDCI_INLINE Vec<double> widen(const float* from) {
  typedef float Half __attribute__((
      vector_size(vector_bytes / 2), aligned(alignof(float)), may_alias));
  return __builtin_convertvector(
      *reinterpret_cast<const Half*>(from), Vec<double>);
}

KDCI_INLINE double sum_lanes(Vec<double> values) {
  double sums[lanes<double>];
  store(sums, values);
#pragma GCC unroll 3
  for (int64_t half = lanes<double> / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

/// Sum of `count` values, a multiple of 64.
template <typename T>
KDCI_INLINE double sum_all(const T* values, int64_t count) {
  Vec<double> sums[4] = {};
  for (int64_t i = 0; i < count; i += 4 * lanes<double>) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      sums[v] += widen(values + i + v * lanes<double>);
    }
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

} // namespace kdci::KDCI_SIMD
