// SPDX-License-Identifier: Apache-2.0
//
// Additive attention of B queries over K keys, score[b, i] = sum_h w_score[h] *
// tanh(query[b, h] + key[i, h]), forward and backward, with nothing of size
// B * K * H in memory and, nearly always, without a tanh:
//
//   tanh(a + b) = 1 - 2 / (1 + e^2a e^2b)
//
// needs (B + K) H exponentials and a division for each two terms, or an
// estimate of a reciprocal. The form is used for a block of queries where it is
// exact: where the exponentials of the keys stay in range (queries so large
// that tanh is 1 for all keys are cut off), and where tanh is not so small
// throughout that 1 - 2 / (...) would lose its digits. Elsewhere, and in
// float64, tanh is computed directly.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

/// Rows of queries that are scored together.
constexpr int64_t attention_block = 16;
/// Rows of queries that are swept together, at most; whole blocks.
constexpr int64_t sweep_rows = 256;

/// The keys and what is known of them. Hidden units are taken in panels of
/// panel_width, the last of which is filled up with zeros.
template <typename T>
struct AttentionKeys {
  int64_t count;      // K
  int64_t hidden;     // H
  int64_t panels;     // H / panel_width, rounded up
  const T* values;    // [K, H]
  const T* log_prior; // [K], added to the scores; may be null
  int64_t present;    // keys whose log_prior is not -inf
  T* folded;          // [panels, K, panel_width], e^2key by w_score, or null
  T* w_score;         // [panels * panel_width], w_score / score_scale
  T* inverse_score;   // [panels * panel_width], a constant by that
  T* panel_largest;   // [panels], max |key|
  T* panel_weight;    // [panels], sum |w_score|
  T* panel_sum;       // [panels], sum |key|, of present keys and cut off
  T* panel_score;     // [panels], the same by |w_score|
  T score_scale;      // a power of two: |w_score| / score_scale is at most 2
  T smallest_mean;    // of |query| + |key| for 1 - 2 / (1 + e^2a e^2b)
  T fold_range;       // the largest |query| + |key| for `folded`
  T fold_limit;       // likewise |query|; 0 if it cannot be used
  T factor_limit;     // the largest |query| for e^2query in sweep(), or 0
  T kept_limit; // likewise of e^2query that attend() leaves behind; 0 if none
};

template <typename T>
struct AttentionKernels {
  int64_t panel_width;

  /// Fills in what of `keys` depends on w_score [H].
  void (*prepare_score)(const T* w_score, AttentionKeys<T>& keys);

  /// Fills in panels [begin, end) of `keys`, after prepare_score().
  void (*pack_keys)(AttentionKeys<T>& keys, int64_t begin, int64_t end);

  /// Fills in the limits, after pack_keys() of all panels.
  void (*finish_keys)(AttentionKeys<T>& keys);

  /// For one block of `rows` queries: weights [rows, K] = softmax_i(score +
  /// log_prior). With kept_limit > 0, where tanh need not be computed directly
  /// for any query, the queries are replaced by e^2query.
  void (*attend)(
      const AttentionKeys<T>& keys,
      int64_t rows,
      T* query, // [rows, H]
      T* weights);

  /// Replaces the gradients of what the weights multiply, by `factors`, by
  /// those of the scores: grad = weights * (g - sum_i weights * g) with g =
  /// factors * grad. Their row sums are what rounding keeps from being 0.
  void (*grad_scores)(
      int64_t rows,
      int64_t count,
      const T* factors, // [K]
      const T* weights, // [rows, K]
      T* grad,          // [rows, K]
      T* row_sums);     // [rows]

  /// For the hidden units of panels [begin, end) and `rows` <= sweep_rows
  /// queries: the gradients of the queries, of the keys and of w_score. The
  /// latter two are added to if `accumulate`.
  void (*sweep)(
      const AttentionKeys<T>& keys,
      int64_t begin,
      int64_t end,
      int64_t rows,
      const T* query,      // [rows, H], as attend() left it
      const T* grad_score, // [rows, K]
      const T* row_sums,   // [rows]
      bool accumulate,
      T* grad_query,    // [rows, H], may be query
      T* grad_key,      // [K, H]
      T* grad_w_score); // [H]
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
