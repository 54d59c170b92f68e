// SPDX-License-Identifier: Apache-2.0
//
// The Python module kdci_ext._C. Importing it loads the operators; it offers
// only what needs no tensor.
#include <pybind11/pybind11.h>

#include "cpu/simd/level.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = KDCI_VERSION;
  info["compiler"] = KDCI_COMPILER;
  info["torch_target"] = KDCI_TORCH_TARGET;
  info["torch_headers"] = KDCI_TORCH_HEADERS;
  info["cuda"] = KDCI_CUDA_VERSION;
  info["cuda_archs"] = KDCI_CUDA_ARCHS;
  info["build_type"] = KDCI_BUILD_TYPE;
  info["sanitizers"] = KDCI_SANITIZERS;
  info["simd"] = kdci::simd_level_name(kdci::simd_level());
  return info;
}

} // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of kdci_ext.";
  module.def(
      "build_info", &build_info, "How this library was built, as strings.");
}
