// SPDX-License-Identifier: Apache-2.0
#include "subspace.h"

#include "tile.h"

namespace kdci::KDCI_SIMD {
namespace {

template <typename T>
void project_tile(
    const T* tile,
    int64_t count,
    int64_t depth,
    const T* columns,
    int64_t q,
    T* projected) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(q, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int vectors = decltype(size)::value;
      constexpr int width = decltype(group)::value;
      Block<T, width, vectors> block = {};
      accumulate<Term::product, T, width, vectors>(
          tile + i, depth, columns + first * depth, block);
      T* target = projected + first * tile_points + i;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          store(target + c * tile_points + v * lanes<T>, block[c][v]);
        }
      }
    });
  });
}

template <typename T>
void deal_rows(
    const T* tile,
    int64_t depth,
    const int64_t* columns,
    const uint64_t* signs,
    int64_t deals,
    T* block) {
  for (int64_t k = 0; k < depth; ++k) {
    const T* from = tile + k * tile_points;
    for (int64_t j = 0; j < deals; ++j) {
      const T sign = signs[k] >> j & 1 ? 1 : -1;
      T* to = block + columns[k * deals + j] * tile_points;
      for (int64_t i = 0; i < tile_points; i += lanes<T>) {
        store(to + i, load(to + i) + sign * load(from + i));
      }
    }
  }
}

/// Fetches the block of a tile that sums of products will be added to: from far
/// away where the matrix is large.
template <int width, int vectors, typename T>
KDCI_INLINE void prefetch_block(const T* target) {
#pragma GCC unroll 6
  for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(target + c * tile_points + v * lanes<T>, 1);
    }
  }
}

template <typename T>
void add_products(
    const T* rows,
    int64_t n,
    int64_t stride,
    int64_t first,
    int64_t last,
    int64_t column,
    int64_t count,
    T* tile,
    bool accumulated) {
  for_blocks<T>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(
        last - first, [&](auto group, int64_t offset) KDCI_ALWAYS_INLINE {
          constexpr int vectors = decltype(size)::value;
          constexpr int width = decltype(group)::value;
          T* target = tile + (first + offset) * tile_points + i;
          prefetch_block<width, vectors>(target);
          Block<T, width, vectors> block = {};
          accumulate<Term::product, T, width, vectors>(
              rows + column + i,
              n,
              rows + first + offset,
              block,
              stride,
              stride);
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
              T* to = target + c * tile_points + v * lanes<T>;
              store(to, accumulated ? load(to) + block[c][v] : block[c][v]);
            }
          }
        });
  });
}

/// Values of type T as vectors of Sum.
template <typename Sum, typename T>
KDCI_INLINE Vec<Sum> load_as(const T* from) {
  if constexpr (sizeof(Sum) == sizeof(T)) {
    return load(from);
  } else {
    return widen(from);
  }
}

/// Sums of products of coordinates i..i+rows of `a` and j..j+columns of `b`.
template <typename Sum, int rows, int columns, typename T>
void inner_block(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    double* products,
    int64_t stride) {
  Vec<Sum> sums[rows][columns] = {};
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t lane = 0; lane < tile_points; lane += lanes<Sum>) {
      const int64_t at = tile * depth * tile_points + lane;
      Vec<Sum> right[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) {
        right[c] = load_as<Sum>(b + at + c * tile_points);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const Vec<Sum> left = load_as<Sum>(a + at + r * tile_points);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) {
          sums[r][c] += left * right[c];
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      double sum = 0;
      for (int64_t j = 0; j < lanes<Sum>; ++j) {
        sum += sums[r][c][j];
      }
      products[r * stride + c] = sum;
    }
  }
}

template <typename T>
void inner_products(
    const T* a,
    const T* b,
    int64_t num_tiles,
    int64_t depth,
    bool precise,
    double* products) {
  constexpr int rows = vector_bytes == 64 ? 6 : 3;
  constexpr int columns = 4;
  const auto compute = precise ? inner_block<double, rows, columns, T>
                               : inner_block<T, rows, columns, T>;
  for (int64_t i = 0; i < depth; i += rows) {
    for (int64_t j = 0; j < i + rows; j += columns) {
      compute(
          a + i * tile_points,
          b + j * tile_points,
          num_tiles,
          depth,
          products + i * depth + j,
          depth);
    }
  }
}

#if defined(__AVX512VNNI__)

// -- Integers ----------------------------------------------------------------

/// A row's value at k, up to 16 of them, as integers; zeros past its end.
KDCI_INLINE __m512i rounded_row(
    const float* row,
    int64_t d,
    int64_t k,
    const float* shift,
    float scale,
    const float* factor) {
  const __mmask16 inside = d - k < 16 ? (1 << (d - k)) - 1 : 0xffff;
  const auto at = [&](const float* from) KDCI_ALWAYS_INLINE {
    return (Vec<float>)_mm512_maskz_loadu_ps(inside, from + k);
  };
  return _mm512_cvtps_epi32(
      (__m512)((at(row) * scale - at(shift)) * at(factor)));
}

/// Four vectors of integers as one of bytes, the first ones lowest; those that
/// no byte holds are cut off.
KDCI_INLINE __m512i join_quads(const __m512i (&rows)[4]) {
  const __m512i bytes = _mm512_packs_epi16(
      _mm512_packs_epi32(rows[0], rows[1]),
      _mm512_packs_epi32(rows[2], rows[3]));
  return _mm512_shuffle_epi8(
      bytes, _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
}

template <Packing packing>
constexpr int rows_of_word = packing == Packing::quads ? 4 : 2;

template <Packing packing>
void center_words(
    const float* rows,
    int64_t n,
    int64_t d,
    const float* shift,
    float scale,
    const float* factor,
    uint32_t* words,
    int64_t stride) {
  constexpr int count = rows_of_word<packing>;
  for (int64_t i = 0; i < n; i += count) {
    for (int64_t k = 0; k < d; k += lanes<float>) {
      __m512i rounded[count];
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        rounded[r] = i + r < n
            ? rounded_row(rows + (i + r) * d, d, k, shift, scale, factor)
            : _mm512_setzero_si512();
      }
      __m512i joined;
      if constexpr (packing == Packing::quads) {
        joined = join_quads(rounded);
      } else {
        joined = join_pairs(rounded[0], rounded[1]);
      }
      _mm512_storeu_si512(words + i / count * stride + k, joined);
    }
  }
}

template <Packing packing>
void add_magnitudes(
    const uint32_t* words,
    int64_t n,
    int64_t stride,
    int64_t d,
    int64_t* sums) {
  const int64_t num_words =
      (n + rows_of_word<packing> - 1) / rows_of_word<packing>;
  for_blocks<float>(d, [&](auto size, int64_t k) KDCI_ALWAYS_INLINE {
    constexpr int vectors = decltype(size)::value;
    Vec<int32_t> added[vectors] = {};
    for (int64_t i = 0; i < num_words; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const __m512i values =
            _mm512_loadu_si512(words + i * stride + k + v * lanes<float>);
        const auto sum = (__m512i)added[v];
        added[v] = packing == Packing::quads
            ? (Vec<int32_t>)_mm512_dpbusd_epi32(
                  sum, _mm512_abs_epi8(values), _mm512_set1_epi8(1))
            : (Vec<int32_t>)_mm512_dpwssd_epi32(
                  sum, _mm512_abs_epi16(values), _mm512_set1_epi16(1));
      }
    }
    for (int64_t j = 0; j < vectors * lanes<float>; ++j) {
      sums[k + j] += added[j / lanes<float>][j % lanes<float>];
    }
  });
}

/// What accumulate_words adds to the products with `count` columns of quads,
/// with the sign changed.
KDCI_INLINE void offset_sums(
    const uint32_t* columns,
    int64_t num_words,
    int64_t stride,
    int64_t count,
    int32_t* offsets) {
  for_blocks<float>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    constexpr int vectors = decltype(size)::value;
    __m512i sums[vectors] = {};
    for (int64_t k = 0; k < num_words; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[v] = _mm512_dpbusd_epi32(
            sums[v],
            _mm512_set1_epi8(-128),
            _mm512_loadu_si512(columns + k * stride + i + v * lanes<float>));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      store(offsets + i + v * lanes<float>, -(Vec<int32_t>)sums[v]);
    }
  });
}

template <Packing packing>
void add_word_products(
    const uint32_t* words,
    int64_t n,
    int64_t stride,
    int64_t first,
    int64_t last,
    int64_t column,
    int64_t count,
    const float* unit,
    float* tile,
    bool accumulated) {
  constexpr int rows = rows_of_word<packing>;
  constexpr int64_t span = 16 * group_columns;
  const int64_t num_words = (n + rows - 1) / rows;
  for (; first < last; first += span) {
    const int64_t columns = last - first < span ? last - first : span;
    int32_t offsets[span + block_points<float>] = {};
    if constexpr (packing == Packing::quads) {
      offset_sums(words + first, num_words, stride, columns, offsets);
    }
    for_blocks<float>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
      for_groups(columns, [&](auto group, int64_t offset) KDCI_ALWAYS_INLINE {
        constexpr int vectors = decltype(size)::value;
        constexpr int width = decltype(group)::value;
        float* target = tile + (first + offset) * tile_points + i;
        prefetch_block<width, vectors>(target);
        Block<int32_t, width, vectors> block;
#pragma GCC unroll 6
        for (int c = 0; c < width; ++c) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            block[c][v] = broadcast(offsets[offset + c]);
          }
        }
        accumulate_words<packing, width, vectors>(
            words + column + i,
            num_words,
            words + first + offset,
            block,
            stride,
            stride);
#pragma GCC unroll 6
        for (int c = 0; c < width; ++c) {
          const float row_unit = unit[first + offset + c];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            float* to = target + c * tile_points + v * lanes<float>;
            const Vec<float> sum =
                __builtin_convertvector(block[c][v], Vec<float>) * row_unit *
                load(unit + column + i + v * lanes<float>);
            store(to, accumulated ? load(to) + sum : sum);
          }
        }
      });
    });
  }
}

template <Packing packing>
constexpr WordKernels word_kernels = {
    rows_of_word<packing>,
    center_words<packing>,
    add_magnitudes<packing>,
    add_word_products<packing>,
};

void round_pair_tile(
    const float* tile,
    int64_t depth,
    float factor,
    uint32_t* pairs) {
  round_to_pairs(tile, tile_points, depth, factor, pairs);
}

void pack_pair_block(
    const float* block,
    int64_t num_tiles,
    int64_t width,
    int64_t size,
    uint32_t* pairs,
    float* unscale) {
  const int64_t half = (size + 1) / 2;
  for (int64_t first = 0; first < width; first += group_columns) {
    const int64_t columns =
        width - first < group_columns ? width - first : group_columns;
    for (int64_t c = 0; c < columns; ++c) {
      const float* column = block + (first + c) * tile_points;
      Vec<float> squares = {};
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        for (int64_t i = 0; i < tile_points; i += lanes<float>) {
          const Vec<float> value =
              load(column + tile * width * tile_points + i);
          squares += value * value;
        }
      }
      float square = 0;
      for (int64_t j = 0; j < lanes<float>; ++j) {
        square += squares[j];
      }
      const float length = __builtin_sqrtf(square);
      // A column that vanishes stays zero.
      const float factor = length > 1e-30f ? 32000 / length : 0;
      unscale[first + c] = length / 32000;
      uint32_t* to = pairs + c;
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t left = size - tile * tile_points;
        const int64_t count = left < tile_points ? left : tile_points;
        for (int64_t i = 0; i < count; i += lanes<float>) {
          const Vec<float> value =
              load(column + tile * width * tile_points + i) * factor;
          uint32_t lane_pairs[8];
          _mm256_storeu_si256(
              (__m256i*)lane_pairs,
              _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)value)));
          const int64_t used =
              (count - i + 1) / 2 < 8 ? (count - i + 1) / 2 : 8;
          for (int64_t j = 0; j < used; ++j) {
            *to = lane_pairs[j];
            to += columns;
          }
        }
      }
    }
    pairs += half * columns;
  }
}

void project_pair_tile(
    const uint32_t* tile,
    int64_t count,
    int64_t depth,
    const uint32_t* columns,
    int64_t q,
    float factor,
    const float* unscale,
    float* projected) {
  const int64_t half = (depth + 1) / 2;
  for_blocks<float>(count, [&](auto size, int64_t i) KDCI_ALWAYS_INLINE {
    for_groups(q, [&](auto group, int64_t first) KDCI_ALWAYS_INLINE {
      constexpr int vectors = decltype(size)::value;
      constexpr int width = decltype(group)::value;
      Block<int32_t, width, vectors> block = {};
      accumulate_words<Packing::pairs, width, vectors>(
          tile + i, half, columns + first * half, block);
      float* target = projected + first * tile_points + i;
#pragma GCC unroll 6
      for (int c = 0; c < width; ++c) {
        const float unit = factor * unscale[first + c];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          store(
              target + c * tile_points + v * lanes<float>,
              __builtin_convertvector(block[c][v], Vec<float>) * unit);
        }
      }
    });
  });
}

#endif

template <typename T>
constexpr SubspaceKernels<T> table = {
    project_tile<T>,
    deal_rows<T>,
    add_products<T>,
    inner_products<T>,
};

} // namespace

#if defined(__AVX512VNNI__)
extern const IntegerKernels integer_kernels = {
    word_kernels<Packing::pairs>,
    word_kernels<Packing::quads>,
    round_pair_tile,
    pack_pair_block,
    project_pair_tile,
};
#else
extern const IntegerKernels integer_kernels = {};
#endif
extern const SubspaceKernels<float> subspace_kernels_float = table<float>;
extern const SubspaceKernels<double> subspace_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
