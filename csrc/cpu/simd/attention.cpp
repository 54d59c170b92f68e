// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <utility>

#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

// -- Vectors ------------------------------------------------------------------

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};
template <typename T>
using IntVec = Vec<typename Bits<T>::type>;

template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline Vec<T> absolute(Vec<T> x) {
  return maximum<T>(x, -x);
}

// The first `count` < lanes values, and `fill` after them.
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

// load_first and store_first that also take whole vectors.
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

// Takes x and y as consecutive segments of `size` values, and adds the
// second half of each segment to the first.
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

// The sums of segments of `size` lanes, in the first lanes.
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

// The sums of four vectors.
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

// The largest lane of each half, again and again; NaN lanes may be passed over.
template <int size, typename T, int... lane>
inline Vec<T> halves_maximum(
    Vec<T> values,
    std::integer_sequence<int, lane...>) {
  return maximum<T>(
      values, __builtin_shufflevector(values, values, (lane ^ (size / 2))...));
}

template <typename T, int size = int(lanes<T>)>
inline T largest_lane(Vec<T> values) {
  if constexpr (size == 1) {
    return values[0];
  } else {
    return largest_lane<T, size / 2>(halves_maximum<size, T>(
        values, std::make_integer_sequence<int, int(lanes<T>)>()));
  }
}

// numerator / x; unless `divide` by an estimate of 14 bits and one Newton step,
// which is as exact.
template <bool divide, typename T>
inline Vec<T> quotient(Vec<T> numerator, Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (!divide && sizeof(T) == 4) {
    const Vec<T> guess = _mm512_maskz_rcp14_ps(0xffff, x);
    return numerator * (guess + guess * (T(1) - x * guess));
  }
#endif
  return numerator / x;
}

// -- exp and tanh -------------------------------------------------------------

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
  static constexpr int degree = 7;
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
  static constexpr int degree = 13;
  static constexpr double lowest = -708;
  static constexpr double highest = 709;
  static constexpr double tanh_limit = 20;
};

constexpr double inverse_factorial[] = {
    1.0,
    1.0,
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

// e^x = power * (1 + rest), power = 2^n, for lowest <= x <= highest.
template <typename T>
struct ExpParts {
  Vec<T> power;
  Vec<T> rest;
};

template <typename T>
inline ExpParts<T> split_exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::log2_e + C::round;
  const Vec<T> n = shifted - C::round;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  Vec<T> sum = broadcast(static_cast<T>(inverse_factorial[C::degree]));
#pragma GCC unroll 16
  for (int k = C::degree - 1; k >= 2; --k) {
    sum = sum * r + static_cast<T>(inverse_factorial[k]);
  }
  // The low bits of `shifted` hold n.
  const IntVec<T> exponent = (IntVec<T>)shifted + C::exponent_bias;
  return {(Vec<T>)(exponent << C::mantissa_bits), r * r * sum + r};
}

template <typename T>
inline Vec<T> exponential(Vec<T> x) {
  const ExpParts<T> parts = split_exp<T>(x);
  return parts.power * parts.rest + parts.power;
}

// For softmax: any x <= 0.
template <typename T>
inline Vec<T> exponential_or_zero(Vec<T> x) {
  const Vec<T> lowest = broadcast(ExpConstants<T>::lowest);
  return x < lowest ? Vec<T>{} : exponential<T>(x);
}

template <typename T>
inline Vec<T> hyperbolic_tangent(Vec<T> x) {
  const Vec<T> limit = broadcast(ExpConstants<T>::tanh_limit);
  const Vec<T> size = absolute<T>(x);
  const Vec<T> clamped = size > limit ? limit : size;
  const ExpParts<T> parts = split_exp<T>(clamped + clamped);
  const Vec<T> minus_one = parts.power * parts.rest + (parts.power - T(1));
  const Vec<T> tangent = minus_one / (minus_one + T(2));
  return x < Vec<T>{} ? -tangent : tangent;
}

// -- Queries and keys ---------------------------------------------------------

template <typename T>
constexpr int64_t panel_width = 2 * lanes<T>;

// 1 / (1 + x), x = e^2a e^2b, is handled as scale / (scale + scale * x), which
// keeps products of two denominators within float32's range for |a|, |b| <=
// largest_exponent; e^2query is stored with the factor.
constexpr float denominator_scale = 0x1p-62f;
constexpr float largest_exponent = 21.5f;
// The factored form is used where mean |query| + mean |key| is at least this
// and |w_score| / largest_score_norm. Its errors in tanh are absolute, and so
// relative to tanh large where that is small; they show in the softmax where
// w_score is large. Beyond these bounds the error was seen to exceed that of
// computing tanh.
constexpr float smallest_mean = 0.25f;
constexpr float largest_score_norm = 8;

template <typename T>
void pack_keys(
    const T* key,
    AttentionKeys<T>& keys,
    int64_t begin,
    int64_t end) {
  constexpr int64_t width = panel_width<T>;
  const Vec<T> bound = broadcast(static_cast<T>(largest_exponent));
  for (int64_t panel = begin; panel < end; ++panel) {
    Vec<T> largest = {};
    T sum = 0;
    for (int64_t i = 0; i < keys.count; ++i) {
      Vec<T> row_sum = {};
      for (int64_t part = 0; part < width; part += lanes<T>) {
        const int64_t unit = panel * width + part;
        const int64_t left = keys.hidden - unit;
        const Vec<T> value = left <= 0
            ? Vec<T>{}
            : load_up_to(key + i * keys.hidden + unit, left, T(0));
        const int64_t at = (panel * keys.count + i) * width + part;
        store(keys.values + at, value);
        const Vec<T> size = absolute<T>(value);
        largest = maximum<T>(size, largest);
        row_sum += size;
        if constexpr (sizeof(T) == 4) {
          // Beyond the bound the exponentials are not used.
          const Vec<T> safe = size > bound ? Vec<T>{} : value;
          store(keys.exponentials + at, exponential<T>(safe + safe));
        }
      }
      sum += sum_lanes<T>(row_sum);
    }
    keys.panel_largest[panel] = largest_lane<T>(largest);
    keys.panel_sum[panel] = sum;
  }
}

template <typename T>
void finish_keys(const T* w_score, AttentionKeys<T>& keys) {
  keys.largest = 0;
  T sum = 0;
  for (int64_t panel = 0; panel < keys.panels; ++panel) {
    const T largest = keys.panel_largest[panel];
    keys.largest = largest > keys.largest ? largest : keys.largest;
    sum += keys.panel_sum[panel];
  }
  keys.mean = sum / static_cast<T>(keys.count * keys.hidden);

  T largest = 0;
  double squares = 0;
  for (int64_t h = 0; h < keys.hidden; ++h) {
    const T size = w_score[h] < 0 ? -w_score[h] : w_score[h];
    largest = size > largest ? size : largest;
    squares += static_cast<double>(size) * size;
  }
  const double norm = __builtin_sqrt(squares);
  keys.smallest_mean = static_cast<T>(
      norm > smallest_mean * largest_score_norm ? norm / largest_score_norm
                                                : smallest_mean);
  // Within what both the power and its inverse can be.
  int exponent = 0;
  if (largest > 0 && largest <= (sizeof(T) == 4 ? __FLT_MAX__ : __DBL_MAX__)) {
    const int limit = ExpConstants<T>::exponent_bias - 1;
    exponent = __builtin_ilogb(largest);
    exponent = exponent < -limit ? -limit : exponent;
    exponent = exponent > limit ? limit : exponent;
  }
  keys.score_scale = static_cast<T>(__builtin_ldexp(1.0, exponent));
  const T inverse = 1 / keys.score_scale;
  for (int64_t h = 0; h < keys.padded; ++h) {
    keys.w_score[h] = h < keys.hidden ? w_score[h] * inverse : 0;
  }
}

template <typename T>
bool must_be_direct(
    const AttentionKeys<T>& keys,
    int64_t rows,
    const T* query,
    int64_t query_stride) {
  if constexpr (sizeof(T) == 8) {
    return true;
  }
  if (!(keys.largest <= largest_exponent)) {
    return true;
  }
  Vec<T> largest = {};
  T sum = 0;
  for (int64_t b = 0; b < rows; ++b) {
    Vec<T> row_sum = {};
    for (int64_t h = 0; h < keys.hidden; h += lanes<T>) {
      const Vec<T> size = absolute<T>(
          load_up_to(query + b * query_stride + h, keys.hidden - h, T(0)));
      largest = maximum<T>(size, largest);
      row_sum += size;
    }
    sum += sum_lanes<T>(row_sum);
  }
  const T mean = sum / static_cast<T>(rows * keys.hidden);
  return !(largest_lane<T>(largest) <= largest_exponent) ||
      mean + keys.mean < keys.smallest_mean;
}

// Units [first, first + width) of a block's activations.
template <typename T>
void activate_part(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* query,
    int64_t query_stride,
    bool direct,
    T* activations,
    int64_t stride) {
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t h = 0; h < width; h += lanes<T>) {
      const int64_t left = keys.hidden - (first + h);
      Vec<T> value = left <= 0
          ? Vec<T>{}
          : load_up_to(query + b * query_stride + first + h, left, T(0));
      if (!direct) {
        value =
            exponential<T>(value + value) * static_cast<T>(denominator_scale);
      }
      store(activations + b * stride + h, value);
    }
  }
}

template <typename T>
void activate(
    const AttentionKeys<T>& keys,
    int64_t rows,
    const T* query,
    int64_t query_stride,
    T* activations,
    uint8_t* direct) {
  *direct = must_be_direct(keys, rows, query, query_stride);
  activate_part(
      keys,
      rows,
      0,
      keys.padded,
      query,
      query_stride,
      *direct,
      activations,
      keys.padded);
}

// -- Scores and their softmax -------------------------------------------------

// Adds to `scores` (or sets, if `first` is 0) the terms of units [first, first
// + width).
template <bool direct, bool divide, typename T>
void add_scores(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* activations,
    int64_t stride,
    T* scores) {
  constexpr int tile = 4;
  const T scale =
      keys.score_scale * (direct ? 1 : -2 * static_cast<T>(denominator_scale));
  const Vec<T> one = broadcast(static_cast<T>(denominator_scale));
  for (int64_t b = 0; b < rows; b += tile) {
    // Rows past the end repeat the last one, and are not stored.
    const T* query[tile];
    for (int64_t k = 0; k < tile; ++k) {
      query[k] = activations + (b + k < rows ? b + k : rows - 1) * stride;
    }
    for (int64_t i = 0; i < keys.count; ++i) {
      const T* key = (direct ? keys.values : keys.exponentials) +
          (first * keys.count) + i * panel_width<T>;
      Vec<T> sum[tile] = {};
      for (int64_t h = 0; h < width; h += panel_width<T>) {
        const Vec<T> key0 = load(key);
        const Vec<T> key1 = load(key + lanes<T>);
        key += keys.count * panel_width<T>;
        const Vec<T> w0 = load(keys.w_score + first + h);
        const Vec<T> w1 = load(keys.w_score + first + h + lanes<T>);
#pragma GCC unroll 4
        for (int k = 0; k < tile; ++k) {
          const Vec<T> query0 = load(query[k] + h);
          const Vec<T> query1 = load(query[k] + h + lanes<T>);
          if constexpr (direct) {
            sum[k] += w0 * hyperbolic_tangent<T>(query0 + key0);
            sum[k] += w1 * hyperbolic_tangent<T>(query1 + key1);
          } else {
            // w0 / d0 + w1 / d1, and the sum of all w drops in the softmax.
            const Vec<T> d0 = query0 * key0 + one;
            const Vec<T> d1 = query1 * key1 + one;
            sum[k] += quotient<divide, T>(w0 * d1 + w1 * d0, d0 * d1);
          }
        }
      }
      T total[tile];
      sum_lanes_of_four<T>(sum, total);
      for (int64_t k = 0; k < tile && b + k < rows; ++k) {
        T& score = scores[(b + k) * keys.count + i];
        const T part = total[k] * scale;
        score = first > 0 ? score + part : part;
      }
    }
  }
}

// values = softmax(values + offset); offset may be null.
template <typename T>
void softmax_row(int64_t count, const T* offset, T* values) {
  const T infinity = __builtin_inff();
  Vec<T> largest = broadcast(-infinity);
  for (int64_t i = 0; i < count; i += lanes<T>) {
    Vec<T> value = load_up_to(values + i, count - i, -infinity);
    if (offset != nullptr) {
      value += load_up_to(offset + i, count - i, T(0));
      store_up_to(values + i, count - i, value);
    }
    largest = maximum<T>(value, largest);
  }
  const Vec<T> shift = broadcast(largest_lane<T>(largest));
  Vec<T> sum = {};
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const Vec<T> value = exponential_or_zero<T>(
        load_up_to(values + i, count - i, -infinity) - shift);
    store_up_to(values + i, count - i, value);
    sum += value;
  }
  const Vec<T> total = broadcast(sum_lanes<T>(sum));
  for (int64_t i = 0; i < count; i += lanes<T>) {
    store_up_to(
        values + i, count - i, load_up_to(values + i, count - i, T(0)) / total);
  }
}

template <typename T>
void attend(
    const AttentionKeys<T>& keys,
    int64_t rows,
    const T* query,
    int64_t query_stride,
    const T* log_prior,
    T* activations,
    uint8_t* direct,
    T* weights) {
  // Activations that nobody keeps stay in the first-level cache.
  constexpr int64_t span = 1024 / static_cast<int64_t>(sizeof(T));
  alignas(64) T local[attention_block * span];
  *direct = must_be_direct(keys, rows, query, query_stride);
  for (int64_t first = 0; first < keys.padded; first += span) {
    const int64_t left = keys.padded - first;
    const int64_t width = left < span ? left : span;
    T* part = activations != nullptr ? activations + first : local;
    const int64_t stride = activations != nullptr ? keys.padded : span;
    activate_part(
        keys, rows, first, width, query, query_stride, *direct, part, stride);
    const auto add = *direct ? add_scores<true, true, T>
        : divides_fast()     ? add_scores<sizeof(T) == 8, true, T>
                             : add_scores<sizeof(T) == 8, false, T>;
    add(keys, rows, first, width, part, stride, weights);
  }
  for (int64_t b = 0; b < rows; ++b) {
    softmax_row(keys.count, log_prior, weights + b * keys.count);
  }
}

// -- Backward -----------------------------------------------------------------

template <typename T>
void grad_scores(
    int64_t rows,
    int64_t count,
    const T* weights,
    const T* grad_weights,
    T* grad_score,
    T* row_sums) {
  for (int64_t b = 0; b < rows; ++b) {
    const T* weight = weights + b * count;
    const T* grad = grad_weights + b * count;
    Vec<T> sum = {};
    for (int64_t i = 0; i < count; i += lanes<T>) {
      sum += load_up_to(weight + i, count - i, T(0)) *
          load_up_to(grad + i, count - i, T(0));
    }
    const Vec<T> mean = broadcast(sum_lanes<T>(sum));
    Vec<T> total = {};
    for (int64_t i = 0; i < count; i += lanes<T>) {
      const Vec<T> value = load_up_to(weight + i, count - i, T(0)) *
          (load_up_to(grad + i, count - i, T(0)) - mean);
      total += value;
      store_up_to(grad_score + b * count + i, count - i, value);
    }
    row_sums[b] = sum_lanes<T>(total);
  }
}

// Keys that are swept at a time, so that their sums stay in the first-level
// cache.
constexpr int64_t key_block = 64;

template <typename T>
struct PanelSums {
  Vec<T> query[attention_block][2];
  Vec<T> key[key_block][2];
  Vec<T> score[2];
};

// Sums over `rows` queries and `count` keys, for the units of one panel: of
// grad_score * (1 - tanh^2) by query and by key, and of grad_score * tanh; the
// former to be multiplied by 4, the latter by -2, unless `direct`.
template <int rows, bool direct, bool divide, typename T>
inline void sweep_rows(
    int64_t count,
    const T* activations,
    int64_t stride,
    const T* key,
    const T* grad_score,
    int64_t grad_stride,
    Vec<T> (*query_sum)[2],
    PanelSums<T>& sums) {
  const Vec<T> one = broadcast(static_cast<T>(denominator_scale));
  Vec<T> query[rows][2];
  Vec<T> slope_sum[rows][2] = {};
  Vec<T> value_sum[2] = {};
  for (int r = 0; r < rows; ++r) {
    query[r][0] = load(activations + r * stride);
    query[r][1] = load(activations + r * stride + lanes<T>);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Vec<T> key0 = load(key + i * panel_width<T>);
    const Vec<T> key1 = load(key + i * panel_width<T> + lanes<T>);
    Vec<T> key_sum0 = sums.key[i][0];
    Vec<T> key_sum1 = sums.key[i][1];
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const Vec<T> grad = broadcast(grad_score[r * grad_stride + i]);
      // Products with the gradient first, so that the sums are additions,
      // which need not wait for the multiplier.
      Vec<T> value0;
      Vec<T> value1;
      Vec<T> slope0;
      Vec<T> slope1;
      if constexpr (direct) {
        const Vec<T> tanh0 = hyperbolic_tangent<T>(query[r][0] + key0);
        const Vec<T> tanh1 = hyperbolic_tangent<T>(query[r][1] + key1);
        value0 = grad * tanh0;
        value1 = grad * tanh1;
        slope0 = grad - value0 * tanh0;
        slope1 = grad - value1 * tanh1;
      } else {
        // With r = 1 / (1 + e^2a e^2b): tanh = 1 - 2r, 1 - tanh^2 = 4 (r -
        // r^2).
        const Vec<T> d0 = query[r][0] * key0 + one;
        const Vec<T> d1 = query[r][1] * key1 + one;
        const Vec<T> inverse = quotient<divide, T>(one, d0 * d1);
        const Vec<T> r0 = inverse * d1;
        const Vec<T> r1 = inverse * d0;
        value0 = grad * r0;
        value1 = grad * r1;
        slope0 = value0 - value0 * r0;
        slope1 = value1 - value1 * r1;
      }
      slope_sum[r][0] += slope0;
      slope_sum[r][1] += slope1;
      key_sum0 += slope0;
      key_sum1 += slope1;
      value_sum[0] += value0;
      value_sum[1] += value1;
    }
    sums.key[i][0] = key_sum0;
    sums.key[i][1] = key_sum1;
  }
  for (int r = 0; r < rows; ++r) {
    query_sum[r][0] += slope_sum[r][0];
    query_sum[r][1] += slope_sum[r][1];
  }
  sums.score[0] += direct ? value_sum[0] : T(-2) * value_sum[0];
  sums.score[1] += direct ? value_sum[1] : T(-2) * value_sum[1];
}

// sweep_rows for a block of queries.
template <bool direct, bool divide, typename T>
void sweep_block(
    int64_t rows,
    int64_t count,
    const T* activations,
    int64_t stride,
    const T* key,
    const T* grad_score,
    int64_t grad_stride,
    PanelSums<T>& sums) {
  for (int64_t b = 0; b < rows; b += 2) {
    (b + 1 < rows
         ? sweep_rows<2, direct, divide, T>
         : sweep_rows<1, direct, divide, T>)(count,
                                             activations + b * stride,
                                             stride,
                                             key,
                                             grad_score + b * grad_stride,
                                             grad_stride,
                                             sums.query + b,
                                             sums);
  }
}

template <typename T>
void sweep(
    const AttentionKeys<T>& keys,
    int64_t begin,
    int64_t end,
    int64_t batch,
    T* activations,
    const uint8_t* direct,
    const T* grad_score,
    const T* row_sums,
    T* grad_key,
    T* grad_w_score) {
  constexpr int64_t width = panel_width<T>;
  PanelSums<T> sums;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t unit = panel * width;
    for (int64_t i = 0; i < keys.count; ++i) {
      store(grad_key + i * keys.padded + unit, Vec<T>{});
      store(grad_key + i * keys.padded + unit + lanes<T>, Vec<T>{});
    }
    Vec<T> score_total[2] = {};
    for (int64_t b = 0; b < batch; b += attention_block) {
      const int64_t left = batch - b;
      const int64_t rows = left < attention_block ? left : attention_block;
      const bool is_direct = direct[b / attention_block] != 0;
      const auto block_sums = is_direct ? sweep_block<true, true, T>
          : divides_fast()              ? sweep_block<sizeof(T) == 8, true, T>
                                        : sweep_block<sizeof(T) == 8, false, T>;
      const Vec<T> factor = broadcast(keys.score_scale * (is_direct ? 1 : 4));
      const Vec<T> w[2] = {
          factor * load(keys.w_score + unit),
          factor * load(keys.w_score + unit + lanes<T>)};
      for (int64_t r = 0; r < rows; ++r) {
        sums.query[r][0] = Vec<T>{};
        sums.query[r][1] = Vec<T>{};
      }
      T row_sum = 0;
      for (int64_t r = 0; r < rows && !is_direct; ++r) {
        row_sum += row_sums[b + r];
      }
      sums.score[0] = broadcast(row_sum);
      sums.score[1] = broadcast(row_sum);
      for (int64_t i = 0; i < keys.count; i += key_block) {
        const int64_t keys_left = keys.count - i;
        const int64_t count = keys_left < key_block ? keys_left : key_block;
        for (int64_t k = 0; k < count; ++k) {
          sums.key[k][0] = Vec<T>{};
          sums.key[k][1] = Vec<T>{};
        }
        block_sums(
            rows,
            count,
            activations + b * keys.padded + unit,
            keys.padded,
            (is_direct ? keys.values : keys.exponentials) +
                (panel * keys.count + i) * width,
            grad_score + b * keys.count + i,
            keys.count,
            sums);
        for (int64_t k = 0; k < count; ++k) {
          T* to = grad_key + (i + k) * keys.padded + unit;
          store(to, load(to) + w[0] * sums.key[k][0]);
          store(to + lanes<T>, load(to + lanes<T>) + w[1] * sums.key[k][1]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* to = activations + (b + r) * keys.padded + unit;
        store(to, w[0] * sums.query[r][0]);
        store(to + lanes<T>, w[1] * sums.query[r][1]);
      }
      score_total[0] += sums.score[0];
      score_total[1] += sums.score[1];
    }
    store(grad_w_score + unit, score_total[0]);
    store(grad_w_score + unit + lanes<T>, score_total[1]);
  }
}

// -- Distillation loss --------------------------------------------------------

template <typename T>
inline T scaled_maximum(int64_t count, const T* values, T factor) {
  const T infinity = __builtin_inff();
  Vec<T> largest = broadcast(-infinity);
  for (int64_t c = 0; c < count; c += lanes<T>) {
    largest = maximum<T>(
        load_up_to(values + c, count - c, -infinity) * factor, largest);
  }
  return largest_lane<T>(largest);
}

template <typename T>
double divergence(
    int64_t rows,
    int64_t classes,
    T* student,
    const T* teacher,
    T inverse_temperature,
    T grad_factor) {
  const T infinity = __builtin_inff();
  double total = 0;
  for (int64_t b = 0; b < rows; ++b) {
    T* s = student + b * classes;
    const T* t = teacher + b * classes;
    const T s_max = scaled_maximum(classes, s, inverse_temperature);
    const T t_max = scaled_maximum(classes, t, inverse_temperature);
    Vec<T> s_sum = {};
    Vec<T> t_sum = {};
    Vec<T> cross = {};
    for (int64_t c = 0; c < classes; c += lanes<T>) {
      const int64_t left = classes - c;
      const Vec<T> s_shifted =
          load_up_to(s + c, left, -infinity) * inverse_temperature - s_max;
      const Vec<T> t_shifted =
          load_up_to(t + c, left, -infinity) * inverse_temperature - t_max;
      const Vec<T> t_exp = exponential_or_zero<T>(t_shifted);
      s_sum += exponential_or_zero<T>(s_shifted);
      t_sum += t_exp;
      cross += t_exp == Vec<T>{} ? t_exp : t_exp * (t_shifted - s_shifted);
    }
    const T s_total = sum_lanes<T>(s_sum);
    const T t_total = sum_lanes<T>(t_sum);
    total += static_cast<double>(sum_lanes<T>(cross)) / t_total +
        __builtin_log(static_cast<double>(s_total) / t_total);
    if (grad_factor == 0) {
      continue;
    }
    const T s_factor = grad_factor / s_total;
    const T t_factor = grad_factor / t_total;
    for (int64_t c = 0; c < classes; c += lanes<T>) {
      const int64_t left = classes - c;
      const Vec<T> s_exp = exponential_or_zero<T>(
          load_up_to(s + c, left, -infinity) * inverse_temperature - s_max);
      const Vec<T> t_exp = exponential_or_zero<T>(
          load_up_to(t + c, left, -infinity) * inverse_temperature - t_max);
      store_up_to(s + c, left, s_factor * s_exp - t_factor * t_exp);
    }
  }
  return total;
}

template <typename T>
constexpr AttentionKernels<T> kernels_of = {
    panel_width<T>,
    pack_keys<T>,
    finish_keys<T>,
    attend<T>,
    activate<T>,
    grad_scores<T>,
    sweep<T>,
    divergence<T>};

} // namespace

const AttentionKernels<float> attention_kernels_float = kernels_of<float>;
const AttentionKernels<double> attention_kernels_double = kernels_of<double>;

} // namespace kdci::KDCI_SIMD
