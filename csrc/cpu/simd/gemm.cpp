// SPDX-License-Identifier: Apache-2.0
//
// A register-tiled product of packed panels (Goto & van de Geijn, ACM TOMS
// 2008). A block of B is packed into panels that stay in the second-level
// cache; a panel of A, packed just before its use, in the first-level one.
#include "gemm.h"

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

template <typename T>
struct Workspace {
  alignas(64) T a[block_depth<T> * tile_rows];
  alignas(64) T b[block_depth<T> * block_columns<T>];
};

template <typename T>
thread_local Workspace<T> workspace;

// to[k * width + p] = factor * from[p * stride + k] for p, k < 4.
template <typename T>
inline void transpose_block(
    const T* from,
    int64_t stride,
    T factor,
    T* to,
    int64_t width) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T))));
  typedef T QuadAnywhere __attribute__((
      vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
  Quad row[4];
  for (int p = 0; p < 4; ++p) {
    row[p] = *reinterpret_cast<const QuadAnywhere*>(from + p * stride);
  }
  const Quad low02 = __builtin_shufflevector(row[0], row[2], 0, 4, 1, 5);
  const Quad high02 = __builtin_shufflevector(row[0], row[2], 2, 6, 3, 7);
  const Quad low13 = __builtin_shufflevector(row[1], row[3], 0, 4, 1, 5);
  const Quad high13 = __builtin_shufflevector(row[1], row[3], 2, 6, 3, 7);
  const Quad column[4] = {
      __builtin_shufflevector(low02, low13, 0, 4, 1, 5),
      __builtin_shufflevector(low02, low13, 2, 6, 3, 7),
      __builtin_shufflevector(high02, high13, 0, 4, 1, 5),
      __builtin_shufflevector(high02, high13, 2, 6, 3, 7)};
  for (int k = 0; k < 4; ++k) {
    *reinterpret_cast<QuadAnywhere*>(to + k * width) = factor * column[k];
  }
}

// to[k * width + p] = factor * from[p * p_stride + k * k_stride] for p < count,
// and 0 for count <= p < width. The factor is applied here and not to sums,
// since whether the compiler fuses that product with the addition to C could
// differ from one kind of tile to another.
template <typename T>
void pack(
    int64_t width,
    int64_t count,
    int64_t depth,
    T factor,
    const T* from,
    int64_t p_stride,
    int64_t k_stride,
    T* to) {
  int64_t transposed_rows = 0;
  int64_t transposed_depth = 0;
  if (p_stride != 1 && k_stride == 1) {
    transposed_rows = count / 4 * 4;
    transposed_depth = depth / 4 * 4;
    for (int64_t p = 0; p < transposed_rows; p += 4) {
      for (int64_t k = 0; k < transposed_depth; k += 4) {
        transpose_block(
            from + p * p_stride + k,
            p_stride,
            factor,
            to + k * width + p,
            width);
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t begin = k < transposed_depth ? transposed_rows : 0;
    const T* source = from + k * k_stride;
    T* target = to + k * width;
    if (p_stride == 1) {
      int64_t p = 0;
      for (; p + lanes<T> <= count; p += lanes<T>) {
        store(target + p, factor * load(source + p));
      }
      for (; p < count; ++p) {
        target[p] = factor * source[p];
      }
    } else {
      for (int64_t p = begin; p < count; ++p) {
        target[p] = factor * source[p * p_stride];
      }
    }
    for (int64_t p = count; p < width; ++p) {
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
    bool accumulate) {
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
  // A tile that sticks out of C goes through a copy.
  T copy[tile_rows * width];
  const bool sticks_out = rows < tile_rows || columns < width;
  T* to = sticks_out ? copy : c;
  const int64_t to_row = sticks_out ? width : c_row;
  if (sticks_out && accumulate) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        copy[i * width + j] = c[i * c_row + j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* target = to + i * to_row + v * lanes<T>;
      store(target, accumulate ? load(target) + sum[i][v] : sum[i][v]);
    }
  }
  if (sticks_out) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        c[i * c_row + j] = copy[i * width + j];
      }
    }
  }
}

template <typename T>
constexpr int64_t panel_width(int64_t columns) {
  const int64_t vectors = (columns + lanes<T> - 1) / lanes<T>;
  return (vectors < tile_vectors ? vectors : tile_vectors) * lanes<T>;
}

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename T>
void multiply(
    int64_t m,
    int64_t n,
    int64_t depth,
    T alpha,
    const T* a,
    int64_t a_row,
    int64_t a_col,
    const T* b,
    int64_t b_row,
    int64_t b_col,
    T* c,
    int64_t c_row,
    bool accumulate) {
  if (depth == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        c[i * c_row + j] = 0;
      }
    }
  }
  Workspace<T>& packed = workspace<T>;
  for (int64_t j0 = 0; j0 < n; j0 += block_columns<T>) {
    const int64_t j_count = smaller(block_columns<T>, n - j0);
    for (int64_t k0 = 0; k0 < depth; k0 += block_depth<T>) {
      const int64_t k_count = smaller(block_depth<T>, depth - k0);
      // All panels before one are full, so it starts at column * k_count.
      for (int64_t j = 0; j < j_count; j += tile_vectors * lanes<T>) {
        const int64_t width = panel_width<T>(j_count - j);
        const T* from = b + k0 * b_row + (j0 + j) * b_col;
        pack(
            width,
            smaller(width, j_count - j),
            k_count,
            T(1),
            from,
            b_col,
            b_row,
            packed.b + j * k_count);
      }
      const bool add = accumulate || k0 > 0;
      for (int64_t i = 0; i < m; i += tile_rows) {
        const int64_t rows = smaller(tile_rows, m - i);
        const T* from = a + i * a_row + k0 * a_col;
        // Packing pays where columns of A that lie apart are used again.
        const bool in_place = alpha == 1 && rows == tile_rows &&
            (a_col == 1 || j_count <= tile_vectors * lanes<T>);
        if (!in_place) {
          pack(tile_rows, rows, k_count, alpha, from, a_row, a_col, packed.a);
        }
        for (int64_t j = 0; j < j_count; j += tile_vectors * lanes<T>) {
          const int64_t width = panel_width<T>(j_count - j);
          const auto tile = width == lanes<T> ? multiply_tile<1, T>
              : width == 2 * lanes<T>         ? multiply_tile<2, T>
                                              : multiply_tile<tile_vectors, T>;
          tile(
              k_count,
              in_place ? from : packed.a,
              in_place ? a_row : 1,
              in_place ? a_col : tile_rows,
              packed.b + j * k_count,
              c + i * c_row + j0 + j,
              c_row,
              rows,
              smaller(width, j_count - j),
              add);
        }
      }
    }
  }
}

} // namespace

const GemmKernels gemm_kernels = {multiply<float>, multiply<double>};

} // namespace kdci::KDCI_SIMD
