// SPDX-License-Identifier: Apache-2.0
//
// Matrix products on one thread, for callers that split the rows or columns of
// the result among threads themselves.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

/// C[i * c_row + j] (+)= sum_k A[i * a_row + k * a_col] * B[k * b_row + j *
/// b_col] for i < m, j < n, k < depth. A transpose is a swap of strides.
template <typename T>
struct Product {
  int64_t m;
  int64_t n;
  int64_t depth;
  const T* a;
  int64_t a_row;
  int64_t a_col;
  const T* b;
  int64_t b_row;
  int64_t b_col;
  T* c;
  int64_t c_row;
  bool accumulate;
  const T* factors = nullptr; // [depth], of the rows of B
  const T* addend = nullptr;  // stored like C and apart from it, added last

  /// The product without its first rows or columns.
  Product rows_from(int64_t row) const {
    Product rest = *this;
    rest.m -= row;
    rest.a += row * a_row;
    rest.c += row * c_row;
    rest.addend = addend != nullptr ? addend + row * c_row : nullptr;
    return rest;
  }

  Product columns_from(int64_t column) const {
    Product rest = *this;
    rest.n -= column;
    rest.b += column * b_col;
    rest.c += column;
    rest.addend = addend != nullptr ? addend + column : nullptr;
    return rest;
  }
};

template <typename T>
struct GemmKernels {
  void (*multiply)(const Product<T>& product);

  /// to [n, m] = the transpose of from [m, n], where m fills whole vectors.
  void (*turn)(
      int64_t m,
      int64_t n,
      const T* from,
      int64_t from_row,
      T* to,
      int64_t to_row);
};

KDCI_DECLARE_PER_TYPE(GemmKernels, gemm_kernels)

/// An element's value depends on neither m nor its position, so products
/// computed in pieces of rows are bitwise those computed whole. So are pieces
/// of columns, unless the rows of A and of B are contiguous: then the last
/// columns are summed in another order where they would leave most of a vector
/// empty.
template <typename T>
static inline void gemm(const Product<T>& product) {
  gemm_kernels<T>().multiply(product);
}

} // namespace kdci
