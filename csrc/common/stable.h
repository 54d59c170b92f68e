// SPDX-License-Identifier: Apache-2.0
//
// The part of LibTorch's stable ABI this extension uses, under short names.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace kdci {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The type that sums and results are kept in: float64 for float64 input,
/// float32 for everything narrower.
inline ScalarType accumulate_type(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// A contiguous tensor of type `dtype` with the values of `tensor`; `tensor`
/// itself where it already is one, since a dispatcher call costs about 1 us.
inline Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() == dtype) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  }
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

} // namespace kdci
