// SPDX-License-Identifier: Apache-2.0
//
// GCC vector types of the width that the file is being compiled for. To be
// included only by files compiled per SIMD level (see level.h), inside no
// namespace; everything here lives in the level's own namespace, so that no
// copy of a function compiled for one level can serve another.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <utility>

#if !defined(KDCI_SIMD)
#error "compile with -DKDCI_SIMD=baseline|avx2|avx512|avx512vnni"
#endif

#define KDCI_ALWAYS_INLINE __attribute__((always_inline))
#define KDCI_INLINE inline KDCI_ALWAYS_INLINE

namespace kdci::KDCI_SIMD {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
  // The same vector at any address.
  typedef T unaligned __attribute__((
      vector_size(vector_bytes),
      aligned(alignof(T)),
      may_alias));
};

/// A register of `lanes<T>` values; supports + - * / and comparisons.
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr int64_t lanes = vector_bytes / static_cast<int64_t>(sizeof(T));

template <typename T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}

template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

/// `value`, loaded once: the compiler otherwise takes it from memory for each
/// of its uses where an instruction can, and loads become what bounds a loop.
template <typename T>
inline Vec<T> in_register(Vec<T> value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

/// The first `count` < lanes values, and `fill` after them.
template <typename T>
inline Vec<T> load_first(const T* from, int64_t count, T fill) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, from);
  } else {
    return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), mask, from);
  }
#else
  Vec<T> values = broadcast(fill);
  for (int64_t lane = 0; lane < count; ++lane) {
    values[lane] = from[lane];
  }
  return values;
#endif
}

template <typename T>
inline void store_first(T* to, int64_t count, Vec<T> values) {
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, mask, values);
  } else {
    _mm512_mask_storeu_pd(to, mask, values);
  }
#else
  for (int64_t lane = 0; lane < count; ++lane) {
    to[lane] = values[lane];
  }
#endif
}

/// load_first and store_first that also take whole vectors.
template <typename T>
inline Vec<T> load_up_to(const T* from, int64_t count, T fill) {
  return count >= lanes<T> ? load(from) : load_first(from, count, fill);
}

template <typename T>
inline void store_up_to(T* to, int64_t count, Vec<T> values) {
  if (count >= lanes<T>) {
    store(to, values);
  } else {
    store_first(to, count, values);
  }
}

/// The larger of each two lanes; b where a is NaN.
template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <int size, typename T, int... lane>
inline Vec<T> halves_maximum(
    Vec<T> values,
    std::integer_sequence<int, lane...>) {
  return maximum<T>(
      values, __builtin_shufflevector(values, values, (lane ^ (size / 2))...));
}

/// The largest lane; NaN may be passed over.
template <typename T, int size = int(lanes<T>)>
inline T largest_lane(Vec<T> values) {
  if constexpr (size == 1) {
    return values[0];
  } else {
    return largest_lane<T, size / 2>(halves_maximum<size, T>(
        values, std::make_integer_sequence<int, int(lanes<T>)>()));
  }
}

/// Whether a whole number is `limit` or more.
template <typename Word>
inline bool reaches(Vec<Word> values, Word limit) {
#if defined(__AVX512F__)
  const __m512i numbers = (__m512i)values;
  if constexpr (sizeof(Word) == 4) {
    return _mm512_cmpge_epu32_mask(numbers, _mm512_set1_epi32(limit)) != 0;
  } else {
    return _mm512_cmpge_epu64_mask(numbers, _mm512_set1_epi64(limit)) != 0;
  }
#else
  return largest_lane<Word>(values) >= limit;
#endif
}

} // namespace kdci::KDCI_SIMD
