// SPDX-License-Identifier: Apache-2.0
//
// Additive attention of B queries over K keys, score[b, i] = sum_h w_score[h] *
// tanh(query[b, h] + key[i, h]), forward and backward, with nothing of size
// B * K * H in memory and, nearly always, without a tanh:
//
//   tanh(a + b) = 1 - 2 / (1 + e^2a e^2b)
//
// needs (B + K) H exponentials, and one division serves two terms. The form is
// used for a block of queries where it is exact: where the exponentials
// stay in range, and where tanh is not so small throughout that 1 - 2 / (...)
// would lose its digits. Elsewhere, and in float64, tanh is computed directly.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

/// Rows of queries that are handled together.
constexpr int64_t attention_block = 16;

/// The keys as the kernels read them. H is padded with zeros to whole panels
/// of `panel_width` values, and stored by panels: [panels, K, panel_width].
template <typename T>
struct AttentionKeys {
  int64_t count;  // K
  int64_t hidden; // H
  int64_t panels;
  int64_t padded;   // panels * panel_width
  T* values;        // [panels, K, panel_width]
  T* exponentials;  // likewise, e^2key
  T* w_score;       // [padded], w_score / score_scale
  T score_scale;    // a power of two: w_score / score_scale is about 1
  T* panel_largest; // [panels], max |key|
  T* panel_sum;     // [panels], sum |key|
  T largest;        // max |key|
  T mean;           // mean |key|
  T smallest_mean;  // of |query| + |key| for the factored form
};

template <typename T>
struct AttentionKernels {
  int64_t panel_width;

  /// Fills panels [begin, end) of keys from key [K, H].
  void (*pack_keys)(
      const T* key,
      AttentionKeys<T>& keys,
      int64_t begin,
      int64_t end);

  /// Fills in what of `keys` depends on w_score, and sums the panels'
  /// statistics up.
  void (*finish_keys)(const T* w_score, AttentionKeys<T>& keys);

  /// For one block of `rows` queries: weights [rows, K] = softmax_i(score +
  /// log_prior) (log_prior may be null), and, unless `activations` is null,
  /// what activate() makes, which may overwrite the queries.
  void (*attend)(
      const AttentionKeys<T>& keys,
      int64_t rows,
      const T* query, // [rows, query_stride]
      int64_t query_stride,
      const T* log_prior, // [K]
      T* activations,     // [rows, keys.padded]
      uint8_t* direct,
      T* weights);

  /// For one block of queries: sets `direct` where tanh is to be computed
  /// directly, and what sweep() reads: e^2query times a constant, or query.
  void (*activate)(
      const AttentionKeys<T>& keys,
      int64_t rows,
      const T* query,
      int64_t query_stride,
      T* activations,
      uint8_t* direct);

  /// grad_score = weights * (grad_weights - sum_i weights * grad_weights),
  /// row by row, and its row sums, which rounding keeps from being 0.
  void (*grad_scores)(
      int64_t rows,
      int64_t count,
      const T* weights,      // [rows, K]
      const T* grad_weights, // [rows, K]
      T* grad_score,         // [rows, K], may be grad_weights or weights
      T* row_sums);          // [rows]

  /// For the hidden units of panels [begin, end): the gradients of the queries
  /// (which replace the activations), of the keys and of w_score.
  void (*sweep)(
      const AttentionKeys<T>& keys,
      int64_t begin,
      int64_t end,
      int64_t batch,
      T* activations,        // [batch, keys.padded]
      const uint8_t* direct, // [blocks]
      const T* grad_score,   // [batch, K]
      const T* row_sums,     // [batch]
      T* grad_key,           // [K, keys.padded]
      T* grad_w_score);      // [keys.padded]

  /// sum over rows of KL(softmax(teacher * f) || softmax(student * f)), with f
  /// = inverse_temperature; with grad_factor != 0 the student is replaced by
  /// grad_factor * (softmax(student * f) - softmax(teacher * f)).
  double (*divergence)(
      int64_t rows,
      int64_t classes,
      T* student,       // [rows, classes]
      const T* teacher, // [rows, classes]
      T inverse_temperature,
      T grad_factor);
};

KDCI_DECLARE_PER_LEVEL(AttentionKernels<float>, attention_kernels_float)
KDCI_DECLARE_PER_LEVEL(AttentionKernels<double>, attention_kernels_double)

template <typename T>
const AttentionKernels<T>& attention_kernels();

template <>
inline const AttentionKernels<float>& attention_kernels() {
  return attention_kernels_float();
}

template <>
inline const AttentionKernels<double>& attention_kernels() {
  return attention_kernels_double();
}

} // namespace kdci
