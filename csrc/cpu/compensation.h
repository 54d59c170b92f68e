// SPDX-License-Identifier: Apache-2.0
//
// Prior compensation on the CPU, in the steps that the operators are made of.
// Results are bitwise independent of the number of threads: rows and hidden
// units are split among them, sums never are.
#pragma once

#include <cstdint>
#include <optional>

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

/// The gradients of the inputs, those of the dictionary only if wanted.
struct CompensationGrads {
  CompensationGrads(const CompensationTensors& tensors, bool dictionary);

  Tensor logits;
  std::optional<Tensor> prototypes;
  std::optional<Tensor> proportions;
  Tensor w_query;
  Tensor w_key;
  Tensor w_score;
};

/// Memory for an Arena: on the stack where little is needed, since the smallest
/// problems feel what the allocator takes.
class ArenaMemory {
 public:
  explicit ArenaMemory(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof(few_))) {
      many_ = empty_cpu({bytes}, ScalarType::Byte);
    }
  }

  void* data() {
    return many_ ? many_->mutable_data_ptr() : few_;
  }

 private:
  alignas(64) unsigned char few_[32768];
  std::optional<Tensor> many_;
};

/// What a Compensation is to be used for.
struct Passes {
  bool forward;
  bool backward;
  bool overwrite_query; // by the backward pass, which then needs less memory
};

/// All pointers are to the whole batch; first and rows say which part of it a
/// call is about, and first is a multiple of attention_block.
template <typename T>
class Compensation {
 public:
  /// Takes its buffers from `arena`.
  Compensation(
      const CompensationInputs<T>& inputs,
      Arena& arena,
      Passes passes);

  /// Calls step(first, rows) on slices of rows [begin, end).
  template <typename Step>
  void for_rows(int64_t begin, int64_t end, const Step& step) const;

  /// Prepares the attention over key [K, H], which is to stay. With `project`
  /// it is set to z w_key^T first.
  void prepare(T* key, bool project);

  /// query [B, H] = logits w_query^T.
  void project_queries(int64_t first, int64_t rows, T* query);

  /// weights [B, K]. The queries may be replaced by e^2query, which is what
  /// backward() then expects: that depends on the keys and w_score alone.
  void attend(int64_t first, int64_t rows, T* query, T* weights);

  /// compensated [B, d] = logits + F.
  void compensate(
      int64_t first,
      int64_t rows,
      const T* weights,
      T* compensated);

  /// The gradients from that of the compensated logits [B, d], which may be in
  /// grads.logits. The queries [B, H] are left alone unless overwrite_query.
  void backward(
      const T* grad_compensated,
      const T* weights,
      T* query,
      CompensationGrads& grads);

 private:
  /// Units [first, last) of key [K, H] = z w_key^T; first begins a panel.
  void project_keys(int64_t first, int64_t last, T* key);

  /// Whether to compute the transpose of that, for which z is packed instead of
  /// w_key: it pays where few prototypes fill whole panels.
  bool turn_keys() const;

  /// Rows of the batch that the backward pass takes at a time.
  int64_t slab_rows() const;

  /// Adds what a slab contributes to the gradients of the dictionary.
  void add_dictionary_grads(
      int64_t first,
      int64_t rows,
      const T* grad_compensated,
      const T* weights,
      CompensationGrads& grads);
  void finish_dictionary_grads(CompensationGrads& grads);

  CompensationInputs<T> in_;
  const AttentionKernels<T>& kernels_;
  Passes passes_;
  AttentionKeys<T> keys_;
  T* factors_ = nullptr;         // [K], of the prototypes in the average
  T* log_proportions_ = nullptr; // [K], null for the paper's weighting
  T* grad_key_ = nullptr;        // [K, H]
  T* grad_query_ = nullptr;      // [slab, H]
  T* grad_score_ = nullptr;      // [slab, K]
  T* row_sums_ = nullptr;        // [slab]
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

/// A gradient that was not wanted: empty, in the type of `like`.
inline Tensor no_grad_of(const Tensor& like) {
  return as_type_of(like, empty_cpu({0}, accumulate_type(like.scalar_type())));
}

inline Tensor as_type_of(
    const Tensor& like,
    const std::optional<Tensor>& tensor) {
  return tensor ? as_type_of(like, *tensor) : no_grad_of(like);
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
void Compensation<T>::for_rows(int64_t begin, int64_t end, const Step& step)
    const {
  const int64_t blocks = (end - begin + attention_block - 1) / attention_block;
  const int64_t terms =
      attention_block * in_.hidden * (in_.prototypes + in_.classes);
  torch::stable::parallel_for(
      0, blocks, grain_of(terms), [&](int64_t first_block, int64_t last_block) {
        const int64_t first = begin + first_block * attention_block;
        const int64_t last = begin + last_block * attention_block;
        step(first, (last < end ? last : end) - first);
      });
}

} // namespace kdci
