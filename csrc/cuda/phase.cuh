// SPDX-License-Identifier: Apache-2.0
//
// A phase is a step of an algorithm that many blocks work on and that needs
// all results of the step before it. `Phase::run(plan, block, blocks)` does the
// share of one block. Large inputs run each phase as a launch of its own; small
// ones run all phases in one block, with barriers between them.
#pragma once

#include "launch.cuh"

namespace kdci::cuda {

/// Threads of phases that only one block works on.
constexpr int kSolverThreads = 512;

template <typename Phase, typename Plan, typename... Args>
__global__ void __launch_bounds__(kThreads)
    phase_kernel(const Plan plan, Args... args) {
  Phase::run(plan, blockIdx.x, gridDim.x, args...);
}

template <typename Phase, typename Plan, typename... Args>
__global__ void __launch_bounds__(kSolverThreads)
    solver_kernel(const Plan plan, Args... args) {
  Phase::run(plan, 0, 1, args...);
}

/// Runs each phase as a launch: `run` with a block for each work item, `solve`
/// in one block. The host never learns what the device finds.
template <typename Plan>
struct AsLaunches {
  static constexpr bool kOnDevice = false;
  const Plan& plan;
  cudaStream_t stream;

  template <typename Phase, typename... Args>
  void run(int64_t items, Args... args) const {
    launch(
        phase_kernel<Phase, Plan, Args...>,
        items,
        kThreads,
        stream,
        plan,
        args...);
  }
  template <typename Phase, typename... Args>
  void solve(Args... args) const {
    launch(
        solver_kernel<Phase, Plan, Args...>,
        1,
        kSolverThreads,
        stream,
        plan,
        args...);
  }
};

/// Runs all phases in the block that calls it: each is complete, and its
/// results seen by all threads, before the next one starts.
template <typename Plan>
struct InOneBlock {
  static constexpr bool kOnDevice = true;
  const Plan& plan;

  template <typename Phase, typename... Args>
  __device__ void run(int64_t, Args... args) const {
    Phase::run(plan, 0, 1, args...);
    __syncthreads();
  }
  template <typename Phase, typename... Args>
  __device__ void solve(Args... args) const {
    run<Phase>(1, args...);
  }
};

} // namespace kdci::cuda
