// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUDA's <cuda_pipeline.h>. Copies are made as late as they may
// be, so that results show where they are not waited for.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  using namespace cuda_emulation;
  const auto aligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % bytes == 0;
  };
  if (!aligned(to) || !aligned(from)) {
    std::fprintf(stderr, "misaligned asynchronous copy\n");
    std::abort();
  }
  if (cuda_emulation::seed != 0 && cuda_emulation::random() % 2 == 0) {
    std::memcpy(to, from, bytes);
    return;
  }
  scheduler.fibers[scheduler.current]->copies.back().push_back(
      {to, from, bytes});
}

inline void __pipeline_commit() {
  using namespace cuda_emulation;
  scheduler.fibers[scheduler.current]->copies.emplace_back();
}

inline void __pipeline_wait_prior(size_t commits) {
  using namespace cuda_emulation;
  auto& copies = scheduler.fibers[scheduler.current]->copies;
  while (copies.size() > commits + 1) { // the last is not committed yet
    for (const Copy& copy : copies.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    copies.erase(copies.begin());
  }
}
