// SPDX-License-Identifier: Apache-2.0
//
// Sums in fixed point. Integers add up to the same whatever the order, so any
// number of threads may add to a sum by atomics and results repeat bitwise.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

namespace kdci::cuda {

/// Sums of up to `terms` values below `bound` in magnitude. A sum is one
/// 64-bit word for float32, in units of 1 / scale; for float64 a second word
/// holds the rest in units of 1 / (scale fine). Chosen so that neither word can
/// overflow: bound terms scale <= 2^62 and terms fine <= 2^62.
struct FixedPoint {
  double scale;
  double fine;
  double unit;      // 1 / scale
  double fine_unit; // 1 / fine

  FixedPoint() = default;
  FixedPoint(int64_t terms, double bound)
      : scale(largest_scale(static_cast<double>(terms) * bound)),
        fine(largest_scale(static_cast<double>(terms))),
        unit(1 / scale),
        fine_unit(1 / fine) {}

 private:
  /// The largest power of two whose product with `largest` is below 2^62.
  static double largest_scale(double largest) {
    int exponent = 0;
    frexp(largest, &exponent);
    return ldexp(1.0, 62 - exponent);
  }
};

using Word = unsigned long long;

/// Words of a sum.
template <typename A>
constexpr int kWords = sizeof(A) == 4 ? 1 : 2;

/// Adds `sign` * `value` to sum `e` of `count`, kept as sums[word][count].
template <typename A>
__device__ __forceinline__ void fixed_add(
    Word* sums,
    int64_t count,
    int64_t e,
    const FixedPoint& point,
    double value,
    int sign) {
  const double scaled = value * point.scale;
  if constexpr (kWords<A> == 1) {
    const long long whole = llrint(scaled);
    atomicAdd(sums + e, static_cast<Word>(sign * whole));
  } else {
    const double floored = floor(scaled);
    const long long whole = static_cast<long long>(floored);
    const long long rest = llrint((scaled - floored) * point.fine);
    atomicAdd(sums + e, static_cast<Word>(sign * whole));
    atomicAdd(sums + count + e, static_cast<Word>(sign * rest));
  }
}

template <typename A>
__device__ __forceinline__ double fixed_value(
    const Word* sums,
    int64_t count,
    int64_t e,
    const FixedPoint& point) {
  double value = static_cast<double>(static_cast<long long>(sums[e]));
  if constexpr (kWords<A> == 2) {
    value += static_cast<double>(static_cast<long long>(sums[count + e])) *
        point.fine_unit;
  }
  return value * point.unit;
}

} // namespace kdci::cuda
