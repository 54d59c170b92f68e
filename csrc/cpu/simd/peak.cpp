// SPDX-License-Identifier: Apache-2.0
#include "peak.h"

#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

/// Makes a value unknown to the compiler, so that nothing is computed in
/// advance or only once.
inline void forget(Vec<float>& value) {
#if defined(KDCI_SIMD_X86)
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+w"(value));
#endif
}

int64_t multiply_add(int64_t rounds) {
  // As many as it takes to hide the latency, and as registers hold.
  constexpr int count = 12;
  Vec<float> sums[count] = {};
  Vec<float> factor = broadcast(0.5f);
  for (int i = 0; i < count; ++i) {
    forget(sums[i]);
  }
  for (int64_t round = 0; round < rounds; ++round) {
    forget(factor);
#pragma GCC unroll 12
    for (int i = 0; i < count; ++i) {
      sums[i] = sums[i] * factor + factor;
    }
  }
  for (int i = 0; i < count; ++i) {
    forget(sums[i]);
  }
  return 2 * count * lanes<float> * rounds;
}

} // namespace

extern const PeakKernels peak_kernels = {multiply_add};

} // namespace kdci::KDCI_SIMD
