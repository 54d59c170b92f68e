// SPDX-License-Identifier: Apache-2.0
//
// Prior compensation by additive attention, and the distillation loss on it.
// Nothing of size batch x prototypes x hidden is ever stored. Knows nothing of
// torch: the caller gives device pointers and a workspace.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace kdci::cuda {

template <typename A>
struct Attention {
  int64_t batch;      // B
  int64_t d;          // classes
  int64_t prototypes; // K
  int64_t hidden;     // H
  bool posterior;
  double scale;
  const A* logits;     // [B, d]
  const A* prototype;  // [K, d]
  const A* proportion; // [K]
  const A* w_query;    // [H, d]
  const A* w_key;      // [H, d]
  const A* w_score;    // [H]
};

/// What the forward pass leaves for the backward pass.
template <typename A>
struct AttentionState {
  A* weights; // [B, K]
  A* query;   // [B, H]
  A* key;     // [K, H]
};

/// Null pointers where the dictionary's gradient is not wanted.
template <typename A>
struct AttentionGrads {
  A* logits;     // [B, d]
  A* prototype;  // [K, d]
  A* proportion; // [K]
  A* w_query;    // [H, d]
  A* w_key;      // [H, d]
  A* w_score;    // [H]
};

template <typename A>
struct BackwardWorkspace {
  A* weights_grad;    // [B, K]
  A* score_grad;      // [B, K]
  A* query_grad;      // [B, H]
  int64_t groups;     // of rows, that share sums for the gradient of w_score
  A* w_score_partial; // [groups, H]
  int64_t slices;     // of rows, for the gradient of the keys
  int64_t slice_rows;
  A* key_partial; // [slices, K, H]
  A* key_grad;    // [K, H]

  BackwardWorkspace(
      int64_t batch,
      int64_t prototypes,
      int64_t hidden,
      Arena& arena);
};

/// compensated [B, d] = logits + F.
template <typename A>
void attention_forward(
    const Attention<A>& inputs,
    const AttentionState<A>& state,
    A* compensated,
    cudaStream_t stream);

/// Gradients of sum(grad * compensated), grad [B, d].
template <typename A>
void attention_backward(
    const Attention<A>& inputs,
    const AttentionState<A>& state,
    const A* grad,
    const BackwardWorkspace<A>& workspace,
    const AttentionGrads<A>& grads,
    cudaStream_t stream);

/// loss [] = T^2 / B * sum_b KL(softmax(teacher / T) || softmax(student / T));
/// the gradient of the student [B, d] is skipped if null.
template <typename A>
void kd_loss(
    int64_t batch,
    int64_t d,
    double temperature,
    const A* student,
    const A* teacher,
    double* row_loss, // [B] scratch
    A* loss,
    A* student_grad,
    cudaStream_t stream);

} // namespace kdci::cuda
