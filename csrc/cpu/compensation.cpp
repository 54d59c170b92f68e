// SPDX-License-Identifier: Apache-2.0
#include "compensation.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "simd/gemm.h"

namespace kdci {

namespace {

/// The type to compute in, of arguments that fit together.
ScalarType check(
    const Tensor& logits,
    const Tensor& prototypes,
    const Tensor& proportions,
    const Tensor& w_query,
    const Tensor& w_key,
    const Tensor& w_score,
    bool teacher_is_double) {
  bool is_double = teacher_is_double;
  for (const Tensor* tensor :
       {&logits, &prototypes, &proportions, &w_query, &w_key, &w_score}) {
    STD_TORCH_CHECK(
        is_floating(*tensor),
        "all tensors must be float32, float64, bfloat16 or float16");
    is_double |= tensor->scalar_type() == ScalarType::Double;
  }
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.size(0) >= 1 && logits.size(1) >= 1,
      "logits must be of shape [B, d] and not empty");
  const int64_t d = logits.size(1);
  STD_TORCH_CHECK(
      prototypes.dim() == 2 && prototypes.size(0) >= 1 &&
          prototypes.size(1) == d,
      "prototypes must be of shape [K, d], d as in logits");
  STD_TORCH_CHECK(
      proportions.dim() == 1 && proportions.size(0) == prototypes.size(0),
      "proportions must be of shape [K], K as in prototypes");
  STD_TORCH_CHECK(
      w_score.dim() == 1 && w_score.size(0) >= 1,
      "w_score must be of shape [H]");
  STD_TORCH_CHECK(
      w_query.dim() == 2 && w_query.size(0) == w_score.size(0) &&
          w_query.size(1) == d,
      "w_query must be of shape [H, d], H as in w_score");
  STD_TORCH_CHECK(
      w_key.dim() == 2 && w_key.size(0) == w_score.size(0) &&
          w_key.size(1) == d,
      "w_key must be of shape [H, d], H as in w_score");
  return is_double ? ScalarType::Double : ScalarType::Float;
}

} // namespace

CompensationTensors::CompensationTensors(
    const Tensor& logits,
    const Tensor& prototypes,
    const Tensor& proportions,
    const Tensor& w_query,
    const Tensor& w_key,
    const Tensor& w_score,
    bool teacher_is_double)
    : dtype(check(
          logits,
          prototypes,
          proportions,
          w_query,
          w_key,
          w_score,
          teacher_is_double)),
      logits(as_contiguous(logits, dtype)),
      prototypes(as_contiguous(prototypes, dtype)),
      proportions(as_contiguous(proportions, dtype)),
      w_query(as_contiguous(w_query, dtype)),
      w_key(as_contiguous(w_key, dtype)),
      w_score(as_contiguous(w_score, dtype)) {}

template <typename T>
CompensationInputs<T>::CompensationInputs(
    const CompensationTensors& tensors,
    bool posterior,
    double scale)
    : batch(tensors.logits.size(0)),
      classes(tensors.logits.size(1)),
      prototypes(tensors.prototypes.size(0)),
      hidden(tensors.w_score.size(0)),
      logits(const_data<T>(tensors.logits)),
      z(const_data<T>(tensors.prototypes)),
      proportions(const_data<T>(tensors.proportions)),
      w_query(const_data<T>(tensors.w_query)),
      w_key(const_data<T>(tensors.w_key)),
      w_score(const_data<T>(tensors.w_score)),
      posterior(posterior),
      scale(static_cast<T>(scale)) {}

CompensationGrads::CompensationGrads(
    const CompensationTensors& tensors,
    bool dictionary)
    : logits(empty_cpu_like(tensors.logits)),
      w_query(empty_cpu_like(tensors.w_query)),
      w_key(empty_cpu_like(tensors.w_key)),
      w_score(empty_cpu_like(tensors.w_score)) {
  if (dictionary) {
    prototypes = empty_cpu_like(tensors.prototypes);
    proportions = empty_cpu_like(tensors.proportions);
  }
}

// Classes from which on it may pay to compute the keys' transpose.
constexpr int64_t least_turned_classes = 64;

template <typename T>
Compensation<T>::Compensation(
    const CompensationInputs<T>& inputs,
    Arena& arena,
    Passes passes)
    : in_(inputs), kernels_(attention_kernels<T>()), passes_(passes) {
  const int64_t width = kernels_.panel_width;
  keys_.count = in_.prototypes;
  keys_.hidden = in_.hidden;
  keys_.panels = (in_.hidden + width - 1) / width;
  const int64_t padded = keys_.panels * width;
  keys_.w_score = arena.take<T>(padded);
  keys_.inverse_score = arena.take<T>(padded);
  keys_.panel_largest = arena.take<T>(keys_.panels);
  keys_.panel_weight = arena.take<T>(keys_.panels);
  keys_.panel_sum = arena.take<T>(keys_.panels);
  keys_.panel_score = arena.take<T>(keys_.panels);
  log_proportions_ = in_.posterior ? arena.take<T>(in_.prototypes) : nullptr;
  keys_.log_prior = log_proportions_;
  factors_ = arena.take<T>(in_.prototypes);
  keys_.folded = nullptr;
  if (passes.forward) {
    // Once all queries have been attended to, the memory is free for the
    // gradient of the keys.
    keys_.folded = arena.take<T>(keys_.count * padded);
    grad_key_ = keys_.folded;
  }
  if (passes.backward) {
    const int64_t slab = slab_rows();
    grad_score_ = arena.take<T>(slab * in_.prototypes);
    row_sums_ = arena.take<T>(slab);
    if (!passes.forward) {
      grad_key_ = arena.take<T>(in_.prototypes * in_.hidden);
    }
    if (!passes.overwrite_query) {
      grad_query_ = arena.take<T>(slab * in_.hidden);
    }
  }
}

template <typename T>
int64_t Compensation<T>::slab_rows() const {
  // The gradient of a slab's scores is to be no larger than a matrix of
  // weights. Whether queries are overwritten makes no difference, not even to
  // rounding.
  const int64_t unit = sweep_rows / 4;
  const int64_t slab = in_.hidden * in_.classes / in_.prototypes / unit * unit;
  const int64_t blocks = (in_.batch + attention_block - 1) / attention_block;
  return std::min(
      std::min(std::max(slab, unit), sweep_rows), blocks * attention_block);
}

template <typename T>
void Compensation<T>::prepare(T* key, bool project) {
  const int64_t d = in_.classes;
  const int64_t width = kernels_.panel_width;
  keys_.values = key;
  for (int64_t i = 0; i < in_.prototypes; ++i) {
    factors_[i] = in_.posterior ? in_.scale : in_.scale * in_.proportions[i];
    if (log_proportions_ != nullptr) {
      log_proportions_[i] = std::log(in_.proportions[i]);
    }
  }
  kernels_.prepare_score(in_.w_score, keys_);
  torch::stable::parallel_for(
      0,
      keys_.panels,
      grain_of(in_.prototypes * width * (project ? d + 8 : 8)),
      [&](int64_t begin, int64_t end) {
        if (project) {
          project_keys(begin * width, std::min(end * width, in_.hidden), key);
        }
        kernels_.pack_keys(keys_, begin, end);
      });
  kernels_.finish_keys(keys_);
}

template <typename T>
void Compensation<T>::project_keys(int64_t first, int64_t last, T* key) {
  const int64_t d = in_.classes;
  const int64_t count = in_.prototypes;
  const T* w_key = in_.w_key + first * d;
  if (!turn_keys()) {
    gemm<T>(
        {count,
         last - first,
         d,
         in_.z,
         d,
         1,
         w_key,
         1,
         d,
         key + first,
         in_.hidden,
         false});
    return;
  }
  // Where the folded keys of these units are to come.
  T* turned = keys_.folded + first * count;
  gemm<T>(
      {last - first, count, d, w_key, d, 1, in_.z, 1, d, turned, count, false});
  gemm_kernels<T>().turn(
      last - first, count, turned, count, key + first, in_.hidden);
}

template <typename T>
bool Compensation<T>::turn_keys() const {
  const int64_t width = kernels_.panel_width;
  return in_.classes >= least_turned_classes && in_.hidden % 16 == 0 &&
      in_.prototypes % width == 0 && in_.prototypes <= 2 * width;
}

template <typename T>
void Compensation<T>::project_queries(int64_t first, int64_t rows, T* query) {
  const int64_t d = in_.classes;
  gemm<T>(
      {rows,
       in_.hidden,
       d,
       in_.logits + first * d,
       d,
       1,
       in_.w_query,
       1,
       d,
       query + first * in_.hidden,
       in_.hidden,
       false});
}

template <typename T>
void Compensation<T>::attend(
    int64_t first,
    int64_t rows,
    T* query,
    T* weights) {
  for (int64_t b = first; b < first + rows; b += attention_block) {
    kernels_.attend(
        keys_,
        std::min(attention_block, first + rows - b),
        query + b * in_.hidden,
        weights + b * in_.prototypes);
  }
}

template <typename T>
void Compensation<T>::compensate(
    int64_t first,
    int64_t rows,
    const T* weights,
    T* compensated) {
  const int64_t d = in_.classes;
  gemm<T>(
      {rows,
       d,
       in_.prototypes,
       weights + first * in_.prototypes,
       in_.prototypes,
       1,
       in_.z,
       d,
       1,
       compensated + first * d,
       d,
       false,
       factors_,
       // Added last, so that sums of many prototypes are not rounded to the
       // logits' digits more than once.
       in_.logits + first * d});
}

template <typename T>
void Compensation<T>::backward(
    const T* grad_compensated,
    const T* weights,
    T* query,
    CompensationGrads& grads) {
  const int64_t d = in_.classes;
  const int64_t hidden = in_.hidden;
  const int64_t count = in_.prototypes;
  const int64_t width = kernels_.panel_width;
  const int64_t slab = slab_rows();
  T* grad_logits = data<T>(grads.logits);
  const bool in_place = grad_compensated == grad_logits;
  for (int64_t begin = 0; begin < in_.batch; begin += slab) {
    const int64_t end = std::min(begin + slab, in_.batch);
    T* grad_query =
        passes_.overwrite_query ? query + begin * hidden : grad_query_;
    for_rows(begin, end, [&](int64_t first, int64_t rows) {
      T* grad_score = grad_score_ + (first - begin) * count;
      gemm<T>(
          {rows,
           count,
           d,
           grad_compensated + first * d,
           d,
           1,
           in_.z,
           1,
           d,
           grad_score,
           count,
           false});
      kernels_.grad_scores(
          rows,
          count,
          factors_,
          weights + first * count,
          grad_score,
          row_sums_ + (first - begin));
    });
    if (grads.prototypes) {
      add_dictionary_grads(
          begin, end - begin, grad_compensated, weights, grads);
    }
    torch::stable::parallel_for(
        0,
        keys_.panels,
        grain_of(width * (end - begin) * (count + d)),
        [&](int64_t first_panel, int64_t last_panel) {
          kernels_.sweep(
              keys_,
              first_panel,
              last_panel,
              end - begin,
              query + begin * hidden,
              grad_score_,
              row_sums_,
              begin > 0,
              grad_query,
              grad_key_,
              data<T>(grads.w_score));
          const int64_t first = first_panel * width;
          gemm<T>(
              {std::min(last_panel * width, hidden) - first,
               d,
               end - begin,
               grad_query + first,
               1,
               hidden,
               in_.logits + begin * d,
               d,
               1,
               data<T>(grads.w_query) + first * d,
               d,
               begin > 0});
        });
    for_rows(begin, end, [&](int64_t first, int64_t rows) {
      gemm<T>(
          {rows,
           d,
           hidden,
           grad_query + (first - begin) * hidden,
           hidden,
           1,
           in_.w_query,
           d,
           1,
           grad_logits + first * d,
           d,
           in_place,
           nullptr,
           in_place ? nullptr : grad_compensated + first * d});
    });
  }
  torch::stable::parallel_for(
      0,
      keys_.panels,
      grain_of(width * count * d),
      [&](int64_t first_panel, int64_t last_panel) {
        const int64_t first = first_panel * width;
        gemm<T>(
            {std::min(last_panel * width, hidden) - first,
             d,
             count,
             grad_key_ + first,
             1,
             hidden,
             in_.z,
             d,
             1,
             data<T>(grads.w_key) + first * d,
             d,
             false});
      });
  if (grads.prototypes) {
    finish_dictionary_grads(grads);
  }
}

template <typename T>
void Compensation<T>::add_dictionary_grads(
    int64_t first,
    int64_t rows,
    const T* grad_compensated,
    const T* weights,
    CompensationGrads& grads) {
  const int64_t d = in_.classes;
  const int64_t count = in_.prototypes;
  torch::stable::parallel_for(
      0, count, grain_of(rows * d), [&](int64_t begin, int64_t end) {
        // The gradient of the averaged rows: weights^T grad_compensated.
        gemm<T>(
            {end - begin,
             d,
             rows,
             weights + first * count + begin,
             1,
             count,
             grad_compensated + first * d,
             d,
             1,
             data<T>(*grads.prototypes) + begin * d,
             d,
             first > 0});
        T* score_sums = data<T>(*grads.proportions);
        for (int64_t i = begin; i < end && in_.posterior; ++i) {
          double sum = first > 0 ? score_sums[i] : 0;
          for (int64_t b = 0; b < rows; ++b) {
            sum += grad_score_[b * count + i];
          }
          score_sums[i] = static_cast<T>(sum);
        }
      });
}

template <typename T>
void Compensation<T>::finish_dictionary_grads(CompensationGrads& grads) {
  const int64_t d = in_.classes;
  T* grad_z = data<T>(*grads.prototypes);
  T* grad_proportions = data<T>(*grads.proportions);
  torch::stable::parallel_for(
      0,
      in_.prototypes,
      grain_of(d * in_.hidden),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          if (!in_.posterior) {
            double sum = 0;
            for (int64_t c = 0; c < d; ++c) {
              sum += static_cast<double>(grad_z[i * d + c]) * in_.z[i * d + c];
            }
            grad_proportions[i] = static_cast<T>(in_.scale * sum);
          } else {
            // log P of an absent prototype is a constant, -inf.
            grad_proportions[i] = in_.proportions[i] > 0
                ? grad_proportions[i] / in_.proportions[i]
                : 0;
          }
          for (int64_t c = 0; c < d; ++c) {
            grad_z[i * d + c] *= factors_[i];
          }
        }
        gemm<T>(
            {end - begin,
             d,
             in_.hidden,
             grad_key_ + begin * in_.hidden,
             in_.hidden,
             1,
             in_.w_key,
             d,
             1,
             grad_z + begin * d,
             d,
             true});
      });
}

template struct CompensationInputs<float>;
template struct CompensationInputs<double>;
template class Compensation<float>;
template class Compensation<double>;

namespace {

/// What the forward pass leaves for the backward pass, in one tensor.
template <typename T>
struct Saved {
  Saved(const CompensationInputs<T>& inputs, const Tensor& saved)
      : query(data<T>(saved)),
        key(query + inputs.batch * inputs.hidden),
        weights(key + inputs.prototypes * inputs.hidden) {}

  T* query;   // [B, H], or e^2query
  T* key;     // [K, H]
  T* weights; // [B, K]
};

int64_t saved_size(const CompensationTensors& of) {
  const int64_t batch = of.logits.size(0);
  const int64_t count = of.prototypes.size(0);
  return (batch + count) * of.w_score.size(0) + batch * count;
}

std::tuple<Tensor, Tensor> compensate(
    const Tensor& logits,      // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    bool posterior,
    double scale) {
  const CompensationTensors tensors(
      logits, prototypes, proportions, w_query, w_key, w_score);
  const Tensor compensated = empty_cpu_like(tensors.logits);
  const Tensor saved = empty_cpu({saved_size(tensors)}, tensors.dtype);
  dispatch_compute_type(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CompensationInputs<T> inputs(tensors, posterior, scale);
    const Passes passes = {true, false, false};
    Arena needed;
    Compensation<T>(inputs, needed, passes);
    ArenaMemory memory(needed.bytes());
    Arena arena(memory.data());
    Compensation<T> steps(inputs, arena, passes);
    const Saved<T> to(inputs, saved);
    steps.prepare(to.key, true);
    steps.for_rows(0, inputs.batch, [&](int64_t first, int64_t rows) {
      steps.project_queries(first, rows, to.query);
      steps.attend(first, rows, to.query, to.weights);
      steps.compensate(first, rows, to.weights, data<T>(compensated));
    });
  });
  return {as_type_of(logits, compensated), saved};
}

CompensationGrads gradients(
    const CompensationTensors& tensors,
    const Tensor& grad,
    const Tensor& saved,
    bool posterior,
    double scale,
    bool dictionary,
    bool overwrite_query) {
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == tensors.logits.size(0) &&
          grad.size(1) == tensors.logits.size(1),
      "grad must be of the shape of logits");
  STD_TORCH_CHECK(
      saved.dim() == 1 && saved.size(0) == saved_size(tensors) &&
          saved.scalar_type() == tensors.dtype && saved.is_contiguous(),
      "saved must be as compensate returned it");
  const Tensor grad_compensated = as_contiguous(grad, tensors.dtype);
  CompensationGrads grads(tensors, dictionary);
  dispatch_compute_type(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CompensationInputs<T> inputs(tensors, posterior, scale);
    const Passes passes = {false, true, overwrite_query};
    Arena needed;
    Compensation<T>(inputs, needed, passes);
    ArenaMemory memory(needed.bytes());
    Arena arena(memory.data());
    Compensation<T> steps(inputs, arena, passes);
    const Saved<T> from(inputs, saved);
    steps.prepare(from.key, false);
    steps.backward(
        const_data<T>(grad_compensated), from.weights, from.query, grads);
  });
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> compensate_backward(
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
  const CompensationGrads grads = gradients(
      {logits, prototypes, proportions, w_query, w_key, w_score},
      grad,
      saved,
      posterior,
      scale,
      dictionary_grad,
      false);
  return {
      as_type_of(logits, grads.logits),
      as_type_of(prototypes, grads.prototypes),
      as_type_of(proportions, grads.proportions),
      as_type_of(w_query, grads.w_query),
      as_type_of(w_key, grads.w_key),
      as_type_of(w_score, grads.w_score)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compensate_backward_(
    const Tensor& grad,        // [B, d]
    const Tensor& logits,      // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    const Tensor& saved,       // [B H + K H + B K]
    bool posterior,
    double scale) {
  const CompensationGrads grads = gradients(
      {logits, prototypes, proportions, w_query, w_key, w_score},
      grad,
      saved,
      posterior,
      scale,
      false,
      true);
  return {
      as_type_of(logits, grads.logits),
      as_type_of(w_query, grads.w_query),
      as_type_of(w_key, grads.w_key),
      as_type_of(w_score, grads.w_score)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CPU, m) {
  m.impl("compensate", TORCH_BOX(&compensate));
  m.impl("compensate_backward", TORCH_BOX(&compensate_backward));
  m.impl("compensate_backward_", TORCH_BOX(&compensate_backward_));
}

} // namespace kdci
