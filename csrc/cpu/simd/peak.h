// SPDX-License-Identifier: Apache-2.0
//
// The processor's own limit, to measure kernels against.
#pragma once

#include <cstdint>

#include "level.h"

namespace kdci {

struct PeakKernels {
  /// Runs `rounds` of independent multiply-adds of floats that stay in
  /// registers; returns how many operations that were, two for each.
  int64_t (*multiply_add)(int64_t rounds);
};

KDCI_DECLARE_PER_LEVEL(PeakKernels, peak_kernels)

} // namespace kdci
