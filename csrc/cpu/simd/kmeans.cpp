// SPDX-License-Identifier: Apache-2.0
#include "kmeans.h"

#include "tile.h"

namespace kdci::KDCI_SIMD {
namespace {

template <typename T>
double square_sum(const T* tile, int64_t depth) {
  Vec<double> sums[4] = {};
  for (int64_t i = 0; i < depth * tile_points; i += 4 * lanes<double>) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const Vec<double> value = widen(tile + i + v * lanes<double>);
      sums[v] += value * value;
    }
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/// The lowest and second lowest score of each point of a tile, and the column
/// that has the lowest; of equal ones the first.
template <typename Score, typename Index>
struct Nearest {
  Score best[tile_points];
  Score second[tile_points];
  Index index[tile_points];
};

template <typename T>
using NearestOf = Nearest<T, decltype(Mask<T>{}[0] + 0)>;

/// Finds them for scores that `score(group, column, i, block)` leaves in
/// `block`, for the group's columns and the points from i on.
template <typename Score, typename Index, typename Compute>
KDCI_INLINE void find_nearest(
    int64_t num_columns,
    Score worst,
    Nearest<Score, Index>& nearest,
    Compute score) {
  for (int64_t i = 0; i < tile_points; i += block_points<Score>) {
    Vec<Score> best[num_vectors];
    Vec<Score> second[num_vectors];
    Vec<Index> index[num_vectors];
    for (int v = 0; v < num_vectors; ++v) {
      best[v] = second[v] = broadcast(worst);
      index[v] = Vec<Index>{};
    }
    for_groups(num_columns, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int width = decltype(group)::value;
      Block<Score, width> block;
      score(group, first, i, block);
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
        const Vec<Index> column = static_cast<Index>(first + c) - Vec<Index>{};
#pragma GCC unroll 4
        for (int v = 0; v < num_vectors; ++v) {
          const Vec<Score> value = block[c][v];
          const Vec<Score> higher = value > best[v] ? value : best[v];
          index[v] = value < best[v] ? column : index[v];
          best[v] = value < best[v] ? value : best[v];
          second[v] = higher < second[v] ? higher : second[v];
        }
      }
    });
    for (int v = 0; v < num_vectors; ++v) {
      const int64_t at = i + v * lanes<Score>;
      store(nearest.best + at, best[v]);
      store(nearest.second + at, second[v]);
      store(nearest.index + at, index[v]);
    }
  }
}

#if defined(__AVX512VNNI__)

/// The same for 32-bit scores, whose last bits, those of `column_bits`, give
/// way to the column: what compares scores then finds the column too.
template <typename Compute>
KDCI_INLINE void find_nearest_coarsely(
    int64_t num_columns,
    int32_t column_bits,
    int32_t* best_scores,
    int32_t* second_scores,
    Compute score) {
  static_assert(block_points<int32_t> == tile_points);
  __m512i best[num_vectors];
  __m512i second[num_vectors];
  for (int v = 0; v < num_vectors; ++v) {
    best[v] = second[v] = _mm512_set1_epi32(INT32_MAX);
  }
  const __m512i bits = _mm512_set1_epi32(column_bits);
  for_groups(num_columns, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
    constexpr int width = decltype(group)::value;
    Block<int32_t, width> block;
    score(group, first, block);
#pragma GCC unroll 6
    for (int c = 0; c < width; ++c) {
      const __m512i column = _mm512_set1_epi32(first + c);
#pragma GCC unroll 4
      for (int v = 0; v < num_vectors; ++v) {
        // bits ? column : score
        const __m512i value =
            _mm512_ternarylogic_epi32((__m512i)block[c][v], column, bits, 0xd8);
        const __m512i higher = _mm512_max_epi32(value, best[v]);
        best[v] = _mm512_min_epi32(value, best[v]);
        second[v] = _mm512_min_epi32(higher, second[v]);
      }
    }
  });
  for (int v = 0; v < num_vectors; ++v) {
    _mm512_storeu_si512(best_scores + v * lanes<int32_t>, best[v]);
    _mm512_storeu_si512(second_scores + v * lanes<int32_t>, second[v]);
  }
}

#endif

/// A buffer of points taken out of their tiles: coordinate k of point i is
/// points[k * pitch + i]. A whole tile and a vector more can be appended to
/// one that is not full.
constexpr int64_t pitch = 2 * tile_points + 16;

template <typename T>
struct Collected {
  T* points = nullptr; // [depth, pitch]
  int64_t rows[2 * tile_points];
  int64_t count = 0;
};

/// Appends the points that are set in `chosen` of a tile or buffer whose
/// coordinates are `stride` apart.
template <typename T>
KDCI_INLINE void append_points(
    const T* points,
    int64_t stride,
    int64_t depth,
    uint64_t chosen,
    T* to) {
#if defined(__AVX512F__)
  // Every vector is written whole, and what is too much overwritten by the
  // next one.
  constexpr int parts = tile_points / lanes<T>;
  uint64_t mask[parts];
  T* start[parts];
  for (int v = 0; v < parts; ++v) {
    mask[v] = chosen >> (v * lanes<T>)&((uint64_t(1) << lanes<T>)-1);
    start[v] = to;
    to += __builtin_popcountll(mask[v]);
  }
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < parts; ++v) {
      const T* from = points + k * stride + v * lanes<T>;
      T* target = start[v] + k * pitch;
      if constexpr (sizeof(T) == 4) {
        _mm512_storeu_ps(
            target, _mm512_maskz_compress_ps(mask[v], _mm512_loadu_ps(from)));
      } else {
        _mm512_storeu_pd(
            target, _mm512_maskz_compress_pd(mask[v], _mm512_loadu_pd(from)));
      }
    }
  }
#else
  for (; chosen != 0; chosen &= chosen - 1) {
    const int64_t i = __builtin_ctzll(chosen);
    for (int64_t k = 0; k < depth; ++k) {
      to[k * pitch] = points[k * stride + i];
    }
    ++to;
  }
#endif
}

/// Fetches what the next tiles hold, a few cache lines at a time.
template <typename T>
class Ahead {
 public:
  /// Lines are fetched up to `end`, from `begin` on or what was fetched last.
  void move(const T* begin, const T* end) {
    next_ = next_ < begin ? begin : next_;
    end_ = end;
  }

  KDCI_INLINE void fetch(int64_t lines) {
    for (; lines > 0 && next_ < end_; --lines) {
      // Into the second level: tiles may be larger than the first.
      __builtin_prefetch(next_, 0, 2);
      next_ += 64 / sizeof(T);
    }
  }

 private:
  const T* next_ = nullptr;
  const T* end_ = nullptr;
};

/// Which of a tile's values are not greater than 0.
template <typename T>
KDCI_INLINE uint64_t not_positive(const T* values) {
  uint64_t found = 0;
#if defined(__AVX512F__)
  for (int64_t i = 0; i < tile_points; i += lanes<T>) {
    uint64_t mask;
    if constexpr (sizeof(T) == 4) {
      mask = _mm512_cmp_ps_mask(
          _mm512_loadu_ps(values + i), _mm512_setzero_ps(), _CMP_NGT_UQ);
    } else {
      mask = _mm512_cmp_pd_mask(
          _mm512_loadu_pd(values + i), _mm512_setzero_pd(), _CMP_NGT_UQ);
    }
    found |= mask << i;
  }
#else
  for (int64_t i = 0; i < tile_points; ++i) {
    found |= static_cast<uint64_t>(!(values[i] > 0)) << i;
  }
#endif
  return found;
}

/// A vector of values `stride` apart, times `scale`.
template <typename T>
KDCI_INLINE Vec<int64_t> round_values(
    const T* values,
    int64_t stride,
    double scale) {
  typedef T Values __attribute__((vector_size(lanes<double> * sizeof(T))));
  Values found = {};
#pragma GCC unroll 8
  for (int64_t j = 0; j < lanes<double>; ++j) {
    found[j] = values[j * stride];
  }
  const Vec<double> scaled =
      __builtin_convertvector(found, Vec<double>) * scale;
#if defined(__AVX512DQ__)
  return (Vec<int64_t>)_mm512_cvtpd_epi64((__m512d)scaled);
#else
  Vec<int64_t> rounded = {};
  for (int64_t j = 0; j < lanes<double>; ++j) {
    rounded[j] = __builtin_llrint(scaled[j]);
  }
  return rounded;
#endif
}

/// The first `count` points of a tile.
KDCI_INLINE uint64_t first_points(int64_t count) {
  return ~uint64_t(0) >> (tile_points - count);
}

/// One pass over a range of tiles. Points that cannot have changed are left
/// alone; the others are collected into full tiles and scored, in 16-bit
/// integers where the processor has products of these. A point whose two best
/// scores are closer than the rounding of that is scored once more in products
/// of T, and where these leave it open, in squared differences.
template <typename T>
class AssignPass {
 public:
  AssignPass(const Assignment<T>& task, T* scratch)
      : task_(task),
        lines_(
            2 * task.depth * tile_points * sizeof(T) / 64 * group_columns /
                task.num_centers +
            1) {
    if (task.bias != nullptr) {
      active_.points = scratch;
      close_.points = scratch + task.depth * pitch;
      tied_.points = scratch + 2 * task.depth * pitch;
      scratch += 3 * task.depth * pitch;
      pairs_ = reinterpret_cast<uint32_t*>(scratch);
      pair_bias_ =
          reinterpret_cast<int32_t*>(scratch + task.depth * tile_points);
    }
  }

  int64_t run(int64_t begin, int64_t end) {
    const int64_t size = task_.depth * tile_points;
    for (int64_t tile = begin; tile < end; ++tile) {
      const T* points = task_.tiles + tile * size;
      ahead_.move(points + size, task_.tiles + smaller(tile + 3, end) * size);
      const int64_t first = tile * tile_points;
      const int64_t count = smaller(task_.n - first, tile_points);
      const uint64_t active = task_.drift == nullptr
          ? first_points(count)
          : spend_slack(first, count);
      if (__builtin_popcountll(active) >= count - tile_points / 8) {
        int64_t rows[tile_points];
        for (int64_t i = 0; i < tile_points; ++i) {
          rows[i] = first + i;
        }
        settle(points, tile_points, rows, count);
      } else if (active != 0) {
        append(points, tile_points, first, active, active_);
        if (active_.count >= tile_points) {
          settle(active_.points, pitch, active_.rows, tile_points);
          drop_tile(active_);
        }
      }
    }
    settle(active_.points, pitch, active_.rows, active_.count);
    settle_by_products(close_.points, pitch, close_.rows, close_.count);
    settle_by_differences(tied_.points, pitch, tied_.rows, tied_.count);
    return moves_;
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
  }

  /// Takes the drift of the centres from the slack of a tile's points; returns
  /// which have none left.
  uint64_t spend_slack(int64_t first, int64_t count) {
    T* slack = task_.slack + first;
    const int64_t* labels = task_.labels + first;
    T drift[tile_points] = {};
    for (int64_t i = 0; i < count; ++i) {
      drift[i] = task_.drift[labels[i]];
    }
    for (int64_t i = 0; i < tile_points; ++i) {
      slack[i] -= drift[i];
    }
    return not_positive(slack) & first_points(count);
  }

  void append(
      const T* points,
      int64_t stride,
      int64_t first,
      uint64_t chosen,
      Collected<T>& to) {
    append_points(points, stride, task_.depth, chosen, to.points + to.count);
    int64_t count = to.count;
    for (; chosen != 0; chosen &= chosen - 1) {
      to.rows[count++] = first + __builtin_ctzll(chosen);
    }
    to.count = count;
  }

  /// Drops the first 64 points.
  void drop_tile(Collected<T>& from) {
    from.count -= tile_points;
    for (int64_t k = 0; k < task_.depth; ++k) {
      T* points = from.points + k * pitch;
      for (int64_t i = 0; i < from.count; ++i) {
        points[i] = points[tile_points + i];
      }
    }
    for (int64_t i = 0; i < from.count; ++i) {
      from.rows[i] = from.rows[tile_points + i];
    }
  }

  /// Labels the points that are set in `chosen`.
  template <typename Index>
  void set_labels(
      const T* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count,
      uint64_t chosen,
      const Index* found) {
    // Most labels stay: no branch for each.
    uint64_t changed = 0;
    for (int64_t i = 0; i < count; ++i) {
      changed |= static_cast<uint64_t>(task_.labels[rows[i]] != found[i]) << i;
    }
    changed &= chosen;
    moves_ += __builtin_popcountll(changed);
    for (; changed != 0; changed &= changed - 1) {
      const int64_t i = __builtin_ctzll(changed);
      const int64_t old = task_.labels[rows[i]];
      task_.labels[rows[i]] = found[i];
      if (task_.sums != nullptr) {
        move_point(points + i, stride, old, found[i]);
      }
    }
  }

  /// Takes a point whose coordinates are `stride` apart from one cluster's sums
  /// to another's.
  void move_point(const T* point, int64_t stride, int64_t old, int64_t label) {
    const int64_t depth = task_.depth;
    int64_t* to = task_.sums + label * depth;
    int64_t* from = old < 0 ? nullptr : task_.sums + old * depth;
    int64_t k = 0;
    for (; k + lanes<int64_t> <= depth; k += lanes<int64_t>) {
      const Vec<int64_t> values =
          round_values(point + k * stride, stride, task_.sum_scale);
      store(to + k, load(to + k) + values);
      if (from != nullptr) {
        store(from + k, load(from + k) - values);
      }
    }
    for (; k < depth; ++k) {
      const int64_t value =
          __builtin_llrint(point[k * stride] * task_.sum_scale);
      to[k] += value;
      if (from != nullptr) {
        from[k] -= value;
      }
    }
    ++task_.counts[label];
    if (old >= 0) {
      --task_.counts[old];
    }
  }

  void settle(
      const T* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count) {
    if (count == 0) {
      return;
    }
    if (task_.bias == nullptr) {
      settle_by_differences(points, stride, rows, count);
      return;
    }
#if defined(__AVX512VNNI__)
    if constexpr (sizeof(T) == 4) {
      if (task_.pairs != nullptr) {
        settle_coarsely(points, stride, rows, count);
        return;
      }
    }
#endif
    settle_by_products(points, stride, rows, count);
  }

  void settle_by_differences(
      const T* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count) {
    if (count == 0) {
      return;
    }
    NearestOf<T> nearest;
    find_nearest(
        task_.num_centers,
        static_cast<T>(__builtin_inf()),
        nearest,
        [&](auto group, int64_t column, int64_t i, auto& block)
            KDCI_ALWAYS_INLINE {
              constexpr int width = decltype(group)::value;
              ahead_.fetch(lines_);
              start<width>(nullptr, block);
              accumulate<Term::squared_difference, T, width, num_vectors>(
                  points + i,
                  task_.depth,
                  task_.columns + column * task_.depth,
                  block,
                  stride);
            });
    set_labels(points, stride, rows, count, first_points(count), nearest.index);
  }

  void settle_by_products(
      const T* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count) {
    if (count == 0) {
      return;
    }
    const int64_t depth = task_.depth;
    NearestOf<T> nearest;
    find_nearest(
        task_.num_centers,
        static_cast<T>(__builtin_inf()),
        nearest,
        [&](auto group,
            int64_t column,
            int64_t i,
            auto& block) KDCI_ALWAYS_INLINE {
          constexpr int width = decltype(group)::value;
          ahead_.fetch(lines_);
          start<width>(task_.bias + column, block);
          accumulate<Term::minus_product, T, width, num_vectors>(
              points + i, depth, task_.columns + column * depth, block, stride);
        });
    T squares[tile_points] = {};
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < tile_points; ++i) {
        const T value = points[k * stride + i];
        squares[i] += value * value;
      }
    }
    T slack[tile_points];
    T certain[tile_points]; // if positive
    for (int64_t i = 0; i < tile_points; ++i) {
      const T error = rounding(squares[i]);
      const T best = nearest.best[i];
      const T second = nearest.second[i];
      slack[i] = slack_between(squares[i], best + error, second - error);
      certain[i] = second - best - 2 * error;
    }
    pass_on(
        points,
        stride,
        rows,
        count,
        not_positive(certain),
        nearest.index,
        slack,
        tied_);
    if (tied_.count >= tile_points) {
      settle_by_differences(tied_.points, pitch, tied_.rows, tile_points);
      drop_tile(tied_);
    }
  }

  /// Settles points but for those set in `unsettled`, which are collected.
  template <typename Index>
  void pass_on(
      const T* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count,
      uint64_t unsettled,
      const Index* found,
      const T* slack,
      Collected<T>& to) {
    const uint64_t all = first_points(count);
    set_labels(points, stride, rows, count, all & ~unsettled, found);
    for (int64_t i = 0; i < count; ++i) {
      task_.slack[rows[i]] = slack[i];
    }
    if ((unsettled & all) != 0) {
      const int64_t before = to.count;
      append(points, stride, 0, unsettled & all, to);
      for (int64_t i = before; i < to.count; ++i) {
        to.rows[i] = rows[to.rows[i]];
      }
    }
  }

  template <int width>
  static KDCI_INLINE void start(const T* bias, Block<T, width>& block) {
#pragma GCC unroll 6
    for (int c = 0; c < width; ++c) {
      const Vec<T> value = bias == nullptr ? Vec<T>{} : broadcast(bias[c]);
#pragma GCC unroll 4
      for (int v = 0; v < num_vectors; ++v) {
        block[c][v] = value;
      }
    }
  }

  /// What a score of a point of that squared length can be off by: depth + 1
  /// roundings of sums of at most |c|^2 / 2 + |x| |c| <= |c|^2 + |x|^2 / 2.
  T rounding(T square) const {
    const T unit = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53);
    const T farthest = task_.largest_center * task_.largest_center;
    return (task_.depth + 4) * unit * (square + farthest);
  }

  /// How much farther the second nearest centre is than the nearest, given
  /// bounds on their scores. What later passes subtract is rounded: hence the
  /// factor.
  static T slack_between(T square, T best, T second) {
    const T near = square + 2 * best;
    const T far = square + 2 * second;
    return (root(far > 0 ? far : 0) - root(near > 0 ? near : 0)) *
        T(1 - 0x1p-14);
  }

  static float root(float value) {
    return __builtin_sqrtf(value);
  }

  static double root(double value) {
    return __builtin_sqrt(value);
  }

#if defined(__AVX512VNNI__)
  void settle_coarsely(
      const float* points,
      int64_t stride,
      const int64_t* rows,
      int64_t count) {
    const int64_t half = (task_.depth + 1) / 2;
    float squares[tile_points];
    const float point_scale = round_tile(points, stride, squares);
    const float scale = point_scale * task_.pair_scale;
    for (int64_t c = 0; c < task_.num_centers; c += lanes<float>) {
      const __mmask16 inside =
          first_points(smaller(task_.num_centers - c, lanes<float>));
      _mm512_mask_storeu_epi32(
          pair_bias_ + c,
          inside,
          _mm512_cvtps_epi32(_mm512_mul_ps(
              _mm512_maskz_loadu_ps(inside, task_.bias + c),
              _mm512_set1_ps(scale))));
    }
    alignas(64) int32_t best_scores[tile_points];
    alignas(64) int32_t second_scores[tile_points];
    find_nearest_coarsely(
        task_.num_centers,
        task_.column_bits,
        best_scores,
        second_scores,
        [&](auto group, int64_t column, auto& block) KDCI_ALWAYS_INLINE {
          constexpr int width = decltype(group)::value;
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < num_vectors; ++v) {
              block[c][v] =
                  (Vec<int32_t>)_mm512_set1_epi32(pair_bias_[column + c]);
            }
          }
          ahead_.fetch(lines_);
          accumulate_words<Packing::pairs, width, num_vectors>(
              pairs_, half, task_.pairs + column * half, block);
        });
    // Each of the depth products is off by at most half of each factor.
    const float half_root = root(static_cast<float>(task_.depth)) / 2;
    const float center_error =
        half_root * (task_.largest_center * task_.pair_scale + 2 * half_root) +
        static_cast<float>(task_.column_bits) + 128;
    float slack[tile_points];
    float certain[tile_points]; // if positive
    int32_t index[tile_points];
    const float unit = 1 / scale;
    for (int64_t i = 0; i < tile_points; ++i) {
      const float error =
          (center_error + half_root * root(squares[i]) * point_scale) * unit +
          rounding(squares[i]);
      const float best = static_cast<float>(best_scores[i]) * unit;
      const float second = static_cast<float>(second_scores[i]) * unit;
      index[i] = best_scores[i] & task_.column_bits;
      slack[i] = slack_between(squares[i], best + error, second - error);
      certain[i] = second - best - 2 * error;
    }
    pass_on(
        points,
        stride,
        rows,
        count,
        not_positive(certain),
        index,
        slack,
        close_);
    if (close_.count >= tile_points) {
      settle_by_products(close_.points, pitch, close_.rows, tile_points);
      drop_tile(close_);
    }
  }

  /// Rounds a tile to pairs_ and finds the squared lengths of its points;
  /// returns what the integers were scaled by. No length, and hence no product
  /// with a centre, exceeds 2^15 or 2^30; nor does the bias of a centre, as the
  /// scale is not larger than that of the centres.
  float round_tile(const float* points, int64_t stride, float* squares) {
    const int64_t depth = task_.depth;
    float largest = task_.largest_center;
    square_lengths(points, stride, depth, squares);
    const float length = __builtin_sqrtf(largest_of(squares));
    largest = length > largest ? length : largest;
    const float scale = 32000 / largest;
    round_to_pairs(points, stride, depth, scale, pairs_);
    return scale;
  }
#endif

  const Assignment<T>& task_;
  int64_t moves_ = 0;
  Ahead<T> ahead_;
  const int64_t lines_;          // to fetch ahead for each group of columns
  Collected<T> active_;          // have no slack
  Collected<T> close_;           // are settled too coarsely by integers
  Collected<T> tied_;            // and by products
  uint32_t* pairs_ = nullptr;    // [depth / 2, 64]: coordinates 2k and 2k + 1
  int32_t* pair_bias_ = nullptr; // [K]
};

template <typename T>
int64_t assign_scratch(int64_t depth, int64_t num_centers) {
  return depth * (3 * pitch + tile_points) + num_centers;
}

template <typename T>
int64_t assign_tiles(
    const Assignment<T>& task,
    int64_t begin,
    int64_t end,
    T* scratch) {
  return AssignPass<T>(task, scratch).run(begin, end);
}

template <typename T>
void own_distances(
    const T* tiles,
    int64_t depth,
    int64_t begin,
    int64_t end,
    int64_t n,
    const T* centers,
    int64_t num_centers,
    const int64_t* labels,
    T* distances,
    double* sums) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t start = tile * tile_points;
    const int64_t count = n - start < tile_points ? n - start : tile_points;
    const T* points = tiles + start * depth;
    double squares[tile_points] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const T* center = centers + k * num_centers;
      for (int64_t i = 0; i < count; ++i) {
        const double difference =
            static_cast<double>(points[k * tile_points + i]) -
            static_cast<double>(center[labels[start + i]]);
        squares[i] += difference * difference;
      }
    }
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      distances[start + i] = static_cast<T>(squares[i]);
      sum += squares[i];
    }
    sums[tile] = sum;
  }
}

template <typename T>
constexpr KmeansKernels<T> table = {
    square_sum<T>,
    assign_scratch<T>,
    assign_tiles<T>,
    own_distances<T>,
};

} // namespace

extern const KmeansKernels<float> kmeans_kernels_float = table<float>;
extern const KmeansKernels<double> kmeans_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
