// SPDX-License-Identifier: Apache-2.0
//
// The distillation loss of the compensated student and its gradients from one
// call: the compensated logits are replaced by their gradient row by row.
#include <algorithm>
#include <tuple>

#include "../common/stable.h"
#include "arena.h"
#include "compensation.h"
#include "simd/divergence.h"

namespace kdci {
namespace {

template <typename T>
struct LossBuffers {
  LossBuffers(Arena& arena, const CompensationInputs<T>& inputs)
      : weights(arena.take<T>(inputs.batch * inputs.prototypes)),
        query(arena.take<T>(inputs.batch * inputs.hidden)),
        key(arena.take<T>(inputs.prototypes * inputs.hidden)),
        block_losses(arena.take<double>(inputs.batch / attention_block + 1)) {}

  T* weights;           // [B, K]
  T* query;             // [B, H]
  T* key;               // [K, H]
  double* block_losses; // [blocks]
};

template <typename T>
void compute_loss(
    const CompensationInputs<T>& inputs,
    const T* teacher, // [B, d]
    double temperature,
    bool need_grad,
    T* compensated, // [B, d], becomes the gradient
    T* loss,
    CompensationGrads* grads) {
  const Passes passes = {true, need_grad, true};
  Arena needed;
  Compensation<T>(inputs, needed, passes);
  LossBuffers<T>(needed, inputs);
  ArenaMemory memory(needed.bytes());
  Arena arena(memory.data());
  Compensation<T> steps(inputs, arena, passes);
  LossBuffers<T> buffers(arena, inputs);

  const int64_t d = inputs.classes;
  const T inverse_temperature = static_cast<T>(1 / temperature);
  const T grad_factor =
      need_grad ? static_cast<T>(temperature / inputs.batch) : T(0);
  steps.prepare(buffers.key, true);
  steps.for_rows(0, inputs.batch, [&](int64_t first, int64_t rows) {
    steps.project_queries(first, rows, buffers.query);
    steps.attend(first, rows, buffers.query, buffers.weights);
    steps.compensate(first, rows, buffers.weights, compensated);
    for (int64_t b = first; b < first + rows; b += attention_block) {
      buffers.block_losses[b / attention_block] =
          divergence_kernels<T>().divergence(
              std::min(attention_block, first + rows - b),
              d,
              compensated + b * d,
              teacher + b * d,
              inverse_temperature,
              grad_factor);
    }
  });
  double sum = 0;
  for (int64_t b = 0; b < inputs.batch; b += attention_block) {
    sum += buffers.block_losses[b / attention_block];
  }
  *loss = static_cast<T>(temperature * temperature / inputs.batch * sum);
  if (need_grad) {
    steps.backward(compensated, buffers.weights, buffers.query, *grads);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
compensated_kd_loss(
    const Tensor& student,     // [B, d]
    const Tensor& teacher,     // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    double temperature,
    bool posterior,
    double scale,
    bool need_grad,
    bool dictionary_grad) {
  const CompensationTensors tensors(
      student,
      prototypes,
      proportions,
      w_query,
      w_key,
      w_score,
      teacher.scalar_type() == ScalarType::Double);
  STD_TORCH_CHECK(
      teacher.dim() == 2 && teacher.size(0) == student.size(0) &&
          teacher.size(1) == student.size(1),
      "teacher must be of the shape of student");
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0");
  const Tensor teacher_logits = as_contiguous(teacher, tensors.dtype);
  const Tensor loss = empty_cpu({}, tensors.dtype);

  if (!need_grad) {
    const Tensor compensated = empty_cpu_like(tensors.logits);
    dispatch_compute_type(tensors.dtype, [&](auto zero) {
      using T = decltype(zero);
      compute_loss<T>(
          CompensationInputs<T>(tensors, posterior, scale),
          const_data<T>(teacher_logits),
          temperature,
          false,
          data<T>(compensated),
          data<T>(loss),
          nullptr);
    });
    return {
        loss,
        no_grad_of(student),
        no_grad_of(prototypes),
        no_grad_of(proportions),
        no_grad_of(w_query),
        no_grad_of(w_key),
        no_grad_of(w_score)};
  }

  CompensationGrads grads(tensors, dictionary_grad);
  dispatch_compute_type(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    compute_loss<T>(
        CompensationInputs<T>(tensors, posterior, scale),
        const_data<T>(teacher_logits),
        temperature,
        true,
        data<T>(grads.logits),
        data<T>(loss),
        &grads);
  });
  return {
      loss,
      as_type_of(student, grads.logits),
      as_type_of(prototypes, grads.prototypes),
      as_type_of(proportions, grads.proportions),
      as_type_of(w_query, grads.w_query),
      as_type_of(w_key, grads.w_key),
      as_type_of(w_score, grads.w_score)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CPU, m) {
  m.impl("compensated_kd_loss", TORCH_BOX(&compensated_kd_loss));
}

} // namespace kdci
