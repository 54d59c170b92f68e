// SPDX-License-Identifier: Apache-2.0
//
// The transpose of a square of values in registers, and the sums of its rows
// (see level.h for how it is compiled).
#pragma once

#include "vec.h"

namespace kdci::KDCI_SIMD {

template <int... indices>
struct Indices {};

template <int count, int... tail>
struct IndicesUpTo : IndicesUpTo<count - 1, count - 1, tail...> {};

template <int... indices>
struct IndicesUpTo<0, indices...> {
  using type = Indices<indices...>;
};

/// Swaps the two off-diagonal quarters of pairs of rows `step` apart.
template <int step, typename T, int... j>
KDCI_INLINE void exchange(Vec<T>& upper, Vec<T>& lower, Indices<j...>) {
  constexpr int width = sizeof...(j);
  const Vec<T> a = upper;
  const Vec<T> b = lower;
  upper = __builtin_shufflevector(a, b, ((j & step) ? width + j - step : j)...);
  lower = __builtin_shufflevector(a, b, ((j & step) ? width + j : j + step)...);
}

/// Swaps what is on both sides of the diagonal, from quarters of size `step`
/// down.
template <int step, typename T>
KDCI_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (step > 0) {
    using AllLanes = typename IndicesUpTo<lanes<T>>::type;
#pragma GCC unroll 16
    for (int64_t i = 0; i < lanes<T>; ++i) {
      if ((i & step) == 0) {
        exchange<step, T>(rows[i], rows[i + step], AllLanes());
      }
    }
    transpose<step / 2, T>(rows);
  }
}

/// From rows of partial sums `step` apart: one row of half as many parts each.
template <int step, typename T, int... j>
KDCI_INLINE Vec<T> add_halves(Vec<T> a, Vec<T> b, Indices<j...>) {
  constexpr int width = sizeof...(j);
  return __builtin_shufflevector(a, b, ((j & step) ? width + j - step : j)...) +
      __builtin_shufflevector(a, b, ((j & step) ? width + j : j + step)...);
}

/// rows[0] = the sums of the rows' values: a transpose that adds on its way.
template <int step, typename T>
KDCI_INLINE void sum_rows(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (step > 0) {
    using AllLanes = typename IndicesUpTo<lanes<T>>::type;
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) {
      rows[i] = add_halves<step, T>(rows[i], rows[i + step], AllLanes());
    }
    sum_rows<step / 2, T>(rows);
  }
}

} // namespace kdci::KDCI_SIMD
