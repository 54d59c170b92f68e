// SPDX-License-Identifier: Apache-2.0
#include "compensation.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "simd/gemm.h"

namespace kdci {

CompensationTensors::CompensationTensors(
    const Tensor& logits,
    const Tensor& prototypes,
    const Tensor& proportions,
    const Tensor& w_query,
    const Tensor& w_key,
    const Tensor& w_score,
    bool teacher_is_double)
    : dtype(ScalarType::Float) {
  bool is_double = teacher_is_double;
  for (const Tensor* tensor :
       {&logits, &prototypes, &proportions, &w_query, &w_key, &w_score}) {
    is_double |= tensor->scalar_type() == ScalarType::Double;
  }
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.size(1) >= 1,
      "logits must be of shape [B, d]");
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
  dtype = is_double ? ScalarType::Double : ScalarType::Float;
  this->logits = as_contiguous(logits, dtype);
  this->prototypes = as_contiguous(prototypes, dtype);
  this->proportions = as_contiguous(proportions, dtype);
  this->w_query = as_contiguous(w_query, dtype);
  this->w_key = as_contiguous(w_key, dtype);
  this->w_score = as_contiguous(w_score, dtype);
}

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
    : logits(torch::stable::empty_like(tensors.logits)),
      prototypes(
          dictionary ? torch::stable::empty_like(tensors.prototypes)
                     : empty_cpu({0}, tensors.dtype)),
      proportions(
          dictionary ? torch::stable::empty_like(tensors.proportions)
                     : empty_cpu({0}, tensors.dtype)),
      w_query(torch::stable::empty_like(tensors.w_query)),
      w_key(torch::stable::empty_like(tensors.w_key)),
      w_score(torch::stable::empty_like(tensors.w_score)),
      dictionary(dictionary) {}

template <typename T>
Compensation<T>::Compensation(
    const CompensationInputs<T>& inputs,
    Arena& arena,
    bool grads)
    : in_(inputs), kernels_(attention_kernels<T>()) {
  const int64_t width = kernels_.panel_width;
  keys_.count = in_.prototypes;
  keys_.hidden = in_.hidden;
  keys_.panels = (in_.hidden + width - 1) / width;
  keys_.padded = keys_.panels * width;
  keys_.values = arena.take<T>(keys_.count * keys_.padded);
  keys_.exponentials = arena.take<T>(keys_.count * keys_.padded);
  keys_.w_score = arena.take<T>(keys_.padded);
  keys_.panel_largest = arena.take<T>(keys_.panels);
  keys_.panel_sum = arena.take<T>(keys_.panels);
  prior_ = arena.take<T>(in_.prototypes * in_.classes);
  log_proportions_ = in_.posterior ? arena.take<T>(in_.prototypes) : nullptr;
  direct_ = arena.take<uint8_t>(in_.batch / attention_block + 1);
  if (grads) {
    // The projected keys are packed before there are activations.
    Arena early(arena);
    projected_ = early.take<T>(in_.prototypes * in_.hidden);
    arena.include(early);
    activations_ = arena.take<T>(in_.batch * keys_.padded);
    grad_score_ = arena.take<T>(in_.batch * in_.prototypes);
    row_sums_ = arena.take<T>(in_.batch);
    grad_w_score_ = arena.take<T>(keys_.padded);
  }
}

template <typename T>
void Compensation<T>::prepare(const T* key, T* projected) {
  const int64_t d = in_.classes;
  if (projected == nullptr) {
    projected = projected_;
  }
  const int64_t width = kernels_.panel_width;
  torch::stable::parallel_for(
      0,
      keys_.panels,
      grain_of(in_.prototypes * width * (key == nullptr ? d + 8 : 8)),
      [&](int64_t begin, int64_t end) {
        if (key == nullptr) {
          const int64_t first = begin * width;
          const int64_t units = std::min(end * width, in_.hidden) - first;
          gemm(
              in_.prototypes,
              units,
              d,
              T(1),
              in_.z,
              d,
              1,
              in_.w_key + first * d,
              1,
              d,
              projected + first,
              in_.hidden,
              false);
        }
        kernels_.pack_keys(key == nullptr ? projected : key, keys_, begin, end);
        // The prototypes are shared out along with the panels.
        const int64_t last = end * in_.prototypes / keys_.panels;
        for (int64_t i = begin * in_.prototypes / keys_.panels; i < last; ++i) {
          const T factor =
              in_.posterior ? in_.scale : in_.scale * in_.proportions[i];
          for (int64_t c = 0; c < d; ++c) {
            prior_[i * d + c] = factor * in_.z[i * d + c];
          }
        }
      });
  kernels_.finish_keys(in_.w_score, keys_);
  for (int64_t i = 0; i < in_.prototypes && in_.posterior; ++i) {
    log_proportions_[i] = std::log(in_.proportions[i]);
  }
}

template <typename T>
void Compensation<T>::project_queries(
    int64_t first,
    int64_t rows,
    T* query,
    int64_t stride) {
  const int64_t d = in_.classes;
  gemm(
      rows,
      in_.hidden,
      d,
      T(1),
      in_.logits + first * d,
      d,
      1,
      in_.w_query,
      1,
      d,
      query + first * stride,
      stride,
      false);
}

template <typename T>
void Compensation<T>::attend(
    int64_t first,
    int64_t rows,
    const T* query,
    int64_t stride,
    bool keep,
    T* weights) {
  for (int64_t b = first; b < first + rows; b += attention_block) {
    kernels_.attend(
        keys_,
        std::min(attention_block, first + rows - b),
        query + b * stride,
        stride,
        log_proportions_,
        keep ? activations_ + b * keys_.padded : nullptr,
        direct_ + b / attention_block,
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
  gemm(
      rows,
      d,
      in_.prototypes,
      T(1),
      weights + first * in_.prototypes,
      in_.prototypes,
      1,
      prior_,
      d,
      1,
      compensated + first * d,
      d,
      false);
  // Added last, so that sums of many prototypes are not rounded to the
  // logits' digits more than once.
  for (int64_t i = first * d; i < (first + rows) * d; ++i) {
    compensated[i] += in_.logits[i];
  }
}

template <typename T>
void Compensation<T>::activate(int64_t first, int64_t rows, const T* query) {
  for (int64_t b = first; b < first + rows; b += attention_block) {
    kernels_.activate(
        keys_,
        std::min(attention_block, first + rows - b),
        query + b * in_.hidden,
        in_.hidden,
        activations_ + b * keys_.padded,
        direct_ + b / attention_block);
  }
}

template <typename T>
void Compensation<T>::grad_scores(
    int64_t first,
    int64_t rows,
    const T* weights,
    const T* grad_compensated) {
  const int64_t d = in_.classes;
  T* grad = grad_score_ + first * in_.prototypes;
  gemm(
      rows,
      in_.prototypes,
      d,
      T(1),
      grad_compensated + first * d,
      d,
      1,
      prior_,
      1,
      d,
      grad,
      in_.prototypes,
      false);
  kernels_.grad_scores(
      rows,
      in_.prototypes,
      weights + first * in_.prototypes,
      grad,
      grad,
      row_sums_ + first);
}

template <typename T>
void Compensation<T>::grad_dictionary(
    const T* weights,
    CompensationGrads& grads) {
  const int64_t d = in_.classes;
  const int64_t count = in_.prototypes;
  T* grad_z = data<T>(grads.prototypes);
  T* grad_proportions = data<T>(grads.proportions);
  const int64_t terms = d * (in_.batch + in_.hidden);
  torch::stable::parallel_for(
      0, count, grain_of(terms), [&](int64_t begin, int64_t end) {
        // The gradient of the averaged rows: weights^T grad_compensated.
        gemm(
            end - begin,
            d,
            in_.batch,
            T(1),
            weights + begin,
            1,
            count,
            const_data<T>(grads.logits),
            d,
            1,
            grad_z + begin * d,
            d,
            false);
        for (int64_t i = begin; i < end; ++i) {
          double sum = 0;
          if (!in_.posterior) {
            for (int64_t c = 0; c < d; ++c) {
              sum += static_cast<double>(grad_z[i * d + c]) * in_.z[i * d + c];
            }
            grad_proportions[i] = static_cast<T>(in_.scale * sum);
          } else {
            for (int64_t b = 0; b < in_.batch; ++b) {
              sum += grad_score_[b * count + i];
            }
            // log P of an absent prototype is a constant, -inf.
            grad_proportions[i] = in_.proportions[i] > 0
                ? static_cast<T>(sum / in_.proportions[i])
                : 0;
          }
          const T factor =
              in_.posterior ? in_.scale : in_.scale * in_.proportions[i];
          for (int64_t c = 0; c < d; ++c) {
            grad_z[i * d + c] *= factor;
          }
        }
        gemm(
            end - begin,
            d,
            in_.hidden,
            T(1),
            grad_key_ + begin * keys_.padded,
            keys_.padded,
            1,
            in_.w_key,
            d,
            1,
            grad_z + begin * d,
            d,
            true);
      });
}

template <typename T>
void Compensation<T>::backward(const T* weights, CompensationGrads& grads) {
  const int64_t d = in_.classes;
  // The gradient of the keys takes the place of what no block of queries reads;
  // only where some are direct and some are not it needs memory of its own.
  const int64_t blocks = (in_.batch + attention_block - 1) / attention_block;
  const int64_t direct = std::count(direct_, direct_ + blocks, uint8_t(1));
  Tensor memory;
  if (direct == 0) {
    grad_key_ = keys_.values;
  } else if (direct == blocks) {
    grad_key_ = keys_.exponentials;
  } else {
    memory =
        empty_cpu({keys_.count * keys_.padded}, grads.logits.scalar_type());
    grad_key_ = data<T>(memory);
  }
  const int64_t width = kernels_.panel_width;
  const int64_t terms = width * in_.batch * (in_.prototypes + d);
  torch::stable::parallel_for(
      0, keys_.panels, grain_of(terms), [&](int64_t begin, int64_t end) {
        kernels_.sweep(
            keys_,
            begin,
            end,
            in_.batch,
            activations_,
            direct_,
            grad_score_,
            row_sums_,
            grad_key_,
            grad_w_score_);
        const int64_t first = begin * width;
        const int64_t units = std::min(end * width, in_.hidden) - first;
        std::copy_n(
            grad_w_score_ + first, units, data<T>(grads.w_score) + first);
        gemm(
            units,
            d,
            in_.batch,
            T(1),
            activations_ + first,
            1,
            keys_.padded,
            in_.logits,
            d,
            1,
            data<T>(grads.w_query) + first * d,
            d,
            false);
        gemm(
            units,
            d,
            in_.prototypes,
            T(1),
            grad_key_ + first,
            1,
            keys_.padded,
            in_.z,
            d,
            1,
            data<T>(grads.w_key) + first * d,
            d,
            false);
      });
  if (grads.dictionary) {
    grad_dictionary(weights, grads);
  }
  for_rows([&](int64_t first, int64_t rows) {
    gemm(
        rows,
        d,
        in_.hidden,
        T(1),
        activations_ + first * keys_.padded,
        keys_.padded,
        1,
        in_.w_query,
        d,
        1,
        data<T>(grads.logits) + first * d,
        d,
        true);
  });
}

template struct CompensationInputs<float>;
template struct CompensationInputs<double>;
template class Compensation<float>;
template class Compensation<double>;

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> compensate(
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
  const int64_t batch = logits.size(0);
  const int64_t count = prototypes.size(0);
  const int64_t hidden = w_score.size(0);
  const Tensor compensated = torch::stable::empty_like(tensors.logits);
  const Tensor weights = empty_cpu({batch, count}, tensors.dtype);
  const Tensor query = empty_cpu({batch, hidden}, tensors.dtype);
  const Tensor key = empty_cpu({count, hidden}, tensors.dtype);
  dispatch_compute_type(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CompensationInputs<T> inputs(tensors, posterior, scale);
    Arena needed;
    Compensation<T>(inputs, needed, false);
    const Tensor memory = empty_cpu({needed.bytes()}, ScalarType::Byte);
    Arena arena(memory.mutable_data_ptr());
    Compensation<T> steps(inputs, arena, false);
    steps.prepare(nullptr, data<T>(key));
    steps.for_rows([&](int64_t first, int64_t rows) {
      steps.project_queries(first, rows, data<T>(query), hidden);
      steps.attend(
          first, rows, data<T>(query), hidden, false, data<T>(weights));
      steps.compensate(first, rows, data<T>(weights), data<T>(compensated));
    });
  });
  return {as_type_of(logits, compensated), weights, query, key};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> compensate_backward(
    const Tensor& grad,        // [B, d]
    const Tensor& logits,      // [B, d]
    const Tensor& prototypes,  // [K, d]
    const Tensor& proportions, // [K]
    const Tensor& w_query,     // [H, d]
    const Tensor& w_key,       // [H, d]
    const Tensor& w_score,     // [H]
    const Tensor& weights,     // [B, K]
    const Tensor& query,       // [B, H]
    const Tensor& key,         // [K, H]
    bool posterior,
    double scale,
    bool dictionary_grad) {
  const CompensationTensors tensors(
      logits, prototypes, proportions, w_query, w_key, w_score);
  const int64_t batch = logits.size(0);
  const int64_t count = prototypes.size(0);
  const int64_t hidden = w_score.size(0);
  STD_TORCH_CHECK(
      grad.dim() == 2 && grad.size(0) == batch &&
          grad.size(1) == logits.size(1),
      "grad must be of the shape of logits");
  STD_TORCH_CHECK(
      weights.dim() == 2 && weights.size(0) == batch &&
          weights.size(1) == count && query.dim() == 2 &&
          query.size(0) == batch && query.size(1) == hidden && key.dim() == 2 &&
          key.size(0) == count && key.size(1) == hidden,
      "weights, query and key must be as compensate returned them");
  const Tensor saved_weights = as_contiguous(weights, tensors.dtype);
  const Tensor saved_query = as_contiguous(query, tensors.dtype);
  const Tensor saved_key = as_contiguous(key, tensors.dtype);
  const Tensor grad_compensated = as_contiguous(grad, tensors.dtype);
  CompensationGrads grads(tensors, dictionary_grad);
  dispatch_compute_type(tensors.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CompensationInputs<T> inputs(tensors, posterior, scale);
    Arena needed;
    Compensation<T>(inputs, needed, true);
    const Tensor memory = empty_cpu({needed.bytes()}, ScalarType::Byte);
    Arena arena(memory.mutable_data_ptr());
    Compensation<T> steps(inputs, arena, true);
    const T* grad_data = const_data<T>(grad_compensated);
    steps.prepare(const_data<T>(saved_key), nullptr);
    steps.for_rows([&](int64_t first, int64_t rows) {
      const int64_t d = inputs.classes;
      std::copy_n(
          grad_data + first * d, rows * d, data<T>(grads.logits) + first * d);
      steps.activate(first, rows, const_data<T>(saved_query));
      steps.grad_scores(first, rows, const_data<T>(saved_weights), grad_data);
    });
    steps.backward(const_data<T>(saved_weights), grads);
  });
  return {
      as_type_of(logits, grads.logits),
      as_type_of(prototypes, grads.prototypes),
      as_type_of(proportions, grads.proportions),
      as_type_of(w_query, grads.w_query),
      as_type_of(w_key, grads.w_key),
      as_type_of(w_score, grads.w_score)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CPU, m) {
  m.impl("compensate", TORCH_BOX(&compensate));
  m.impl("compensate_backward", TORCH_BOX(&compensate_backward));
}

} // namespace kdci
