// SPDX-License-Identifier: Apache-2.0
//
// The Python module kdci_ext._C. Importing it loads the operators; it offers
// only what needs no tensor.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>

#include "cpu/simd/level.h"
#include "cpu/simd/peak.h"

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

/// The best of some bursts of a millisecond or so, in 10^9 operations a second.
double fma_gflops() {
  double best = 0;
  for (int burst = 0; burst < 20; ++burst) {
    const auto start = std::chrono::steady_clock::now();
    const double operations =
        static_cast<double>(kdci::peak_kernels().multiply_add(1 << 18));
    const std::chrono::duration<double> seconds =
        std::chrono::steady_clock::now() - start;
    best = std::max(best, operations / seconds.count() / 1e9);
  }
  return best;
}

} // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of kdci_ext.";
  module.def(
      "build_info", &build_info, "How this library was built, as strings.");
  module.def(
      "fma_gflops",
      &fma_gflops,
      "Rate of float multiply-adds of one thread, measured: the limit of the "
      "kernels' floating-point work.");
}
