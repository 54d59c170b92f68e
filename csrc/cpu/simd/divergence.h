// SPDX-License-Identifier: Apache-2.0
//
// The distillation loss and its gradient.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

template <typename T>
struct DivergenceKernels {
  /// sum over up to attention_block rows of KL(softmax(teacher * f) ||
  /// softmax(student * f)), with f = inverse_temperature; with grad_factor != 0
  /// the student is replaced by grad_factor * (softmax(student * f) -
  /// softmax(teacher * f)).
  double (*divergence)(
      int64_t rows,
      int64_t classes,
      T* student,       // [rows, classes]
      const T* teacher, // [rows, classes]
      T inverse_temperature,
      T grad_factor);
};

KDCI_DECLARE_PER_TYPE(DivergenceKernels, divergence_kernels)

} // namespace kdci
