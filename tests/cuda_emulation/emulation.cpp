// SPDX-License-Identifier: Apache-2.0
//
// The CUDA operators, with their kernels compiled for the host, as operators
// for CPU tensors in the namespace kdci_ext_emulated.
#include <torch/csrc/stable/accelerator.h>

#include "../../csrc/common/stable.h"
#include "cuda_pipeline.h"
#include "cuda_runtime.h"

// What `extern __shared__` names.
namespace kdci::cuda {
alignas(16) thread_local char dynamic_shared[cuda_emulation::kSharedBytes];

char* dynamic_shared_memory() {
  return dynamic_shared;
}
} // namespace kdci::cuda

#define kdci_ext kdci_ext_emulated
#define CUDA CPU
#include "../../csrc/cuda/operators.cu"
#include "../../csrc/cuda/team.cuh"
#include "../../csrc/registration.cpp"

// What the operators ask of a PyTorch with CUDA.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(
    int32_t,
    DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return 0;
}

// For the tests, through ctypes.
__attribute__((visibility("default"))) void set_seed(uint64_t seed) {
  cuda_emulation::set_seed(seed);
}

// largest_cluster 0: a device without clusters.
__attribute__((visibility("default"))) void set_device(
    int largest_cluster,
    int processors,
    int shared_bytes) {
  cuda_emulation::device = {
      largest_cluster > 0, largest_cluster, processors, shared_bytes};
}

__attribute__((visibility("default"))) int64_t count_launches() {
  return cuda_emulation::launches;
}
}

// -- Kernels that the emulation itself is tested by ---------------------------

namespace {

// Half of the threads of a warp skip a barrier.
void divergent_kernel(int* out) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

// Reads what a neighbour wrote, with or without the barrier between.
void neighbour_kernel(int* out, bool with_barrier) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 1 + static_cast<int>(threadIdx.x);
  if (with_barrier) {
    __syncthreads();
  }
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

// Reads what the next block of the team wrote, with or without the barrier
// between.
template <typename Team>
void next_block_kernel(int* out, int* global, bool with_barrier) {
  const Team team;
  const int rank = team.rank();
  int* shared = reinterpret_cast<int*>(kdci::cuda::dynamic_shared);
  if (threadIdx.x == 0) {
    *team.box(shared, global, 1, rank) = 0;
  }
  team.sync();
  if (threadIdx.x == 0) {
    *team.box(shared, global, 1, rank) = rank + 1;
  }
  if (with_barrier) {
    team.sync();
  }
  if (threadIdx.x == 0) {
    out[rank] = *team.box(shared, global, 1, (rank + 1) % team.size());
  }
  team.sync();
}

// One block leaves the others waiting.
void deserting_kernel() {
  const kdci::cuda::GridTeam team;
  if (team.rank() > 0) {
    team.sync();
  }
}

// Uses a copy that may not have come, or does wait for it.
void copying_kernel(const int* from, int* out, bool waits) {
  int* shared = reinterpret_cast<int*>(kdci::cuda::dynamic_shared);
  __pipeline_memcpy_async(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(waits ? 0 : 1);
  out[threadIdx.x] = shared[4 * threadIdx.x];
}

template <typename Team>
bool next_blocks_see_each_other(bool cooperative, bool with_barrier) {
  int out[3];
  int global[3];
  const kdci::cuda::TeamLaunch launch(cooperative, 3, 64, nullptr);
  cudaLaunchKernelEx(
      &launch.config,
      next_block_kernel<Team>,
      &out[0],
      &global[0],
      with_barrier);
  return out[0] == 2 && out[1] == 3 && out[2] == 1;
}

} // namespace

extern "C" {

__attribute__((visibility("default"))) bool teams_see_each_other(
    bool cooperative,
    bool with_barrier) {
  return cooperative
      ? next_blocks_see_each_other<kdci::cuda::GridTeam>(true, with_barrier)
      : next_blocks_see_each_other<kdci::cuda::ClusterTeam>(
            false, with_barrier);
}

__attribute__((visibility("default"))) bool detects_deserters() {
  const kdci::cuda::TeamLaunch launch(true, 2, 0, nullptr);
  try {
    cudaLaunchKernelEx(&launch.config, deserting_kernel);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

__attribute__((visibility("default"))) bool copies_come(bool waits) {
  int from[128];
  int out[32];
  for (int i = 0; i < 128; ++i) {
    from[i] = i + 1;
  }
  const kdci::cuda::TeamLaunch launch(true, 1, 1024, nullptr);
  cudaLaunchConfig_t config = launch.config;
  config.blockDim = dim3(32);
  cudaLaunchKernelEx(&config, copying_kernel, &from[0], &out[0], waits);
  return out[0] == 1 && out[31] == 125;
}

__attribute__((visibility("default"))) bool detects_divergence() {
  int out[64];
  try {
    kdci::cuda::launch(divergent_kernel, 1, 64, nullptr, &out[0]);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

__attribute__((visibility("default"))) bool neighbours_see_each_other(
    bool with_barrier) {
  int out[64];
  kdci::cuda::launch(neighbour_kernel, 1, 64, nullptr, &out[0], with_barrier);
  for (int i = 0; i < 64; ++i) {
    if (out[i] != 1 + (i + 1) % 64) {
      return false;
    }
  }
  return true;
}
}
