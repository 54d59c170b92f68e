// SPDX-License-Identifier: Apache-2.0
//
// A register-tiled product of packed panels (Goto & van de Geijn, ACM TOMS
// 2008). A block of B is packed into panels that stay in the second-level
// cache; a panel of A, packed just before its use, in the first-level one.
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

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename T>
struct Workspace {
  alignas(64) T a[block_depth<T> * tile_rows];
  alignas(64) T b[block_depth<T> * block_columns<T>];
};

template <typename T>
thread_local Workspace<T> workspace;

// to[k * width + p] = from[p * p_stride + k] for p < count, and 0 for count <=
// p < width, a multiple of lanes<T>: by squares that are transposed in
// registers.
template <typename T>
void pack_rows(
    int64_t width,
    int64_t count,
    int64_t depth,
    const T* from,
    int64_t p_stride,
    T* to) {
  for (int64_t p = 0; p < width; p += lanes<T>) {
    for (int64_t k = 0; k < depth; k += lanes<T>) {
      Vec<T> square[lanes<T>] = {};
      for (int64_t i = 0; i < lanes<T> && p + i < count; ++i) {
        square[i] = load_up_to(from + (p + i) * p_stride + k, depth - k, T(0));
      }
      transpose<lanes<T> / 2, T>(square);
      for (int64_t i = 0; i < lanes<T> && k + i < depth; ++i) {
        store(to + (k + i) * width + p, square[i]);
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
    pack_rows(width, count, depth, from, p_stride, to);
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const T* source = from + k * k_stride;
    T* target = to + k * width;
    const T factor = factors != nullptr ? factors[k] : 1;
    int64_t p = 0;
    for (; p_stride == 1 && p + lanes<T> <= count; p += lanes<T>) {
      store(target + p, factor * load(source + p));
    }
    for (; p < count; ++p) {
      target[p] = factor * source[p * p_stride];
    }
    for (; p < width; ++p) {
      target[p] = 0;
    }
  }
}

// One tile of C, of which `rows` x `columns` exist, from a packed panel of B
// and the tile's rows of A.
template <int vectors, typename T>
void multiply_tile(
    int64_t depth,
    const T* a,
    int64_t a_row,
    int64_t a_col,
    const T* b,
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
      b_row[v] = load(b + k * width + v * lanes<T>);
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
  // A tile that sticks out of C is added up in a copy.
  T copy[tile_rows * width];
  const bool sticks_out = rows < tile_rows || columns < width;
  T* to = sticks_out ? copy : c;
  const int64_t to_row = sticks_out ? width : c_row;
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Vec<T> value = sum[i][v];
      if (!sticks_out && accumulate) {
        value = load(c + i * c_row + v * lanes<T>) + value;
      }
      if (!sticks_out && addend != nullptr) {
        value += load(addend + i * c_row + v * lanes<T>);
      }
      store(to + i * to_row + v * lanes<T>, value);
    }
  }
  for (int64_t i = 0; sticks_out && i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += lanes<T>) {
      T* target = c + i * c_row + j;
      Vec<T> value = load(copy + i * width + j);
      if (accumulate) {
        value = load_up_to(target, columns - j, T(0)) + value;
      }
      if (addend != nullptr) {
        value += load_up_to(addend + i * c_row + j, columns - j, T(0));
      }
      store_up_to(target, columns - j, value);
    }
  }
}

// The columns of C that a tile turned on its side has at most: where the last
// columns would leave most of a vector empty, the vectors hold rows.
constexpr int turned_columns = vector_bytes == 64 ? 12 : 4;

// A product of up to turned_columns columns and of rows that fill pairs of
// vectors, where the columns of A are contiguous.
template <typename T>
void multiply_turned(const Product<T>& of) {
  constexpr int64_t height = 2 * lanes<T>;
  T* packed = workspace<T>.b;
  for (int64_t k0 = 0; k0 < of.depth; k0 += block_depth<T>) {
    const int64_t depth = smaller(block_depth<T>, of.depth - k0);
    pack(
        turned_columns,
        of.n,
        depth,
        of.b + k0 * of.b_row,
        of.b_col,
        of.b_row,
        of.factors != nullptr ? of.factors + k0 : nullptr,
        packed);
    const bool add = of.accumulate || k0 > 0;
    const bool ends = of.addend != nullptr && k0 + depth == of.depth;
    for (int64_t i = 0; i < of.m; i += height) {
      const T* a = of.a + k0 * of.a_col + i;
      Vec<T> sum[turned_columns][2] = {};
      for (int64_t k = 0; k < depth; ++k) {
        const Vec<T> a0 = load(a + k * of.a_col);
        const Vec<T> a1 = load(a + k * of.a_col + lanes<T>);
#pragma GCC unroll 12
        for (int j = 0; j < turned_columns; ++j) {
          const Vec<T> b_value = broadcast(packed[k * turned_columns + j]);
          sum[j][0] += a0 * b_value;
          sum[j][1] += a1 * b_value;
        }
      }
      alignas(64) T turned[turned_columns][height];
#pragma GCC unroll 12
      for (int j = 0; j < turned_columns; ++j) {
        store(turned[j], sum[j][0]);
        store(turned[j] + lanes<T>, sum[j][1]);
      }
      for (int64_t r = 0; r < height; ++r) {
        const int64_t row = (i + r) * of.c_row;
        for (int64_t j = 0; j < of.n; ++j) {
          const T value = add ? of.c[row + j] + turned[j][r] : turned[j][r];
          of.c[row + j] = ends ? value + of.addend[row + j] : value;
        }
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
      // All panels before one are full, so it starts at column * depth.
      for (int64_t j = 0; j < columns; j += tile_vectors * lanes<T>) {
        const int64_t width = panel_width<T>(columns - j);
        pack(
            width,
            smaller(width, columns - j),
            depth,
            of.b + k0 * of.b_row + (j0 + j) * of.b_col,
            of.b_col,
            of.b_row,
            of.factors != nullptr ? of.factors + k0 : nullptr,
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
          const auto tile = width == lanes<T> ? multiply_tile<1, T>
              : width == 2 * lanes<T>         ? multiply_tile<2, T>
                                              : multiply_tile<tile_vectors, T>;
          tile(
              depth,
              in_place ? from : packed.a,
              in_place ? of.a_row : 1,
              in_place ? of.a_col : tile_rows,
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
void multiply(const Product<T>& product) {
  const int64_t last = product.n % lanes<T>;
  const int64_t turned = product.m / (2 * lanes<T>)*(2 * lanes<T>);
  Product<T> rest = product;
  if (product.a_row == 1 && 0 < last && last <= turned_columns && turned > 0 &&
      product.depth > 0) {
    rest.n -= last;
    Product<T> side = product.columns_from(rest.n);
    if (turned < product.m) {
      multiply_tiles(side.rows_from(turned));
    }
    side.m = turned;
    multiply_turned(side);
  }
  if (rest.n > 0) {
    multiply_tiles(rest);
  }
}

} // namespace

extern const GemmKernels<float> gemm_kernels_float = {multiply<float>};
extern const GemmKernels<double> gemm_kernels_double = {multiply<double>};

} // namespace kdci::KDCI_SIMD
