// SPDX-License-Identifier: Apache-2.0
//
// Prior compensation on the CPU, in the steps that the operators are made of.
// Results are bitwise independent of the number of threads: rows and hidden
// units are split among them, sums never are.
#pragma once

#include <cstdint>

#include "../common/stable.h"
#include "arena.h"
#include "simd/attention.h"

namespace kdci {

/// The arguments that the operators have in common, contiguous and of the type
/// to compute in: float64 if any is, else float32.
struct CompensationTensors {
  CompensationTensors(
      const Tensor& logits,      // [B, d]
      const Tensor& prototypes,  // [K, d]
      const Tensor& proportions, // [K]
      const Tensor& w_query,     // [H, d]
      const Tensor& w_key,       // [H, d]
      const Tensor& w_score,     // [H]
      bool teacher_is_double = false);

  ScalarType dtype;
  Tensor logits;
  Tensor prototypes;
  Tensor proportions;
  Tensor w_query;
  Tensor w_key;
  Tensor w_score;
};

template <typename T>
struct CompensationInputs {
  CompensationInputs(
      const CompensationTensors& tensors,
      bool posterior,
      double scale);

  int64_t batch;        // B
  int64_t classes;      // d
  int64_t prototypes;   // K
  int64_t hidden;       // H
  const T* logits;      // [B, d]
  const T* z;           // [K, d]
  const T* proportions; // [K]
  const T* w_query;     // [H, d]
  const T* w_key;       // [H, d]
  const T* w_score;     // [H]
  bool posterior;
  T scale;
};

/// The gradients of the inputs and their data. Those of the dictionary are
/// empty, with null data, unless wanted.
struct CompensationGrads {
  CompensationGrads(const CompensationTensors& tensors, bool dictionary);

  Tensor logits;
  Tensor prototypes;
  Tensor proportions;
  Tensor w_query;
  Tensor w_key;
  Tensor w_score;
  bool dictionary;
};

/// All pointers are to the whole batch; first and rows say which part of it a
/// call is about, and first is a multiple of attention_block.
template <typename T>
class Compensation {
 public:
  /// Takes its buffers from `arena`; those of the backward pass on request.
  Compensation(const CompensationInputs<T>& inputs, Arena& arena, bool grads);

  /// Calls step(first, rows) on slices of the batch.
  template <typename Step>
  void for_rows(const Step& step) const;

  /// Prepares the attention over key [K, H], or, if that is null, over the keys
  /// z w_key^T, which go to projected [K, H]. That may be null too if `grads`
  /// was given.
  void prepare(const T* key, T* projected);

  /// query [B, stride] = logits w_query^T.
  void project_queries(int64_t first, int64_t rows, T* query, int64_t stride);

  /// weights [B, K]; with `keep`, activations() as well, which may be the
  /// queries.
  void attend(
      int64_t first,
      int64_t rows,
      const T* query,
      int64_t stride,
      bool keep,
      T* weights);

  /// compensated [B, d] = logits + F.
  void compensate(
      int64_t first,
      int64_t rows,
      const T* weights,
      T* compensated);

  /// activations() from query [B, H].
  void activate(int64_t first, int64_t rows, const T* query);

  /// The gradient of the scores from that of the compensated logits [B, d].
  void grad_scores(
      int64_t first,
      int64_t rows,
      const T* weights,
      const T* grad_compensated);

  /// The rest of the backward pass, from activations() and the gradient of the
  /// scores. grads.logits holds the gradient of the compensated logits.
  void backward(const T* weights, CompensationGrads& grads);

  /// [B, activation_stride()]
  T* activations() {
    return activations_;
  }
  int64_t activation_stride() const {
    return keys_.padded;
  }

 private:
  void grad_dictionary(const T* weights, CompensationGrads& grads);

  CompensationInputs<T> in_;
  const AttentionKernels<T>& kernels_;
  AttentionKeys<T> keys_;
  T* prior_;                  // [K, d], what the weights average
  T* log_proportions_;        // [K], null for the paper's weighting
  uint8_t* direct_;           // [blocks]
  T* projected_ = nullptr;    // [K, H], in the memory of what follows
  T* activations_ = nullptr;  // [B, padded]
  T* grad_score_ = nullptr;   // [B, K]
  T* row_sums_ = nullptr;     // [B]
  T* grad_key_ = nullptr;     // [K, padded]
  T* grad_w_score_ = nullptr; // [padded]
};

template <typename T>
inline const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

/// `tensor` in the type of `like`.
inline Tensor as_type_of(const Tensor& like, const Tensor& tensor) {
  return tensor.scalar_type() == like.scalar_type()
      ? tensor
      : torch::stable::to(tensor, like.scalar_type());
}

/// Runs body(float()) or body(double()).
template <typename Body>
inline void dispatch_compute_type(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Double) {
    body(double());
  } else {
    body(float());
  }
}

/// The smallest share of a loop whose turns do `terms` multiplications that is
/// worth a thread.
inline int64_t grain_of(int64_t terms) {
  return 1 + 65536 / (terms + 1);
}

template <typename T>
template <typename Step>
void Compensation<T>::for_rows(const Step& step) const {
  const int64_t blocks = (in_.batch + attention_block - 1) / attention_block;
  const int64_t terms =
      attention_block * in_.hidden * (in_.prototypes + in_.classes);
  torch::stable::parallel_for(
      0, blocks, grain_of(terms), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * attention_block;
        const int64_t last = end * attention_block;
        step(first, (last < in_.batch ? last : in_.batch) - first);
      });
}

} // namespace kdci
