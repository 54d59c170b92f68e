// SPDX-License-Identifier: Apache-2.0
//
// The operators for CUDA tensors: checks, conversions and memory. All memory
// comes from torch, everything is queued on the current stream, and the host
// never waits, so the operators can be captured in a CUDA graph.

// There is no device code here, and the compilation for each architecture would
// read torch's headers for nothing.
#ifndef __CUDA_ARCH__

#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>

#include "../common/stable.h"
#include "attention.h"
#include "dictionary.h"

// Weak, because a PyTorch without CUDA does not have it, and the library is to
// load there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace kdci::cuda {
namespace {

using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr,
      "kdci_ext: this PyTorch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_tensor(
    const Tensor& tensor,
    const char* name,
    std::initializer_list<int64_t> shape,
    const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.device() == like.device(),
      name,
      " must be on the same CUDA device as the other tensors");
  STD_TORCH_CHECK(
      is_floating(tensor),
      name,
      " must be float32, float64, bfloat16 or float16");
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && tensor.size(axis++) == size;
  }
  STD_TORCH_CHECK(fits, name, " does not have the expected shape");
}

template <typename A>
constexpr ScalarType kScalarType =
    std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

template <typename A>
const A* data(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

template <typename A>
A* mutable_data(const Tensor& tensor) {
  return static_cast<A*>(tensor.mutable_data_ptr());
}

/// Memory of `bytes` on the device of `like`, for as long as the tensor lives;
/// torch's allocator gives it to nobody else until the stream is done with it.
Tensor workspace(const Tensor& like, int64_t bytes) {
  return new_empty(like, {bytes}, ScalarType::Byte);
}

/// `tensor` as `dtype`, itself where it already is.
Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor
                                       : torch::stable::to(tensor, dtype);
}

using DictionaryResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
DictionaryResult dictionary_as(
    const Tensor& features_in,
    const Tensor& uniforms_in,
    const std::optional<Tensor>& initial_in,
    int64_t num_components,
    int64_t max_iter,
    double tol,
    double momentum) {
  constexpr ScalarType type = kScalarType<A>;
  const Tensor features = as_contiguous(features_in, type); // [n, d]
  const Tensor uniforms = as_contiguous(uniforms_in, ScalarType::Double);
  const int64_t n = features.size(0);
  const int64_t d = features.size(1);
  const int64_t clusters = uniforms.size(0);
  const int64_t candidates = uniforms.size(1);
  const bool has_initial = initial_in.has_value();
  std::optional<Tensor> initial;
  if (has_initial) {
    initial = as_contiguous(*initial_in, type);
  }

  Tensor prototypes = new_empty(features, {clusters, d}, type);
  Tensor proportions = new_empty(features, {clusters}, type);
  Tensor labels = new_empty(features, {n}, ScalarType::Long);
  Tensor inertia = new_empty(features, {}, ScalarType::Double);
  Tensor num_iter = new_empty(features, {}, ScalarType::Long);

  Arena sizes(nullptr);
  Projection<A>(n, d, num_components, clusters, has_initial, sizes);
  Clustering<A>(n, d, num_components, clusters, candidates, sizes);
  const Tensor memory = workspace(features, sizes.used());
  Arena arena(memory.mutable_data_ptr());
  Projection<A> projection(n, d, num_components, clusters, has_initial, arena);
  Clustering<A> clustering(n, d, num_components, clusters, candidates, arena);

  projection.features = data<A>(features);
  projection.initial = has_initial ? data<A>(*initial) : nullptr;
  projection.initial_points = clustering.centers;
  clustering.max_iter = max_iter;
  clustering.tol = tol;
  clustering.momentum = momentum;
  clustering.features = projection.features;
  clustering.uniforms = data<double>(uniforms);
  clustering.has_initial = has_initial;
  clustering.state = projection.state;
  clustering.mean = projection.mean;
  clustering.points = projection.points;
  clustering.prototypes = mutable_data<A>(prototypes);
  clustering.proportions = mutable_data<A>(proportions);
  clustering.labels = mutable_data<int64_t>(labels);
  clustering.inertia = mutable_data<double>(inertia);
  clustering.num_iter = mutable_data<int64_t>(num_iter);

  run_dictionary(projection, clustering, current_stream(features));
  return {prototypes, proportions, labels, inertia, num_iter};
}

DictionaryResult confounder_dictionary(
    const Tensor& features,                          // [n, d]
    const Tensor& uniforms,                          // [K, candidates]
    const std::optional<Tensor>& initial_prototypes, // [K, d]
    int64_t num_components,
    int64_t max_iter,
    double tol,
    double momentum) {
  STD_TORCH_CHECK(
      features.dim() == 2 && uniforms.dim() == 2,
      "features and uniforms must be 2-d");
  const int64_t clusters = uniforms.size(0);
  check_tensor(uniforms, "uniforms", {clusters, uniforms.size(1)}, features);
  if (initial_prototypes.has_value()) {
    check_tensor(
        *initial_prototypes,
        "initial_prototypes",
        {clusters, features.size(1)},
        features);
  }
  STD_TORCH_CHECK(
      clusters >= 1 && clusters <= features.size(0) && uniforms.size(1) >= 1,
      "uniforms must have between 1 row and as many as features has, and at "
      "least 1 column");
  STD_TORCH_CHECK(
      uniforms.size(1) <= 512,
      "uniforms must have at most 512 columns on CUDA");
  STD_TORCH_CHECK(
      num_components >= 1 && num_components <= features.size(1),
      "num_components must be between 1 and the number of feature columns");
  STD_TORCH_CHECK(max_iter >= 1, "max_iter must be at least 1");
  const DeviceGuard guard(features.get_device_index());
  const auto run = features.scalar_type() == ScalarType::Double
      ? dictionary_as<double>
      : dictionary_as<float>;
  return run(
      features,
      uniforms,
      initial_prototypes,
      num_components,
      max_iter,
      tol,
      momentum);
}

/// The inputs that the attention operators share, as A and contiguous.
template <typename A>
struct AttentionTensors {
  Tensor logits;      // [B, d]
  Tensor prototypes;  // [K, d]
  Tensor proportions; // [K]
  Tensor w_query;     // [H, d]
  Tensor w_key;       // [H, d]
  Tensor w_score;     // [H]
  Attention<A> view;

  AttentionTensors(
      const Tensor& logits_in,
      const Tensor& prototypes_in,
      const Tensor& proportions_in,
      const Tensor& w_query_in,
      const Tensor& w_key_in,
      const Tensor& w_score_in,
      bool posterior,
      double scale)
      : logits(as_contiguous(logits_in, kScalarType<A>)),
        prototypes(as_contiguous(prototypes_in, kScalarType<A>)),
        proportions(as_contiguous(proportions_in, kScalarType<A>)),
        w_query(as_contiguous(w_query_in, kScalarType<A>)),
        w_key(as_contiguous(w_key_in, kScalarType<A>)),
        w_score(as_contiguous(w_score_in, kScalarType<A>)),
        view{
            logits.size(0),
            logits.size(1),
            prototypes.size(0),
            w_query.size(0),
            posterior,
            scale,
            data<A>(logits),
            data<A>(prototypes),
            data<A>(proportions),
            data<A>(w_query),
            data<A>(w_key),
            data<A>(w_score)} {}
};

void check_attention(
    const Tensor& logits,
    const Tensor& prototypes,
    const Tensor& proportions,
    const Tensor& w_query,
    const Tensor& w_key,
    const Tensor& w_score) {
  STD_TORCH_CHECK(
      logits.dim() == 2 && prototypes.dim() == 2 && w_query.dim() == 2,
      "logits, prototypes and w_query must be 2-d");
  const int64_t d = logits.size(1);
  const int64_t clusters = prototypes.size(0);
  const int64_t hidden = w_query.size(0);
  STD_TORCH_CHECK(
      logits.size(0) >= 1 && d >= 1 && clusters >= 1 && hidden >= 1,
      "logits, prototypes and w_query must not be empty");
  check_tensor(logits, "logits", {logits.size(0), d}, logits);
  check_tensor(prototypes, "prototypes", {clusters, d}, logits);
  check_tensor(proportions, "proportions", {clusters}, logits);
  check_tensor(w_query, "w_query", {hidden, d}, logits);
  check_tensor(w_key, "w_key", {hidden, d}, logits);
  check_tensor(w_score, "w_score", {hidden}, logits);
}

bool any_double(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (tensor->scalar_type() == ScalarType::Double) {
      return true;
    }
  }
  return false;
}

/// Gradients of the inputs, in A, then in each input's own type.
template <typename A>
struct GradTensors {
  Tensor logits;
  Tensor prototypes;
  Tensor proportions;
  Tensor w_query;
  Tensor w_key;
  Tensor w_score;

  GradTensors(const AttentionTensors<A>& inputs, bool dictionary_grad)
      : logits(empty_like(inputs.logits)),
        prototypes(
            dictionary_grad ? empty_like(inputs.prototypes)
                            : new_empty(inputs.logits, {0})),
        proportions(
            dictionary_grad ? empty_like(inputs.proportions)
                            : new_empty(inputs.logits, {0})),
        w_query(empty_like(inputs.w_query)),
        w_key(empty_like(inputs.w_key)),
        w_score(empty_like(inputs.w_score)) {}

  AttentionGrads<A> view() const {
    const bool dictionary = prototypes.numel() > 0;
    return {
        mutable_data<A>(logits),
        dictionary ? mutable_data<A>(prototypes) : nullptr,
        dictionary ? mutable_data<A>(proportions) : nullptr,
        mutable_data<A>(w_query),
        mutable_data<A>(w_key),
        mutable_data<A>(w_score)};
  }

 private:
  static Tensor empty_like(const Tensor& tensor) {
    return torch::stable::empty_like(tensor);
  }
};

int64_t saved_size(int64_t batch, int64_t prototypes, int64_t hidden) {
  return (batch + prototypes) * hidden + batch * prototypes;
}

/// Where in `saved` the forward pass leaves what the backward pass reads.
template <typename A>
AttentionState<A> state_in(const Tensor& saved, const Attention<A>& of) {
  A* query = mutable_data<A>(saved);
  A* key = query + of.batch * of.hidden;
  return {key + of.prototypes * of.hidden, query, key};
}

using CompensateResult = std::tuple<Tensor, Tensor>;

template <typename A>
CompensateResult compensate_as(
    const AttentionTensors<A>& inputs,
    ScalarType result) {
  const Attention<A>& view = inputs.view;
  Tensor compensated = torch::stable::empty_like(inputs.logits);
  Tensor saved = new_empty(
      inputs.logits, {saved_size(view.batch, view.prototypes, view.hidden)});
  attention_forward(
      view,
      state_in(saved, view),
      mutable_data<A>(compensated),
      current_stream(inputs.logits));
  return {as_type(compensated, result), saved};
}

CompensateResult compensate(
    const Tensor& logits,      // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    bool posterior,
    double scale) {
  check_attention(logits, prototypes, proportions, w_query, w_key, w_score);
  const DeviceGuard guard(logits.get_device_index());
  const auto run = [&](auto a) {
    using A = decltype(a);
    return compensate_as<A>(
        {logits,
         prototypes,
         proportions,
         w_query,
         w_key,
         w_score,
         posterior,
         scale},
        logits.scalar_type());
  };
  return any_double(
             {&logits, &prototypes, &proportions, &w_query, &w_key, &w_score})
      ? run(double())
      : run(float());
}

using BackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
GradTensors<A> backward_as(
    const AttentionTensors<A>& inputs,
    const AttentionState<A>& state,
    const Tensor& grad, // [B, d] of A
    bool dictionary_grad) {
  const Attention<A>& view = inputs.view;
  GradTensors<A> grads(inputs, dictionary_grad);
  Arena sizes(nullptr);
  BackwardWorkspace<A>(view.batch, view.prototypes, view.hidden, sizes);
  const Tensor memory = workspace(inputs.logits, sizes.used());
  Arena arena(memory.mutable_data_ptr());
  const BackwardWorkspace<A> work(
      view.batch, view.prototypes, view.hidden, arena);
  attention_backward(
      view,
      state,
      data<A>(grad),
      work,
      grads.view(),
      current_stream(inputs.logits));
  return grads;
}

BackwardResult compensate_backward(
    const Tensor& grad,        // [B, d]
    const Tensor& logits,      // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    const Tensor& saved,       // [B H + K H + B K]
    bool posterior,
    double scale,
    bool dictionary_grad) {
  check_attention(logits, prototypes, proportions, w_query, w_key, w_score);
  const int64_t batch = logits.size(0);
  check_tensor(grad, "grad", {batch, logits.size(1)}, logits);
  check_tensor(
      saved,
      "saved",
      {saved_size(batch, prototypes.size(0), w_query.size(0))},
      logits);
  const DeviceGuard guard(logits.get_device_index());
  const auto run = [&](auto a) -> BackwardResult {
    using A = decltype(a);
    const AttentionTensors<A> inputs(
        logits,
        prototypes,
        proportions,
        w_query,
        w_key,
        w_score,
        posterior,
        scale);
    const Tensor grad_a = as_contiguous(grad, kScalarType<A>);
    const Tensor saved_a = as_contiguous(saved, kScalarType<A>);
    const GradTensors<A> grads = backward_as<A>(
        inputs, state_in(saved_a, inputs.view), grad_a, dictionary_grad);
    return {
        as_type(grads.logits, logits.scalar_type()),
        as_type(grads.prototypes, prototypes.scalar_type()),
        as_type(grads.proportions, proportions.scalar_type()),
        as_type(grads.w_query, w_query.scalar_type()),
        as_type(grads.w_key, w_key.scalar_type()),
        as_type(grads.w_score, w_score.scalar_type())};
  };
  return any_double(
             {&logits, &prototypes, &proportions, &w_query, &w_key, &w_score})
      ? run(double())
      : run(float());
}

using LossResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LossResult compensated_kd_loss(
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
  check_attention(student, prototypes, proportions, w_query, w_key, w_score);
  const int64_t batch = student.size(0);
  const int64_t d = student.size(1);
  check_tensor(teacher, "teacher", {batch, d}, student);
  STD_TORCH_CHECK(batch >= 1, "student must have at least one row");
  const DeviceGuard guard(student.get_device_index());
  const auto run = [&](auto a) -> LossResult {
    using A = decltype(a);
    const AttentionTensors<A> inputs(
        student,
        prototypes,
        proportions,
        w_query,
        w_key,
        w_score,
        posterior,
        scale);
    const Tensor teacher_a = as_contiguous(teacher, kScalarType<A>);
    const auto [compensated, saved] = compensate_as<A>(inputs, kScalarType<A>);
    Tensor loss = new_empty(inputs.logits, {});
    const Tensor row_loss =
        new_empty(inputs.logits, {batch}, ScalarType::Double);
    const Tensor grad = new_empty(inputs.logits, {need_grad ? batch : 0, d});
    kd_loss<A>(
        batch,
        d,
        temperature,
        data<A>(compensated),
        data<A>(teacher_a),
        mutable_data<double>(row_loss),
        mutable_data<A>(loss),
        need_grad ? mutable_data<A>(grad) : nullptr,
        current_stream(inputs.logits));
    if (!need_grad) {
      const auto none = [&](const Tensor& like) {
        return new_empty(like, {0});
      };
      return {
          loss,
          none(student),
          none(prototypes),
          none(proportions),
          none(w_query),
          none(w_key),
          none(w_score)};
    }
    const GradTensors<A> grads = backward_as<A>(
        inputs, state_in(saved, inputs.view), grad, dictionary_grad);
    return {
        loss,
        as_type(grads.logits, student.scalar_type()),
        as_type(grads.prototypes, prototypes.scalar_type()),
        as_type(grads.proportions, proportions.scalar_type()),
        as_type(grads.w_query, w_query.scalar_type()),
        as_type(grads.w_key, w_key.scalar_type()),
        as_type(grads.w_score, w_score.scalar_type())};
  };
  return any_double(
             {&student,
              &teacher,
              &prototypes,
              &proportions,
              &w_query,
              &w_key,
              &w_score})
      ? run(double())
      : run(float());
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CUDA, m) {
  m.impl("confounder_dictionary", TORCH_BOX(&confounder_dictionary));
  m.impl("compensate", TORCH_BOX(&compensate));
  m.impl("compensate_backward", TORCH_BOX(&compensate_backward));
  m.impl("compensated_kd_loss", TORCH_BOX(&compensated_kd_loss));
}

} // namespace kdci::cuda

#endif // __CUDA_ARCH__
