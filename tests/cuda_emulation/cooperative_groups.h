// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUDA's <cooperative_groups.h>: see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const {
    cuda_emulation::team_barrier(__FILE__, __LINE__);
  }
};

struct cluster_group {
  void sync() const {
    cuda_emulation::team_barrier(__FILE__, __LINE__);
  }
  template <typename T>
  T* map_shared_rank(T* mine, int rank) const {
    using namespace cuda_emulation;
    const auto offset = reinterpret_cast<char*>(mine) - scheduler.shared;
    char* shared = team->shared_of(static_cast<unsigned>(rank));
    return reinterpret_cast<T*>(shared + offset);
  }
};

inline grid_group this_grid() {
  return {};
}

inline cluster_group this_cluster() {
  return {};
}

} // namespace cooperative_groups
