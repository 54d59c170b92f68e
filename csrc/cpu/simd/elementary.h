// SPDX-License-Identifier: Apache-2.0
//
// exp and tanh of vectors, to the last bit or two (see level.h for how it is
// compiled).
#pragma once

#include "vec.h"

namespace kdci::KDCI_SIMD {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
};
template <>
struct Bits<double> {
  using type = uint64_t;
};
template <typename T>
using BitsVec = Vec<typename Bits<T>::type>;

template <typename T>
inline typename Bits<T>::type bits_of(T x) {
  typename Bits<T>::type bits;
  __builtin_memcpy(&bits, &x, sizeof(x));
  return bits;
}

template <typename T>
inline Vec<T> absolute(Vec<T> x) {
  using Word = typename Bits<T>::type;
  return (Vec<T>)((BitsVec<T>)x & (~Word(0) >> 1));
}

/// The larger of two magnitudes. As whole numbers they have the same order, in
/// which NaN comes last, and comparing these is a single fast instruction.
template <typename T>
inline Vec<T> larger_size(Vec<T> x, Vec<T> y) {
  const auto a = (BitsVec<T>)x;
  const auto b = (BitsVec<T>)y;
  return (Vec<T>)(a > b ? a : b);
}

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr float round = 0x1.8p23f; // x + round - round is an integer
  static constexpr float log2_e = 0x1.715476p0f;
  static constexpr float ln2_high = 0x1.62e4p-1f; // n * ln2_high is exact
  static constexpr float ln2_low = 0x1.7f7d1cp-20f;
  // (e^r - 1 - r) / r^2 by powers of r for |r| <= log(2) / 2, of least largest
  // error relative to e^r: 4e-9.
  static constexpr float tail[] = {
      0x1.fffffcp-2f,
      0x1.555492p-3f,
      0x1.5558f2p-5f,
      0x1.123a2p-7f,
      0x1.6a23dp-10f};
  // Where exp would be subnormal it is taken for 0; tanh is 1 to the last bit
  // from tanh_limit on.
  static constexpr float lowest = -87.0f;
  static constexpr float highest = 88.0f;
  static constexpr float tanh_limit = 10;
};
template <>
struct ExpConstants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr double round = 0x1.8p52;
  static constexpr double log2_e = 0x1.71547652b82fep0;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double tail[] = {
      // Taylor's
      1.0 / 2,
      1.0 / 6,
      1.0 / 24,
      1.0 / 120,
      1.0 / 720,
      1.0 / 5040,
      1.0 / 40320,
      1.0 / 362880,
      1.0 / 3628800,
      1.0 / 39916800,
      1.0 / 479001600,
      1.0 / 6227020800};
  static constexpr double lowest = -708;
  static constexpr double highest = 709;
  static constexpr double tanh_limit = 20;
};

/// e^x = power (1 + r + r^2 tail), power = 2^n, for lowest <= x <= highest; NaN
/// stays in r. Of several vectors step by step, since one alone is a chain of
/// operations each of which waits for the one before.
template <int count, typename T>
struct ExpParts {
  Vec<T> power[count];
  Vec<T> r[count];
  Vec<T> tail[count];
};

template <int count, typename T>
KDCI_INLINE ExpParts<count, T> split_exp(const Vec<T> (&x)[count]) {
  using C = ExpConstants<T>;
  ExpParts<count, T> parts;
  Vec<T> shifted[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    shifted[i] = x[i] * C::log2_e + C::round;
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const Vec<T> n = shifted[i] - C::round;
    parts.r[i] = (x[i] - n * C::ln2_high) - n * C::ln2_low;
    // The low bits of `shifted` hold n.
    const BitsVec<T> exponent = (BitsVec<T>)shifted[i] + C::exponent_bias;
    parts.power[i] = (Vec<T>)(exponent << C::mantissa_bits);
  }
  constexpr int degree = sizeof(C::tail) / sizeof(T) - 1;
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    parts.tail[i] = broadcast(C::tail[degree]);
  }
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) {
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      parts.tail[i] = parts.tail[i] * parts.r[i] + C::tail[k];
    }
  }
  return parts;
}

/// x = e^x
template <int count, typename T>
KDCI_INLINE void exponentials(Vec<T> (&x)[count]) {
  const ExpParts<count, T> parts = split_exp<count, T>(x);
  Vec<T> mantissa[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    mantissa[i] = parts.tail[i] * parts.r[i] + T(1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    mantissa[i] = mantissa[i] * parts.r[i] + T(1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = parts.power[i] * mantissa[i];
  }
}

#if defined(__AVX512F__)
/// x = e^2x = 2^(n / 16) e^2r, where the powers of 2^(1 / 16) fit into a
/// register, and the rest needs a polynomial of degree 3, which errs by 2e-9:
/// two thirds of the multiplications of e^x. That ln2 / 32 is rounded changes r
/// by n * 6e-11, at most a tenth of what the rounding of x itself may.
template <int count>
KDCI_INLINE void exponentials_of_twice_by_table(Vec<float> (&x)[count]) {
  const Vec<float> powers = {
      0x1p+0f,
      0x1.0b5586p+0f,
      0x1.172b84p+0f,
      0x1.2387a6p+0f,
      0x1.306fep+0f,
      0x1.3dea64p+0f,
      0x1.4bfdaep+0f,
      0x1.5ab07ep+0f,
      0x1.6a09e6p+0f,
      0x1.7a1148p+0f,
      0x1.8ace54p+0f,
      0x1.9c4918p+0f,
      0x1.ae89fap+0f,
      0x1.c199bep+0f,
      0x1.d5818ep+0f,
      0x1.ea4afap+0f};
  constexpr float round = ExpConstants<float>::round;
  constexpr float scale = 0x1.715476p+5f; // 32 / ln2
  constexpr float step = 0x1.62e43p-6f;   // ln2 / 32
  Vec<float> shifted[count];
  Vec<float> rest[count];
  Vec<float> power[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    shifted[i] = x[i] * scale + round;
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    rest[i] = x[i] - (shifted[i] - round) * step;
    // The low bits of `shifted` hold n, of which the lowest four are an index.
    const auto bits = (BitsVec<float>)shifted[i];
    const auto exponent = (bits << 19) & 0xff800000;
    const auto fraction = (BitsVec<float>)_mm512_maskz_permutexvar_ps(
        0xffff, (__m512i)bits, (__m512)powers);
    power[i] = (Vec<float>)(fraction + exponent);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const Vec<float> r = rest[i];
    const Vec<float> minus_one =
        ((r * 0x1.555556p+0f + 0x1.00022p+1f) * r + 2.0f) * r;
    x[i] = power[i] + power[i] * minus_one;
  }
}
#endif

/// x = e^2x, for lowest <= 2x <= highest.
template <int count, typename T>
KDCI_INLINE void exponentials_of_twice(Vec<T> (&x)[count]) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    exponentials_of_twice_by_table<count>(x);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] += x[i];
  }
  exponentials<count, T>(x);
}

/// For softmax: any x <= 0.
template <int count, typename T>
KDCI_INLINE void exponentials_or_zero(Vec<T> (&x)[count]) {
  const Vec<T> lowest = broadcast(ExpConstants<T>::lowest);
  Vec<T> values[count];
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    values[i] = x[i];
  }
  exponentials<count, T>(values);
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    x[i] = x[i] < lowest ? Vec<T>{} : values[i];
  }
}

template <typename T>
inline Vec<T> exponential_or_zero(Vec<T> x) {
  Vec<T> values[1] = {x};
  exponentials_or_zero<1, T>(values);
  return values[0];
}

template <typename T>
inline Vec<T> hyperbolic_tangent(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> limit = broadcast(C::tanh_limit);
  const Vec<T> size = absolute<T>(x);
  const Vec<T> clamped = size > limit ? limit : size;
  const Vec<T> twice[1] = {clamped + clamped};
  const ExpParts<1, T> parts = split_exp<1, T>(twice);
  const Vec<T> r = parts.r[0];
  const Vec<T> power = parts.power[0];
  const Vec<T> rest = r * r * parts.tail[0] + r;
  const Vec<T> minus_one = power * rest + (power - T(1));
  const Vec<T> tangent = minus_one / (minus_one + T(2));
  return x < Vec<T>{} ? -tangent : tangent;
}

} // namespace kdci::KDCI_SIMD
