// SPDX-License-Identifier: Apache-2.0
//
// A register-tiled product of packed panels (Goto & van de Geijn, ACM TOMS
// 2008). A block of B is packed into panels that stay in the second-level
// cache; a panel of A, packed just before its use, in the first-level one.
// Where either is contiguous along the right way, A is read where it lies, and
// B is packed by the first tiles that need it.
#include "gemm.h"

#include "transpose.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

// The accumulators of a tile of tile_rows x tile_vectors vectors must fit into
// the registers (32, or 16 before AVX-512) beside one row of B.
constexpr int tile_rows = vector_bytes == 64 ? 8 : 4;
constexpr int tile_vectors = vector_bytes == 16 ? 2 : 3;

// Blocks of B: block_depth x block_columns, 384 KiB; whole panels.
template <typename T>
constexpr int64_t block_depth = 1024 / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t block_columns = 1536 / static_cast<int64_t>(sizeof(T));

// Rows of B that are fetched ahead of the one that is being packed.
constexpr int64_t rows_ahead = 8;

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename T>
struct Workspace {
  alignas(64) T a[block_depth<T> * tile_rows];
  alignas(64) T b[block_depth<T> * block_columns<T>];
};

template <typename T>
thread_local Workspace<T> workspace;

// to[k * to_stride + p] = from[p * p_stride + k] for p < count, and 0 for count
// <= p < width, a multiple of lanes<T>: by squares that are transposed in
// registers.
template <typename T>
void pack_rows(
    int64_t width,
    int64_t count,
    int64_t depth,
    const T* from,
    int64_t p_stride,
    T* to,
    int64_t to_stride) {
  for (int64_t p = 0; p < width; p += lanes<T>) {
    for (int64_t k = 0; k < depth; k += lanes<T>) {
      Vec<T> square[lanes<T>] = {};
      for (int64_t i = 0; i < lanes<T> && p + i < count; ++i) {
        square[i] = load_up_to(from + (p + i) * p_stride + k, depth - k, T(0));
      }
      transpose<lanes<T> / 2, T>(square);
      for (int64_t i = 0; i < lanes<T> && k + i < depth; ++i) {
        store(to + (k + i) * to_stride + p, square[i]);
      }
    }
  }
}

// to[k * width + p] = from[p * p_stride + k * k_stride] for p < count, and 0
// for count <= p < width; times factors[k] unless that is null.
template <typename T>
void pack(
    int64_t width,
    int64_t count,
    int64_t depth,
    const T* from,
    int64_t p_stride,
    int64_t k_stride,
    const T* factors,
    T* to) {
  if (p_stride != 1 && k_stride == 1 && width % lanes<T> == 0 &&
      factors == nullptr) {
    pack_rows(width, count, depth, from, p_stride, to, width);
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T* source = from + k * k_stride;
    T* target = to + k * width;
    const T factor = factors != nullptr ? factors[k] : 1;
    int64_t p = 0;
    for (; p_stride == 1 && p < width; p += lanes<T>) {
      const Vec<T> values =
          p < count ? load_up_to(source + p, count - p, T(0)) : Vec<T>{};
      store_up_to(target + p, width - p, factor * values);
    }
    for (; p < count; ++p) {
      target[p] = factor * source[p * p_stride];
    }
    for (; p < width; ++p) {
      target[p] = 0;
    }
  }
}

// The first `count` values of a row of C, or all.
template <typename T>
inline void put(
    Vec<T> value,
    int64_t count,
    T* c,
    bool accumulate,
    const T* addend) {
  if (accumulate) {
    value = load_up_to(c, count, T(0)) + value;
  }
  if (addend != nullptr) {
    value += load_up_to(addend, count, T(0));
  }
  store_up_to(c, count, value);
}

// One tile of C, of which `rows` x `columns` exist, from a packed panel of B
// and the tile's rows of A. With `packs` the panel is read from B, of rows
// b_stride apart, and packed on the way.
template <int vectors, bool packs, typename T>
void multiply_tile(
    int64_t depth,
    const T* a,
    int64_t a_row,
    int64_t a_col,
    const T* b,
    int64_t b_stride,
    T* packed,
    T* c,
    int64_t c_row,
    int64_t rows,
    int64_t columns,
    bool accumulate,
    const T* addend) {
  constexpr int64_t width = vectors * lanes<T>;
  Vec<T> sum[tile_rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b_row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* at = packed + k * width + v * lanes<T>;
      if constexpr (packs) {
        const T* from = b + k * b_stride + v * lanes<T>;
        __builtin_prefetch(from + rows_ahead * b_stride);
        b_row[v] = load(from);
        store(at, b_row[v]);
      } else {
        b_row[v] = load(at);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const Vec<T> a_value = broadcast(a[i * a_row + k * a_col]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sum[i][v] += a_value * b_row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
    if (i == rows) {
      return;
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = i * c_row + v * lanes<T>;
      put<T>(
          sum[i][v],
          columns - v * lanes<T>,
          c + at,
          accumulate,
          addend != nullptr ? addend + at : nullptr);
    }
  }
}

// Where the last columns of C would leave most of a vector empty, the vectors
// hold rows instead, or terms of a sum. These are the columns at most.
constexpr int64_t most_columns = vector_bytes == 64 ? 12 : 4;
template <typename T>
constexpr int64_t side_columns = smaller(most_columns, lanes<T> - 1);

// Sums of fewer vectors cost more to add up in the end than they save.
constexpr int64_t least_dot_vectors = 4;

// A product of up to `most` columns and of rows that fill pairs of vectors,
// where the columns of A are contiguous.
template <int most, typename T>
void multiply_turned(const Product<T>& of) {
  constexpr int width = smaller(most, side_columns<T>);
  T* packed = workspace<T>.b;
  for (int64_t k0 = 0; k0 < of.depth; k0 += block_depth<T>) {
    const int64_t depth = smaller(block_depth<T>, of.depth - k0);
    pack<T>(
        width,
        of.n,
        depth,
        of.b + k0 * of.b_row,
        of.b_col,
        of.b_row,
        of.factors != nullptr ? of.factors + k0 : nullptr,
        packed);
    const bool add = of.accumulate || k0 > 0;
    const bool ends = of.addend != nullptr && k0 + depth == of.depth;
    for (int64_t i = 0; i < of.m; i += 2 * lanes<T>) {
      const T* a = of.a + k0 * of.a_col + i;
      Vec<T> sum[2][lanes<T>] = {};
      for (int64_t k = 0; k < depth; ++k) {
        const Vec<T> a0 = load(a + k * of.a_col);
        const Vec<T> a1 = load(a + k * of.a_col + lanes<T>);
#pragma GCC unroll 12
        for (int j = 0; j < width; ++j) {
          const Vec<T> b_value = broadcast(packed[k * width + j]);
          sum[0][j] += a0 * b_value;
          sum[1][j] += a1 * b_value;
        }
      }
      for (int64_t half = 0; half < 2; ++half) {
        transpose<lanes<T> / 2, T>(sum[half]);
        for (int64_t r = 0; r < lanes<T>; ++r) {
          const int64_t at = (i + half * lanes<T> + r) * of.c_row;
          put<T>(
              sum[half][r],
              of.n,
              of.c + at,
              add,
              ends ? of.addend + at : nullptr);
        }
      }
    }
  }
}

// A product of up to `most` columns, where the rows of A are contiguous.
template <int most, typename T>
void multiply_dots(const Product<T>& of) {
  constexpr int width = smaller(most, side_columns<T>);
  constexpr int rows_at_once = 2;
  Workspace<T>& packed = workspace<T>;
  for (int64_t k0 = 0; k0 < of.depth; k0 += block_depth<T>) {
    const int64_t depth = smaller(block_depth<T>, of.depth - k0);
    const int64_t padded = (depth + lanes<T> - 1) / lanes<T> * lanes<T>;
    const T* b = of.b + k0 * of.b_row;
    // A vector of each column after the other, filled up with zeros.
    for (int64_t k = 0; k < depth; k += lanes<T>) {
      Vec<T> square[lanes<T>] = {};
      for (int64_t i = 0; i < lanes<T> && k + i < depth; ++i) {
        square[i] = load_first(b + (k + i) * of.b_row, of.n, T(0));
        if (of.factors != nullptr) {
          square[i] *= of.factors[k0 + k + i];
        }
      }
      transpose<lanes<T> / 2, T>(square);
#pragma GCC unroll 12
      for (int j = 0; j < width; ++j) {
        store(packed.b + k * width + j * lanes<T>, square[j]);
      }
    }
    const bool add = of.accumulate || k0 > 0;
    const bool ends = of.addend != nullptr && k0 + depth == of.depth;
    for (int64_t i = 0; i < of.m; i += rows_at_once) {
      const T* a[rows_at_once];
      for (int64_t r = 0; r < rows_at_once; ++r) {
        a[r] = of.a + smaller(i + r, of.m - 1) * of.a_row + k0;
        for (int64_t k = 0; k < depth && padded > depth; k += lanes<T>) {
          store(
              packed.a + r * padded + k, load_up_to(a[r] + k, depth - k, T(0)));
        }
        a[r] = padded > depth ? packed.a + r * padded : a[r];
      }
      Vec<T> sum[rows_at_once][lanes<T>] = {};
      for (int64_t k = 0; k < depth; k += lanes<T>) {
        const Vec<T> a0 = load(a[0] + k);
        const Vec<T> a1 = load(a[1] + k);
#pragma GCC unroll 12
        for (int j = 0; j < width; ++j) {
          const Vec<T> column =
              in_register<T>(load(packed.b + k * width + j * lanes<T>));
          sum[0][j] += a0 * column;
          sum[1][j] += a1 * column;
        }
      }
      for (int64_t r = 0; r < rows_at_once && i + r < of.m; ++r) {
        sum_rows<lanes<T> / 2, T>(sum[r]);
        const int64_t at = (i + r) * of.c_row;
        put<T>(
            sum[r][0], of.n, of.c + at, add, ends ? of.addend + at : nullptr);
      }
    }
  }
}

template <typename T>
constexpr int64_t panel_width(int64_t columns) {
  const int64_t vectors = (columns + lanes<T> - 1) / lanes<T>;
  return (vectors < tile_vectors ? vectors : tile_vectors) * lanes<T>;
}

template <typename T>
void multiply_tiles(const Product<T>& of) {
  for (int64_t i = 0; of.depth == 0 && i < of.m; ++i) {
    for (int64_t j = 0; j < of.n; ++j) {
      const int64_t at = i * of.c_row + j;
      const T value = of.accumulate ? of.c[at] : 0;
      of.c[at] = of.addend != nullptr ? value + of.addend[at] : value;
    }
  }
  Workspace<T>& packed = workspace<T>;
  for (int64_t j0 = 0; j0 < of.n; j0 += block_columns<T>) {
    const int64_t columns = smaller(block_columns<T>, of.n - j0);
    for (int64_t k0 = 0; k0 < of.depth; k0 += block_depth<T>) {
      const int64_t depth = smaller(block_depth<T>, of.depth - k0);
      const T* b = of.b + k0 * of.b_row + j0 * of.b_col;
      const T* factors = of.factors != nullptr ? of.factors + k0 : nullptr;
      // Panels that are packed by the tiles of the first rows.
      const int64_t on_the_way = of.b_col == 1 && factors == nullptr
          ? columns / (tile_vectors * lanes<T>)*(tile_vectors * lanes<T>)
          : 0;
      // All panels before one are full, so it starts at column * depth.
      for (int64_t j = on_the_way; j < columns; j += tile_vectors * lanes<T>) {
        const int64_t width = panel_width<T>(columns - j);
        pack(
            width,
            smaller(width, columns - j),
            depth,
            b + j * of.b_col,
            of.b_col,
            of.b_row,
            factors,
            packed.b + j * depth);
      }
      const bool add = of.accumulate || k0 > 0;
      const bool ends = of.addend != nullptr && k0 + depth == of.depth;
      for (int64_t i = 0; i < of.m; i += tile_rows) {
        const int64_t rows = smaller(tile_rows, of.m - i);
        const T* from = of.a + i * of.a_row + k0 * of.a_col;
        const bool in_place =
            rows == tile_rows && (of.a_col == 1 || of.a_row == 1);
        if (!in_place) {
          pack<T>(
              tile_rows,
              rows,
              depth,
              from,
              of.a_row,
              of.a_col,
              nullptr,
              packed.a);
        }
        for (int64_t j = 0; j < columns; j += tile_vectors * lanes<T>) {
          const int64_t width = panel_width<T>(columns - j);
          const int64_t at = i * of.c_row + j0 + j;
          const bool packs = i == 0 && j < on_the_way;
          const auto tile = packs     ? multiply_tile<tile_vectors, true, T>
              : width == lanes<T>     ? multiply_tile<1, false, T>
              : width == 2 * lanes<T> ? multiply_tile<2, false, T>
                                      : multiply_tile<tile_vectors, false, T>;
          tile(
              depth,
              in_place ? from : packed.a,
              in_place ? of.a_row : 1,
              in_place ? of.a_col : tile_rows,
              b + j,
              of.b_row,
              packed.b + j * depth,
              of.c + at,
              of.c_row,
              rows,
              smaller(width, columns - j),
              add,
              ends ? of.addend + at : nullptr);
        }
      }
    }
  }
}

template <typename T>
struct SideKernels {
  void (*turned)(const Product<T>& product);
  void (*dots)(const Product<T>& product);
};

// 10: the classes that most sets of small images have.
template <typename T>
SideKernels<T> side_kernels(int64_t columns) {
  return columns <= 4
      ? SideKernels<T>{multiply_turned<4, T>, multiply_dots<4, T>}
      : columns <= 8
      ? SideKernels<T>{multiply_turned<8, T>, multiply_dots<8, T>}
      : columns <= 10
      ? SideKernels<T>{multiply_turned<10, T>, multiply_dots<10, T>}
      : SideKernels<T>{
            multiply_turned<most_columns, T>, multiply_dots<most_columns, T>};
}

template <typename T>
void multiply(const Product<T>& product) {
  const int64_t last = product.n % lanes<T>;
  const bool narrow = 0 < last && last <= side_columns<T>;
  Product<T> rest = product;
  if (narrow && product.a_row == 1 && product.m >= 2 * lanes<T> &&
      product.depth > 0) {
    rest.n -= last;
    Product<T> side = product.columns_from(rest.n);
    side.m = product.m / (2 * lanes<T>)*(2 * lanes<T>);
    side_kernels<T>(last).turned(side);
    if (side.m < product.m) {
      multiply_tiles(product.columns_from(rest.n).rows_from(side.m));
    }
  } else if (
      narrow && product.a_col == 1 && product.b_col == 1 &&
      product.depth >= least_dot_vectors * lanes<T>) {
    rest.n -= last;
    side_kernels<T>(last).dots(product.columns_from(rest.n));
  }
  if (rest.n > 0) {
    multiply_tiles(rest);
  }
}

template <typename T>
void turn(
    int64_t m,
    int64_t n,
    const T* from,
    int64_t from_row,
    T* to,
    int64_t to_row) {
  pack_rows(m, m, n, from, from_row, to, to_row);
}

template <typename T>
constexpr GemmKernels<T> table = {multiply<T>, turn<T>};

} // namespace

extern const GemmKernels<float> gemm_kernels_float = table<float>;
extern const GemmKernels<double> gemm_kernels_double = table<double>;

} // namespace kdci::KDCI_SIMD
