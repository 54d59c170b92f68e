// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "elementary.h"
#include "lane_sums.h"
#include "transpose.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

// -- Queries and keys ---------------------------------------------------------

template <typename T>
constexpr int64_t panel_width = 2 * lanes<T>;

// Units that attend() takes at a time, so that those of a block of queries stay
// in the first-level cache.
template <typename T>
constexpr int64_t span = 1024 / static_cast<int64_t>(sizeof(T));

// 1 - 2 / (1 + e^2a e^2b) errs by some roundings of 1, whatever tanh is, which
// show where tanh is small, and in the softmax where w_score is large. tanh is
// computed directly where, for any query of a block, the mean of |query| and
// that of |key| come to less than smallest_mean or |w_score| /
// largest_score_norm (values count as most_counted at most, as tanh does not
// grow for ever), and where that of |key| alone is less than smallest_key_mean:
// then tanh hardly differs between keys, and these differences are what the
// gradient of w_score is made of. Beyond these bounds the error was seen to
// exceed that of computing tanh.
constexpr float smallest_mean = 0.25f;
constexpr float largest_score_norm = 4;
constexpr float smallest_key_mean = 0.0625f;
constexpr float most_counted = 2;

// attend() divides the terms w / (1 + e^2a e^2b) of two hidden units at a time,
// as 1 / c0 + 1 / c1 = (c0 + c1) / (c0 c1) with c = score_unit / w * (1 + e^2a
// e^2b), in which e^2b comes multiplied by score_unit / w. |w| is 2 at most
// (see score_scale), so that products of two c are normal numbers; smaller ones
// than smallest_score by the number of hidden units count as that.
constexpr float score_unit = 0x1p-62f;
constexpr float smallest_score = 0x1p-27f;
constexpr float largest_exponent = 124.5f; // of c / score_unit, in bits
// sweep() needs e^2a e^2b itself, or the product of two.
constexpr float largest_sum = 43;
constexpr float log2_of_e_squared = 2.8853900818f;

template <typename T>
constexpr bool has_factored_form = sizeof(T) == 4;

template <typename T>
inline bool is_present(const AttentionKeys<T>& keys, int64_t i) {
  return keys.log_prior == nullptr ||
      keys.log_prior[i] != -static_cast<T>(__builtin_inff());
}

template <typename T>
inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// A magnitude as it counts.
template <typename T>
inline Vec<T> counted(Vec<T> size) {
  const Vec<T> most = broadcast(static_cast<T>(most_counted));
  return minimum<T>(most, size);
}

template <typename T>
void prepare_score(const T* w_score, AttentionKeys<T>& keys) {
  const int64_t hidden = keys.hidden;
  Vec<T> largest_lanes = {};
  Vec<T> squares = {};
  for (int64_t h = 0; h < hidden; h += lanes<T>) {
    const Vec<T> size = absolute<T>(load_up_to(w_score + h, hidden - h, T(0)));
    largest_lanes = maximum<T>(size, largest_lanes);
    squares += size * size;
  }
  const T largest = largest_lane<T>(largest_lanes);
  const T norm = __builtin_sqrt(sum_lanes<T>(squares));
  keys.smallest_mean = norm > smallest_mean * largest_score_norm
      ? norm / largest_score_norm
      : smallest_mean;
  // Neither where a value is NaN or infinite nor where the squares overflow.
  const bool usable = norm < static_cast<T>(__builtin_inff());
  // Within what both the power and its inverse can be.
  int exponent = 0;
  if (largest > 0 && usable) {
    const int limit = ExpConstants<T>::exponent_bias - 1;
    exponent = __builtin_ilogb(largest);
    exponent = exponent < -limit ? -limit : exponent;
    exponent = exponent > limit ? limit : exponent;
  }
  keys.score_scale = static_cast<T>(__builtin_ldexp(1.0, exponent));
  const T inverse = 1 / keys.score_scale;
  const Vec<T> least =
      broadcast(static_cast<T>(smallest_score) / static_cast<T>(hidden));
  Vec<T> smallest = broadcast(T(1));
  for (int64_t panel = 0; panel < keys.panels; ++panel) {
    Vec<T> weight = {};
    for (int64_t v = 0; v < 2; ++v) {
      const int64_t h = panel * panel_width<T> + v * lanes<T>;
      const int64_t left = hidden - h;
      const Vec<T> w = inverse *
          (left <= 0 ? Vec<T>{} : load_up_to(w_score + h, left, T(0)));
      store(keys.w_score + h, w);
      weight += absolute<T>(w);
      // Lanes past the end have no part in the range.
      const Vec<T> size = maximum<T>(absolute<T>(w), least);
      store(keys.inverse_score + h, size);
      smallest = minimum<T>(
          left <= 0 ? smallest : load_up_to(keys.inverse_score + h, left, T(1)),
          smallest);
      const Vec<T> unit = static_cast<T>(score_unit) / size;
      store(keys.inverse_score + h, w < Vec<T>{} ? -unit : unit);
    }
    keys.panel_weight[panel] = sum_lanes<T>(weight);
  }
  const float least_size = static_cast<float>(-largest_lane<T>(-smallest));
  keys.fold_range = usable
      ? (largest_exponent + __builtin_log2f(least_size)) / log2_of_e_squared
      : 0;
  keys.present = 0;
  for (int64_t i = 0; i < keys.count; ++i) {
    keys.present += is_present(keys, i);
  }
}

template <typename T>
void pack_keys(AttentionKeys<T>& keys, int64_t begin, int64_t end) {
  constexpr int64_t width = panel_width<T>;
  const Vec<T> bound = broadcast(static_cast<T>(largest_sum));
  for (int64_t panel = begin; panel < end; ++panel) {
    Vec<T> largest = {};
    Vec<T> sum = {};
    Vec<T> score = {};
    for (int64_t i = 0; i < keys.count; ++i) {
      const bool present = is_present(keys, i);
      Vec<T> values[2];
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t unit = panel * width + v * lanes<T>;
        const int64_t left = keys.hidden - unit;
        values[v] = left <= 0
            ? Vec<T>{}
            : load_up_to(keys.values + i * keys.hidden + unit, left, T(0));
        const Vec<T> size = absolute<T>(values[v]);
        largest = maximum<T>(size, largest);
        if (present) {
          sum += counted<T>(size);
          score += counted<T>(size) * absolute<T>(load(keys.w_score + unit));
        }
        // Beyond the bound they are not used.
        values[v] = size > bound ? Vec<T>{} : values[v];
      }
      if constexpr (has_factored_form<T>) {
        if (keys.folded != nullptr) {
          T* to = keys.folded + (panel * keys.count + i) * width;
          const T* inverse = keys.inverse_score + panel * width;
          exponentials_of_twice<2, T>(values);
          store(to, values[0] * load(inverse));
          store(to + lanes<T>, values[1] * load(inverse + lanes<T>));
        }
      }
    }
    keys.panel_largest[panel] = largest_lane<T>(largest);
    keys.panel_sum[panel] = sum_lanes<T>(sum);
    keys.panel_score[panel] = sum_lanes<T>(score);
  }
}

// The largest |query| for which |query| + |key| is within `range`; 0 where tanh
// of query + key is not yet 1 at larger ones.
template <typename T>
T query_limit(T range, T largest_key) {
  const T limit = range - largest_key;
  return limit >= largest_key + ExpConstants<T>::tanh_limit ? limit : 0;
}

// Values beyond +-limit become that; NaN stays.
template <typename T>
inline Vec<T> clamp(Vec<T> value, T limit) {
  const Vec<T> highest = broadcast(limit);
  const Vec<T> lowest = broadcast(-limit);
  const Vec<T> below = value > highest ? highest : value;
  return below < lowest ? lowest : below;
}

// What the magnitudes of hidden units count by: |w_score| where the score is
// made of them, alike where each has a gradient.
enum class Counting { by_score, alike };

// What the magnitudes of each query of a block must add up to, over units
// [first, first + width), if tanh need not be computed directly: infinite where
// the keys forbid it, and not positive where they are large enough alone.
template <Counting counting, typename T>
T query_sum_needed(const AttentionKeys<T>& keys, int64_t first, int64_t width) {
  const int64_t left = keys.hidden - first;
  T units = static_cast<T>(width < left ? width : left);
  T weight = 0;
  T key_sum = 0;
  for (int64_t panel = first / panel_width<T>;
       panel < keys.panels && panel * panel_width<T> < first + width;
       ++panel) {
    weight += keys.panel_weight[panel];
    key_sum +=
        (counting == Counting::by_score ? keys.panel_score
                                        : keys.panel_sum)[panel];
  }
  units = counting == Counting::by_score ? weight : units;
  key_sum /= static_cast<T>(keys.present > 0 ? keys.present : 1);
  return key_sum < units * static_cast<T>(smallest_key_mean)
      ? static_cast<T>(__builtin_inff())
      : units * keys.smallest_mean - key_sum;
}

// The least that the magnitudes of a query of a block add up to.
template <Counting counting, typename T>
T least_query_sum(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* query) {
  T least = __builtin_inff();
  for (int64_t b = 0; b < rows; ++b) {
    Vec<T> sum = {};
    for (int64_t h = first; h < first + width && h < keys.hidden;
         h += lanes<T>) {
      Vec<T> size = counted<T>(absolute<T>(
          load_up_to(query + b * keys.hidden + h, keys.hidden - h, T(0))));
      if constexpr (counting == Counting::by_score) {
        size *= absolute<T>(load(keys.w_score + h));
      }
      sum += size;
    }
    const T total = sum_lanes<T>(sum);
    least = total < least ? total : least;
  }
  return least;
}

// Whether all keys are so large that tanh need not be computed directly for any
// query.
template <typename T>
bool keys_suffice(const AttentionKeys<T>& keys) {
  bool suffice = true;
  for (int64_t first = 0; first < keys.hidden; first += panel_width<T>) {
    suffice &=
        query_sum_needed<Counting::alike>(keys, first, panel_width<T>) <= 0;
  }
  for (int64_t first = 0; first < keys.hidden; first += span<T>) {
    suffice &= query_sum_needed<Counting::by_score>(keys, first, span<T>) <= 0;
  }
  return suffice;
}

template <typename T>
void finish_keys(AttentionKeys<T>& keys) {
  T largest = 0;
  for (int64_t panel = 0; panel < keys.panels; ++panel) {
    const T here = keys.panel_largest[panel];
    largest = here > largest ? here : largest;
  }
  keys.fold_limit = 0;
  keys.factor_limit = 0;
  keys.kept_limit = 0;
  if (has_factored_form<T> && keys.fold_range > 0) {
    keys.fold_limit = query_limit<T>(keys.fold_range, largest);
    keys.factor_limit = query_limit<T>(largest_sum, largest);
    if (keys.hidden % panel_width<T> == 0 && keys_suffice(keys)) {
      keys.kept_limit = keys.fold_limit < keys.factor_limit ? keys.fold_limit
                                                            : keys.factor_limit;
    }
  }
}

// Units [first, first + width) of a block of queries, filled up with zeros.
template <typename T>
void copy_units(
    int64_t hidden,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* query, // [rows, hidden]
    T* units) {     // [rows, width]
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t h = 0; h < width; h += lanes<T>) {
      const int64_t left = hidden - (first + h);
      const Vec<T> value = left > 0
          ? load_up_to(query + b * hidden + first + h, left, T(0))
          : Vec<T>{};
      store(units + b * width + h, value);
    }
  }
}

// activations = e^2units, of units that are cut off at +-limit, or, without
// `cut`, expected to lie within: then returns their largest magnitude, for
// which NaN may be passed over.
template <bool cut, typename T>
T exponentiate(
    int64_t rows,
    int64_t width, // whole panels
    const T* units,
    int64_t units_stride,
    T limit,
    T* activations, // may be units
    int64_t stride) {
  Vec<T> largest = {};
  for (int64_t b = 0; b < rows; b += 2) {
    const int64_t row[2] = {b, b + 1 < rows ? b + 1 : b};
    for (int64_t h = 0; h < width; h += 2 * lanes<T>) {
      Vec<T> values[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec<T> value =
            load(units + row[i / 2] * units_stride + h + i % 2 * lanes<T>);
        if constexpr (cut) {
          values[i] = clamp<T>(value, limit);
        } else {
          values[i] = value;
          largest = larger_size<T>(absolute<T>(value), largest);
        }
      }
      exponentials_of_twice<4, T>(values);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        store(
            activations + row[i / 2] * stride + h + i % 2 * lanes<T>,
            values[i]);
      }
    }
  }
  return largest_lane<T>(largest);
}

// What a block of queries is taken for: themselves, or e^2query, of queries
// that may have been cut off.
enum class Form { direct, factored, cut_off };

template <typename T>
struct Activations {
  Form form;
  const T* data;
  int64_t stride;
};

// Units [first, first + width) of a block of queries, in `buffer` of rows of
// `width` unless attend() has left their exponentials in their place: where
// limit > 0 and none is small, e^2query.
template <Counting counting, typename T>
Activations<T> activate(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* query, // [rows, H]
    T limit,
    T* buffer) {
  const T* units = query + first;
  if constexpr (has_factored_form<T>) {
    if (keys.kept_limit > 0) {
      return {Form::cut_off, units, keys.hidden};
    }
    const T needed = query_sum_needed<counting>(keys, first, width);
    const bool small = needed > 0 &&
        least_query_sum<counting>(keys, rows, first, width, query) < needed;
    if (limit > 0 && !small) {
      if (first + width <= keys.hidden &&
          exponentiate<false>(
              rows, width, units, keys.hidden, limit, buffer, width) < limit) {
        return {Form::factored, buffer, width};
      }
      copy_units<T>(keys.hidden, rows, first, width, query, buffer);
      exponentiate<true>(rows, width, buffer, width, limit, buffer, width);
      return {Form::cut_off, buffer, width};
    }
  }
  copy_units<T>(keys.hidden, rows, first, width, query, buffer);
  return {Form::direct, buffer, width};
}

// -- Scores and their softmax -------------------------------------------------

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

// Queries and keys whose scores are summed at a time.
constexpr int query_tile = 4;
constexpr int key_tile = vector_bytes == 64 ? 4 : 1;

// Scores by query, [rows, K], or side by side for attention_block queries, [K,
// attention_block].
template <typename T>
struct Scores {
  T* data;
  bool by_key;
};

// Sets scores, or adds to them unless `first`, from the sums of a tile that
// begins at query b and key i, [keys_in_tile, query_tile].
template <int keys_in_tile, typename T>
inline void put_scores(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t b,
    int64_t i,
    bool first,
    T scale,
    const T* sums,
    const Scores<T>& scores) {
  typedef T Quad __attribute__((
      vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  static_assert(query_tile == 4);
  if (scores.by_key) {
    for (int64_t k = 0; k < keys_in_tile && i + k < keys.count; ++k) {
      Quad& four =
          *reinterpret_cast<Quad*>(scores.data + (i + k) * attention_block + b);
      const Quad part = reinterpret_cast<const Quad*>(sums)[k] * scale;
      four = first ? part : four + part;
    }
    return;
  }
  for (int64_t r = 0; r < query_tile && b + r < rows; ++r) {
    T* to = scores.data + (b + r) * keys.count + i;
    for (int64_t k = 0; k < keys_in_tile && i + k < keys.count; ++k) {
      const T part = sums[k * query_tile + r] * scale;
      to[k] = first ? part : to[k] + part;
    }
  }
}

// Adds to `scores` (or sets, if `first` is 0) the terms of units [first, first
// + width) from e^2query and the folded keys.
template <bool divide, typename T>
void add_folded_scores(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* activations,
    int64_t stride,
    const Scores<T>& scores) {
  // The sum of all w_score drops in the softmax.
  const T scale = -2 * static_cast<T>(score_unit) * keys.score_scale;
  const T* folded = keys.folded + first * keys.count;
  for (int64_t i = 0; i < keys.count; i += key_tile) {
    // Queries and keys past the end repeat the last one, and are not stored.
    const T* key[key_tile];
    for (int64_t k = 0; k < key_tile; ++k) {
      key[k] = folded +
          (i + k < keys.count ? i + k : keys.count - 1) * panel_width<T>;
    }
    for (int64_t b = 0; b < rows; b += query_tile) {
      const T* query[query_tile];
      for (int64_t r = 0; r < query_tile; ++r) {
        query[r] = activations + (b + r < rows ? b + r : rows - 1) * stride;
      }
      Vec<T> sum[query_tile * key_tile] = {};
      int64_t key_at = 0;
      for (int64_t h = 0; h < width; h += panel_width<T>) {
        const Vec<T> unit0 = load(keys.inverse_score + first + h);
        const Vec<T> unit1 = load(keys.inverse_score + first + h + lanes<T>);
#pragma GCC unroll 4
        for (int k = 0; k < key_tile; ++k) {
          const Vec<T> key0 = load(key[k] + key_at);
          const Vec<T> key1 = load(key[k] + key_at + lanes<T>);
#pragma GCC unroll 4
          for (int r = 0; r < query_tile; ++r) {
            const Vec<T> c0 = load(query[r] + h) * key0 + unit0;
            const Vec<T> c1 = load(query[r] + h + lanes<T>) * key1 + unit1;
            sum[k * query_tile + r] += quotient<divide, T>(c0 + c1, c0 * c1);
          }
        }
        key_at += keys.count * panel_width<T>;
      }
      T sums[query_tile * key_tile];
      sum_lanes_of<query_tile * key_tile, T>(sum, sums);
      put_scores<key_tile, T>(
          keys, rows, b, i, first == 0, scale, sums, scores);
    }
  }
}

// The same from the queries and keys themselves.
template <typename T>
void add_direct_scores(
    const AttentionKeys<T>& keys,
    int64_t rows,
    int64_t first,
    int64_t width,
    const T* activations,
    int64_t stride,
    const Scores<T>& scores) {
  for (int64_t b = 0; b < rows; b += query_tile) {
    const T* query[query_tile];
    for (int64_t r = 0; r < query_tile; ++r) {
      query[r] = activations + (b + r < rows ? b + r : rows - 1) * stride;
    }
    for (int64_t i = 0; i < keys.count; ++i) {
      const T* key = keys.values + i * keys.hidden + first;
      Vec<T> sum[query_tile] = {};
      for (int64_t h = 0; h < width && first + h < keys.hidden; h += lanes<T>) {
        const Vec<T> value =
            load_up_to(key + h, keys.hidden - (first + h), T(0));
        const Vec<T> w = load(keys.w_score + first + h);
#pragma GCC unroll 4
        for (int r = 0; r < query_tile; ++r) {
          sum[r] += w * hyperbolic_tangent<T>(load(query[r] + h) + value);
        }
      }
      T sums[query_tile];
      sum_lanes_of_four<T>(sum, sums);
      put_scores<1, T>(
          keys, rows, b, i, first == 0, keys.score_scale, sums, scores);
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
  LongSum<T> sum;
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const Vec<T> value = exponential_or_zero<T>(
        load_up_to(values + i, count - i, -infinity) - shift);
    store_up_to(values + i, count - i, value);
    sum.add(value);
  }
  const Vec<T> total = broadcast(sum.sum());
  for (int64_t i = 0; i < count; i += lanes<T>) {
    store_up_to(
        values + i, count - i, load_up_to(values + i, count - i, T(0)) / total);
  }
}

// weights [rows, count] = softmax(scores + offset) over the keys, for up to
// attention_block queries that lie side by side: scores [count,
// attention_block]. Rows of few keys would leave most of a vector empty.
template <typename T>
void softmax_columns(
    int64_t rows,
    int64_t count,
    const T* offset,
    T* scores,
    T* weights) {
  for (int64_t b = 0; b < attention_block; b += lanes<T>) {
    T* column = scores + b;
    Vec<T> largest = broadcast(-T(__builtin_inff()));
    for (int64_t i = 0; i < count; ++i) {
      Vec<T> value = load(column + i * attention_block);
      if (offset != nullptr) {
        value += offset[i];
        store(column + i * attention_block, value);
      }
      largest = maximum<T>(value, largest);
    }
    LongSum<T> sum;
    for (int64_t i = 0; i < count; ++i) {
      T* at = column + i * attention_block;
      const Vec<T> value = exponential_or_zero<T>(load(at) - largest);
      store(at, value);
      sum.add(value);
    }
    const Vec<T> total = sum.total + sum.part;
    for (int64_t i = 0; i < count; ++i) {
      T* at = column + i * attention_block;
      store(at, load(at) / total);
    }
  }
  for (int64_t i = 0; i < count; i += lanes<T>) {
    for (int64_t b = 0; b < rows; b += lanes<T>) {
      Vec<T> tile[lanes<T>] = {};
      for (int64_t k = 0; k < lanes<T> && i + k < count; ++k) {
        tile[k] = load(scores + (i + k) * attention_block + b);
      }
      transpose<lanes<T> / 2, T>(tile);
      for (int64_t r = 0; r < lanes<T> && b + r < rows; ++r) {
        store_up_to(weights + (b + r) * count + i, count - i, tile[r]);
      }
    }
  }
}

template <typename T>
void attend(const AttentionKeys<T>& keys, int64_t rows, T* query, T* weights) {
  constexpr int64_t most_columns = 2048 / static_cast<int64_t>(sizeof(T));
  alignas(64) T buffer[attention_block * span<T>];
  alignas(64) T columns[most_columns * attention_block];
  const bool by_columns = keys.count <= most_columns;
  // There are lanes that no query fills.
  const int64_t unset =
      by_columns && rows < attention_block ? keys.count * attention_block : 0;
  for (int64_t i = 0; i < unset; ++i) {
    columns[i] = 0;
  }
  if constexpr (has_factored_form<T>) {
    if (keys.kept_limit > 0) {
      exponentiate<true>(
          rows,
          keys.hidden,
          query,
          keys.hidden,
          keys.kept_limit,
          query,
          keys.hidden);
    }
  }
  const auto add_folded =
      divides_fast() ? add_folded_scores<true, T> : add_folded_scores<false, T>;
  const Scores<T> scores =
      by_columns ? Scores<T>{columns, true} : Scores<T>{weights, false};
  const int64_t padded = keys.panels * panel_width<T>;
  for (int64_t first = 0; first < padded; first += span<T>) {
    const int64_t left = padded - first;
    const int64_t width = left < span<T> ? left : span<T>;
    const Activations<T> taken = activate<Counting::by_score, T>(
        keys, rows, first, width, query, keys.fold_limit, buffer);
    const auto add_scores =
        taken.form == Form::direct ? add_direct_scores<T> : add_folded;
    add_scores(keys, rows, first, width, taken.data, taken.stride, scores);
  }
  if (by_columns) {
    softmax_columns(rows, keys.count, keys.log_prior, columns, weights);
    return;
  }
  for (int64_t b = 0; b < rows; ++b) {
    softmax_row(keys.count, keys.log_prior, weights + b * keys.count);
  }
}

// -- Backward -----------------------------------------------------------------

// grad_scores of up to lanes<T> rows that fill no vector each. All rows are
// read before one is written: a masked store holds up a read of what comes
// after it.
template <typename T>
void grad_scores_of_narrow(
    int64_t rows,
    int64_t count,
    const T* factors,
    const T* weights,
    T* grad,
    T* row_sums) {
  const Vec<T> factor = load_up_to(factors, count, T(0));
  Vec<T> weight[lanes<T>];
  Vec<T> value[lanes<T>];
  Vec<T> sums[lanes<T>] = {};
  for (int64_t b = 0; b < rows; ++b) {
    weight[b] = load_up_to(weights + b * count, count, T(0));
    value[b] = factor * load_up_to(grad + b * count, count, T(0));
    sums[b] = weight[b] * value[b];
  }
  sum_rows<lanes<T> / 2, T>(sums);
  alignas(64) T means[lanes<T>];
  store(means, sums[0]);
  Vec<T> totals[lanes<T>] = {};
  for (int64_t b = 0; b < rows; ++b) {
    totals[b] = weight[b] * (value[b] - means[b]);
    store_up_to(grad + b * count, count, totals[b]);
  }
  sum_rows<lanes<T> / 2, T>(totals);
  store_up_to(row_sums, rows, totals[0]);
}

// grad_scores of rows of which two fill a vector, as of 8 prototypes with
// AVX-512.
template <typename T>
void grad_scores_of_halves(
    int64_t rows,
    const T* factors,
    const T* weights,
    T* grad,
    T* row_sums) {
  constexpr int64_t count = lanes<T> / 2;
  alignas(64) T both[lanes<T>];
  for (int64_t i = 0; i < lanes<T>; ++i) {
    both[i] = factors[i % count];
  }
  const Vec<T> factor = load(both);
  for (int64_t b = 0; b < rows; b += 2) {
    const int64_t left = (rows - b) * count;
    const Vec<T> weight = load_up_to(weights + b * count, left, T(0));
    const Vec<T> value = factor * load_up_to(grad + b * count, left, T(0));
    const Vec<T> mean = sum_within<count, T>(weight * value);
    const Vec<T> found = weight * (value - mean);
    const Vec<T> total = sum_within<count, T>(found);
    store_up_to(grad + b * count, left, found);
    row_sums[b] = total[0];
    if (b + 1 < rows) {
      row_sums[b + 1] = total[count];
    }
  }
}

template <typename T>
void grad_scores(
    int64_t rows,
    int64_t count,
    const T* factors,
    const T* weights,
    T* grad,
    T* row_sums) {
  if (2 * count == lanes<T>) {
    grad_scores_of_halves(rows, factors, weights, grad, row_sums);
    return;
  }
  for (int64_t b = 0; b < rows && count <= lanes<T>; b += lanes<T>) {
    grad_scores_of_narrow(
        rows - b < lanes<T> ? rows - b : lanes<T>,
        count,
        factors,
        weights + b * count,
        grad + b * count,
        row_sums + b);
  }
  for (int64_t b = 0; b < rows && count > lanes<T>; ++b) {
    const T* weight = weights + b * count;
    T* row = grad + b * count;
    Vec<T> sum = {};
    for (int64_t i = 0; i < count; i += lanes<T>) {
      const Vec<T> value = load_up_to(factors + i, count - i, T(0)) *
          load_up_to(row + i, count - i, T(0));
      store_up_to(row + i, count - i, value);
      sum += load_up_to(weight + i, count - i, T(0)) * value;
    }
    const Vec<T> mean = broadcast(sum_lanes<T>(sum));
    Vec<T> total = {};
    for (int64_t i = 0; i < count; i += lanes<T>) {
      const Vec<T> value = load_up_to(weight + i, count - i, T(0)) *
          (load_up_to(row + i, count - i, T(0)) - mean);
      total += value;
      store_up_to(row + i, count - i, value);
    }
    row_sums[b] = sum_lanes<T>(total);
  }
}

// Keys that are swept at a time, so that their sums stay in the first-level
// cache.
constexpr int64_t key_block = 64;

// With AVX-512, 1 / (1 + e^2a e^2b) is an estimate that is refined; elsewhere
// one division serves two terms, which the factor keeps within float's range.
constexpr bool estimates = vector_bytes == 64;
constexpr float denominator_unit = estimates ? 1 : 0x1p-62f;

// What sweep() keeps of the queries and keys of one panel, of which each row
// holds panel_width units.
template <typename T>
struct PanelSpace {
  alignas(64) T query[sweep_rows][panel_width<T>]; // what activate() makes
  Activations<T> blocks[sweep_rows / attention_block];
  Vec<T> query_sum[sweep_rows][2];
  Vec<T> key[key_block][2];          // values
  Vec<T> exponentials[key_block][2]; // denominator_unit * e^2key
  Vec<T> key_sum[key_block][2];
};

// Where the sums by query go, for the units of one panel: of one block of keys
// after the other into `sums`, and with the last one into the gradients.
template <typename T>
struct QueryGrads {
  T* to; // [rows, H] from the first of the units on, may be e^2query
  int64_t stride;
  int64_t units;     // to be stored, of panel_width
  Vec<T> w[2];       // w_score
  T ends[2];         // e^2query at which queries are cut off
  Vec<T> (*sums)[2]; // [rows]
  bool first_keys;
  bool last_keys;
};

// What becomes r = 1 / (1 + e^2a e^2b), or, if not `factored`, tanh(a + b), for
// the units of one panel: tanh = 1 - 2r and 1 - tanh^2 = 4 (r - r^2).
template <bool factored, typename T>
struct Terms {
  Vec<T> denominator[2];
  Vec<T> estimate[2]; // of 1 / denominator, where it is to be refined

  KDCI_INLINE void start(const Vec<T>* query, Vec<T> key0, Vec<T> key1) {
    if constexpr (!factored) {
      estimate[0] = hyperbolic_tangent<T>(query[0] + key0);
      estimate[1] = hyperbolic_tangent<T>(query[1] + key1);
    } else {
      const Vec<T> one = broadcast(static_cast<T>(denominator_unit));
      denominator[0] = query[0] * key0 + one;
      denominator[1] = query[1] * key1 + one;
#if defined(__AVX512F__)
      estimate[0] = _mm512_maskz_rcp14_ps(0xffff, denominator[0]);
      estimate[1] = _mm512_maskz_rcp14_ps(0xffff, denominator[1]);
#else
      const Vec<T> inverse = one / (denominator[0] * denominator[1]);
      estimate[0] = inverse * denominator[1];
      estimate[1] = inverse * denominator[0];
#endif
    }
  }

  KDCI_INLINE Vec<T> finish(int v) const {
    if constexpr (factored && estimates) {
      return estimate[v] + estimate[v] * (T(1) - denominator[v] * estimate[v]);
    } else {
      return estimate[v];
    }
  }

  // value (1 - r), which is to be 0 where e^2a e^2b vanishes beside 1.
  KDCI_INLINE Vec<T> slope(int v, Vec<T> value, Vec<T> r) const {
    if constexpr (estimates) {
      return value - value * r;
    } else {
      const T unit = denominator_unit;
      return value * ((denominator[v] - unit) * (1 / unit) * r);
    }
  }
};

// Whether any e^2query may be at an end, where queries are cut off. As whole
// numbers, those between the ends are a range, which NaN is not in.
template <int rows, typename T>
KDCI_INLINE bool any_cut_off(
    const T (&ends)[2],
    const Vec<T> (&query)[rows][2]) {
  using Word = typename Bits<T>::type;
  const Word low = bits_of(ends[0]) + 1;
  BitsVec<T> largest = {};
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const BitsVec<T> above = (BitsVec<T>)query[r][v] - low;
      largest = above > largest ? above : largest;
    }
  }
  return reaches<Word>(largest, bits_of(ends[1]) - low);
}

// Removes the sums of queries that were cut off, where tanh is 1 for all keys.
// NaN stays, as it would times 0.
template <typename T>
KDCI_INLINE void drop_cut_off(
    const T (&ends)[2],
    const T* query,
    Vec<T> (&sum)[2]) {
  for (int v = 0; v < 2; ++v) {
    const Vec<T> units = load(query + v * lanes<T>);
    const auto cut =
        ((units <= ends[0]) | (units >= ends[1])) & (sum[v] == sum[v]);
    sum[v] = cut ? Vec<T>{} : sum[v];
  }
}

// By additions, which leave the multiplier to others.
template <typename T>
KDCI_INLINE Vec<T> four_times(Vec<T> value) {
  const Vec<T> twice = value + value;
  return twice + twice;
}

// Puts the sums of one query where they go.
template <typename T>
__attribute__((noinline)) void put_sums(
    const QueryGrads<T>& grads,
    int64_t row,
    const T* cut_off, // e^2query if it may be cut off, or null
    Vec<T> sum0,
    Vec<T> sum1) {
  Vec<T> sum[2] = {sum0, sum1};
  Vec<T>(&kept)[2] = grads.sums[row];
  if (!grads.first_keys) {
    sum[0] += kept[0];
    sum[1] += kept[1];
  }
  if (!grads.last_keys) {
    kept[0] = sum[0];
    kept[1] = sum[1];
    return;
  }
  if (cut_off != nullptr) {
    drop_cut_off<T>(grads.ends, cut_off, sum);
  }
  T* to = grads.to + row * grads.stride;
  for (int v = 0; v < 2 && grads.units > v * lanes<T>; ++v) {
    store_up_to(
        to + v * lanes<T>,
        grads.units - v * lanes<T>,
        grads.w[v] * four_times<T>(sum[v]));
  }
}

// Adds up queries [begin, end), `rows` at a time, and `count` keys, for the
// units of one panel: grad_score * (1 - tanh^2) / 4 by query, which make the
// gradients, and by key, and grad_score * (1 - tanh) / 2, or, if not
// `factored`, -grad_score * tanh / 2. The latter two are added to what is
// there. `taken` and `grad_score` begin with the run's queries, the one of
// `row`.
template <int rows, bool factored, typename T>
inline void sweep_rows_of(
    int64_t begin,
    int64_t end,
    int64_t count,
    const Activations<T>& taken,
    const Vec<T> (*keys)[2],
    const T* grad_score,
    int64_t grad_stride,
    const QueryGrads<T>& grads,
    int64_t row,
    Vec<T> (*key_sum)[2],
    Vec<T>* score) {
  // The chain of operations for a term is so long that the processor's queues
  // would fill up waiting: with AVX-512 a key is begun while the one before it
  // is being finished, and the next queries' first one with the last one.
  constexpr bool ahead = factored && estimates;
  const bool cut = taken.form == Form::cut_off;
  const bool plain =
      grads.first_keys && grads.last_keys && grads.units >= panel_width<T>;
  // Copies, which the stores below cannot be taken to change.
  const int64_t stride = taken.stride;
  const int64_t to_stride = grads.stride;
  const Vec<T> w0 = grads.w[0];
  const Vec<T> w1 = grads.w[1];
  const T* units = taken.data + begin * stride;
  const T* last_units = taken.data + (end - rows) * stride;
  T* to = grads.to + (row + begin) * to_stride;
  grad_score += begin * grad_stride;
  row += begin;
  Vec<T> query[rows][2];
  Terms<factored, T> terms[rows];
  const auto take = [&](const T* from) KDCI_ALWAYS_INLINE {
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      query[r][0] = load(from + r * stride);
      query[r][1] = load(from + r * stride + lanes<T>);
    }
  };
  take(units);
#pragma GCC unroll 2
  for (int r = 0; r < rows && ahead; ++r) {
    terms[r].start(query[r], keys[0][0], keys[0][1]);
  }
  for (;;) {
    Vec<T> slope_sum[rows][2] = {};
    Vec<T> value_sum[2] = {};
    const auto handle = [&](int64_t i, int64_t next) KDCI_ALWAYS_INLINE {
      Vec<T> key_sum0 = key_sum[i][0];
      Vec<T> key_sum1 = key_sum[i][1];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        if constexpr (!ahead) {
          terms[r].start(query[r], keys[i][0], keys[i][1]);
        }
        const Terms<factored, T> now = terms[r];
        if constexpr (ahead) {
          terms[r].start(query[r], keys[next][0], keys[next][1]);
        }
        const Vec<T> grad = broadcast(grad_score[r * grad_stride + i]);
        const Vec<T> term0 = now.finish(0);
        const Vec<T> term1 = now.finish(1);
        // Products with the gradient first, so that the sums are additions,
        // which need not wait for the multiplier.
        Vec<T> value0;
        Vec<T> value1;
        Vec<T> slope0;
        Vec<T> slope1;
        if constexpr (factored) {
          value0 = grad * term0;
          value1 = grad * term1;
          slope0 = now.slope(0, value0, term0);
          slope1 = now.slope(1, value1, term1);
        } else {
          value0 = T(-0.5) * grad * term0;
          value1 = T(-0.5) * grad * term1;
          slope0 = T(0.25) * grad + T(0.5) * value0 * term0;
          slope1 = T(0.25) * grad + T(0.5) * value1 * term1;
        }
        slope_sum[r][0] += slope0;
        slope_sum[r][1] += slope1;
        key_sum0 += slope0;
        key_sum1 += slope1;
        value_sum[0] += value0;
        value_sum[1] += value1;
      }
      key_sum[i][0] = key_sum0;
      key_sum[i][1] = key_sum1;
    };
    for (int64_t i = 0; i + 1 < count; ++i) {
      handle(i, i + 1);
    }
    // Few are, and this takes fewer steps to see.
    const bool any_cut = cut && any_cut_off<rows, T>(grads.ends, query);
    const T* next = units == last_units ? units : units + rows * stride;
    if constexpr (ahead) {
      take(next);
      handle(count - 1, 0);
    } else {
      handle(count - 1, 0);
      take(next);
    }
    score[0] += value_sum[0];
    score[1] += value_sum[1];
    if (plain && !any_cut) {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        store(to + r * to_stride, w0 * four_times<T>(slope_sum[r][0]));
        store(
            to + r * to_stride + lanes<T>, w1 * four_times<T>(slope_sum[r][1]));
      }
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        put_sums<T>(
            grads,
            row + r,
            any_cut ? units + r * stride : nullptr,
            slope_sum[r][0],
            slope_sum[r][1]);
      }
    }
    if (units == last_units) {
      return;
    }
    units = next;
    to += rows * to_stride;
    grad_score += rows * grad_stride;
    row += rows;
  }
}

// The end of the queries from b on that can be swept in one go: blocks that are
// taken for the same and follow upon each other.
template <typename T>
int64_t end_of_run(const Activations<T>* blocks, int64_t b, int64_t rows) {
  const Activations<T>& first = blocks[b / attention_block];
  int64_t end = b + attention_block;
  while (end < rows) {
    const Activations<T>& next = blocks[end / attention_block];
    if (next.form != first.form || next.stride != first.stride ||
        next.data != first.data + (end - b) * first.stride) {
      break;
    }
    end += attention_block;
  }
  return end < rows ? end : rows;
}

// sweep_rows_of for the `rows` queries from `row` on.
template <bool factored, typename T>
void sweep_run(
    int64_t row,
    int64_t rows,
    int64_t count,
    const Activations<T>& taken,
    const Vec<T> (*keys)[2],
    const T* grad_score,
    int64_t grad_stride,
    const QueryGrads<T>& grads,
    Vec<T> (*key_sum)[2],
    Vec<T>* score) {
  const int64_t paired = rows / 2 * 2;
  const auto sweep_from = [&](auto sweep, int64_t begin, int64_t end) {
    sweep(
        begin,
        end,
        count,
        taken,
        keys,
        grad_score,
        grad_stride,
        grads,
        row,
        key_sum,
        score);
  };
  if (paired > 0) {
    sweep_from(sweep_rows_of<2, factored, T>, 0, paired);
  }
  if (paired < rows) {
    sweep_from(sweep_rows_of<1, factored, T>, paired, rows);
  }
}

// One panel of sweep().
template <typename T>
void sweep_panel(
    const AttentionKeys<T>& keys,
    int64_t panel,
    int64_t rows,
    const T* query,
    const T* grad_score,
    const T* row_sums,
    bool accumulate,
    T* grad_query,
    T* grad_key,
    T* grad_w_score,
    const T (&ends)[2],
    PanelSpace<T>& space) {
  constexpr int64_t width = panel_width<T>;
  const int64_t unit = panel * width;
  const int64_t units = keys.hidden - unit; // whole vectors and more, or less
  const Vec<T> w[2] = {
      keys.score_scale * load(keys.w_score + unit),
      keys.score_scale * load(keys.w_score + unit + lanes<T>)};
  QueryGrads<T> grads = {
      grad_query + unit,
      keys.hidden,
      units,
      {w[0], w[1]},
      {ends[0], ends[1]},
      space.query_sum,
      false,
      false};
  // Of grad_score * tanh, with the sums that sweep_rows_of makes taken twice.
  Vec<T> score[2] = {};
  Vec<T> rest_lanes = {};
  for (int64_t b = 0; b < rows; b += attention_block) {
    const int64_t left = rows - b;
    const int64_t count = left < attention_block ? left : attention_block;
    const Activations<T> taken = activate<Counting::alike, T>(
        keys,
        count,
        unit,
        width,
        query + b * keys.hidden,
        keys.factor_limit,
        space.query[b]);
    space.blocks[b / attention_block] = taken;
    const bool direct = taken.form == Form::direct;
    for (int64_t r = 0; r < count && !direct; r += lanes<T>) {
      rest_lanes += load_up_to(row_sums + b + r, count - r, T(0));
    }
  }
  const Vec<T> rest = broadcast(sum_lanes<T>(rest_lanes));
  for (int64_t i = 0; i < keys.count; i += key_block) {
    const int64_t left = keys.count - i;
    const int64_t count = left < key_block ? left : key_block;
    for (int64_t k = 0; k < count; ++k) {
      Vec<T> values[2];
      for (int v = 0; v < 2; ++v) {
        const int64_t in_vector = units - v * lanes<T>;
        values[v] = in_vector <= 0
            ? Vec<T>{}
            : load_up_to(
                  keys.values + (i + k) * keys.hidden + unit + v * lanes<T>,
                  in_vector,
                  T(0));
        space.key_sum[k][v] = Vec<T>{};
        space.key[k][v] = values[v];
      }
      if constexpr (has_factored_form<T>) {
        if (keys.factor_limit > 0) {
          exponentials_of_twice<2, T>(values);
          const T denominator = static_cast<T>(denominator_unit);
          space.exponentials[k][0] = denominator * values[0];
          space.exponentials[k][1] = denominator * values[1];
        }
      }
    }
    grads.first_keys = i == 0;
    grads.last_keys = i + count == keys.count;
    for (int64_t b = 0, end; b < rows; b = end) {
      const Activations<T>& taken = space.blocks[b / attention_block];
      end = end_of_run(space.blocks, b, rows);
      const bool factored = taken.form != Form::direct;
      (factored
           ? sweep_run<has_factored_form<T>, T>
           : sweep_run<false, T>)(b,
                                  end - b,
                                  count,
                                  taken,
                                  factored ? space.exponentials : space.key,
                                  grad_score + b * keys.count + i,
                                  keys.count,
                                  grads,
                                  space.key_sum,
                                  score);
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int v = 0; v < 2 && units > v * lanes<T>; ++v) {
        T* to = grad_key + (i + k) * keys.hidden + unit + v * lanes<T>;
        const int64_t in_vector = units - v * lanes<T>;
        const Vec<T> before =
            accumulate ? load_up_to(to, in_vector, T(0)) : Vec<T>{};
        store_up_to(
            to, in_vector, before + w[v] * four_times<T>(space.key_sum[k][v]));
      }
    }
  }
  for (int v = 0; v < 2 && units > v * lanes<T>; ++v) {
    const int64_t in_vector = units - v * lanes<T>;
    T* to = grad_w_score + unit + v * lanes<T>;
    const Vec<T> before =
        accumulate ? load_up_to(to, in_vector, T(0)) : Vec<T>{};
    store_up_to(to, in_vector, before + (rest - T(2) * score[v]));
  }
}

template <typename T>
void sweep(
    const AttentionKeys<T>& keys,
    int64_t begin,
    int64_t end,
    int64_t rows,
    const T* query,
    const T* grad_score,
    const T* row_sums,
    bool accumulate,
    T* grad_query,
    T* grad_key,
    T* grad_w_score) {
  PanelSpace<T> space;
  const T limit = keys.kept_limit > 0 ? keys.kept_limit : keys.factor_limit;
  Vec<T> at_limits[2] = {broadcast(-limit), broadcast(limit)};
  exponentials_of_twice<2, T>(at_limits);
  const T ends[2] = {at_limits[0][0], at_limits[1][0]};
  for (int64_t panel = begin; panel < end; ++panel) {
    sweep_panel(
        keys,
        panel,
        rows,
        query,
        grad_score,
        row_sums,
        accumulate,
        grad_query,
        grad_key,
        grad_w_score,
        ends,
        space);
  }
}

template <typename T>
constexpr AttentionKernels<T> kernels_of = {
    panel_width<T>,
    prepare_score<T>,
    pack_keys<T>,
    finish_keys<T>,
    attend<T>,
    grad_scores<T>,
    sweep<T>};

} // namespace

const AttentionKernels<float> attention_kernels_float = kernels_of<float>;
const AttentionKernels<double> attention_kernels_double = kernels_of<double>;

} // namespace kdci::KDCI_SIMD
