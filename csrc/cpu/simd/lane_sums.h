// SPDX-License-Identifier: Apache-2.0
//
// Sums across the lanes of vectors (see level.h for how it is compiled).
#pragma once

#include <utility>

#include "transpose.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {

/// Takes x and y as consecutive segments of `size` values, and adds the
/// second half of each segment to the first.
template <int size, typename T, int... lane>
inline Vec<T> add_halves(
    Vec<T> x,
    Vec<T> y,
    std::integer_sequence<int, lane...>) {
  constexpr int half = size / 2;
  return __builtin_shufflevector(x, y, (lane / half * size + lane % half)...) +
      __builtin_shufflevector(
             x, y, (lane / half * size + lane % half + half)...);
}

template <int size, typename T>
inline Vec<T> add_halves(Vec<T> x, Vec<T> y) {
  return add_halves<size, T>(
      x, y, std::make_integer_sequence<int, int(lanes<T>)>());
}

/// The sums of segments of `size` lanes, in the first lanes.
template <int size, typename T>
inline Vec<T> sum_segments(Vec<T> values) {
  if constexpr (size == 1) {
    return values;
  } else {
    return sum_segments<size / 2, T>(add_halves<size, T>(values, values));
  }
}

template <typename T>
inline T sum_lanes(Vec<T> values) {
  return sum_segments<int(lanes<T>), T>(values)[0];
}

template <int size, typename T, int... lane>
inline Vec<T> add_other_halves(
    Vec<T> values,
    std::integer_sequence<int, lane...>) {
  return values +
      __builtin_shufflevector(values, values, (lane ^ (size / 2))...);
}

/// The sums of segments of `size` lanes, in all of their lanes.
template <int size, typename T>
inline Vec<T> sum_within(Vec<T> values) {
  if constexpr (size == 1) {
    return values;
  } else {
    return sum_within<size / 2, T>(add_other_halves<size, T>(
        values, std::make_integer_sequence<int, int(lanes<T>)>()));
  }
}

/// The sums of four vectors.
template <typename T>
inline void sum_lanes_of_four(const Vec<T>* values, T* sums) {
  constexpr int size = lanes<T>;
  const Vec<T> low = add_halves<size, T>(values[0], values[1]);
  const Vec<T> high = add_halves<size, T>(values[2], values[3]);
  if constexpr (size == 2) {
    store(sums, low);
    store(sums + 2, high);
  } else {
    const Vec<T> all =
        sum_segments<size / 4, T>(add_halves<size / 2, T>(low, high));
    for (int k = 0; k < 4; ++k) {
      sums[k] = all[k];
    }
  }
}

/// The sums of `count` vectors, which are overwritten.
template <int count, typename T>
inline void sum_lanes_of(Vec<T> (&values)[count], T* sums) {
  if constexpr (count == lanes<T>) {
    sum_rows<count / 2, T>(values);
    store(sums, values[0]);
  } else {
    for (int k = 0; k < count; k += 4) {
      sum_lanes_of_four<T>(values + k, sums + k);
    }
  }
}

/// A sum of so many vectors that adding one to the next would round too often.
template <typename T>
struct LongSum {
  Vec<T> total = {};
  Vec<T> part = {};
  int count = 0;

  void add(Vec<T> value) {
    part += value;
    if (++count == 16) {
      total += part;
      part = Vec<T>{};
      count = 0;
    }
  }

  T sum() const {
    return sum_lanes<T>(total + part);
  }
};

} // namespace kdci::KDCI_SIMD
