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
#include <initializer_list>

namespace kdci {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Whether the operators take tensors of this type.
inline bool is_floating(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double ||
      type == ScalarType::Half || type == ScalarType::BFloat16;
}

/// The type that sums and results are kept in: float64 for float64 input,
/// float32 for everything narrower.
inline ScalarType accumulate_type(ScalarType input) {
  return input == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// An uninitialised contiguous CPU tensor of sizes[dim]. The C function behind
/// it takes a third of the time of a call through the dispatcher, which small
/// problems feel.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[4];
  int64_t stride = 1;
  STD_TORCH_CHECK(dim <= 4, "empty_cpu: more than 4 dimensions");
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const int32_t code = dtype == ScalarType::Float ? aoti_torch_dtype_float32()
      : dtype == ScalarType::Double               ? aoti_torch_dtype_float64()
      : dtype == ScalarType::Long                 ? aoti_torch_dtype_int64()
                                                  : aoti_torch_dtype_uint8();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double ||
          dtype == ScalarType::Long || dtype == ScalarType::Byte,
      "empty_cpu: unexpected type");
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_cpu(
    std::initializer_list<int64_t> sizes,
    ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline Tensor empty_cpu_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty_cpu(
      sizes.data(), static_cast<int64_t>(sizes.size()), tensor.scalar_type());
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
