// SPDX-License-Identifier: Apache-2.0
//
// Matrix products on one thread, for callers that split the rows or columns of
// the result among threads themselves.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

template <typename T>
struct GemmKernels {
  void (*multiply)(
      int64_t m,
      int64_t n,
      int64_t depth,
      const T* a,
      int64_t a_row,
      int64_t a_col,
      const T* b,
      int64_t b_row,
      int64_t b_col,
      const T* factors,
      T* c,
      int64_t c_row,
      bool accumulate,
      const T* addend);
};

KDCI_DECLARE_PER_TYPE(GemmKernels, gemm_kernels)

/// C[i * c_row + j] (+)= sum_k A[i * a_row + k * a_col] * B[k * b_row + j *
/// b_col] for i < m, j < n, k < depth; with `factors` [depth] row k of B counts
/// factors[k] times, and `addend`, stored like C and apart from it, is added
/// last. A transpose is a swap of strides. An element's value
/// depends on neither m, n nor its position, so products computed in pieces are
/// bitwise those computed whole.
template <typename T>
static inline void gemm(
    int64_t m,
    int64_t n,
    int64_t depth,
    const T* a,
    int64_t a_row,
    int64_t a_col,
    const T* b,
    int64_t b_row,
    int64_t b_col,
    T* c,
    int64_t c_row,
    bool accumulate,
    const T* factors = nullptr,
    const T* addend = nullptr) {
  gemm_kernels<T>().multiply(
      m,
      n,
      depth,
      a,
      a_row,
      a_col,
      b,
      b_row,
      b_col,
      factors,
      c,
      c_row,
      accumulate,
      addend);
}

} // namespace kdci
