// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUDA's <cuda_runtime.h> so that g++ compiles the kernels of
// csrc/cuda for the host, where they can be tested without a GPU.
//
// A block's threads run as fibers, one after the other, each until its next
// barrier or shuffle. A barrier that not all threads reach, or that they reach
// at different lines, is reported as an error. Threads and blocks can be run in
// any order (set_seed), so a missing barrier shows as a result that depends on
// the seed. Not modelled: memory ordering between warps that run truly at once.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
// Blocks run one after the other, so a static variable is shared by the
// threads of one block alone.
#define __shared__ static
#define __syncthreads() cuda_emulation::block_barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  cuda_emulation::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
      : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t(256) << 10;

enum class Wait { kRunning, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t first; // used once, to get onto the fiber's stack
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false;
  Wait wait = Wait::kRunning;
  const char* file = "";
  int line = 0;
  // Two slots, because a lane may offer its next value before its neighbour
  // has read this one; it cannot get further ahead than that.
  char offered[2][16];
  unsigned shuffles = 0;
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;
  unsigned current = 0;
  jmp_buf back;
  std::function<void()> body;
  uint64_t seed = 0; // 0: in order
  int64_t launches = 0;
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake = nullptr;
#endif

  uint64_t random() {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
  }

  std::vector<unsigned> order(unsigned count) {
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) {
      order[i] = i;
      if (seed != 0) {
        std::swap(order[i], order[random() % (i + 1)]);
      }
    }
    return order;
  }
};

inline Scheduler scheduler;

inline void set_seed(uint64_t seed) {
  scheduler.seed = seed;
}

/// Leaves the current fiber until the scheduler lets it go on.
inline void wait(Wait what, const char* file, int line) {
  Fiber& fiber = *scheduler.fibers[scheduler.current];
  fiber.wait = what;
  fiber.file = file;
  fiber.line = line;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(
      what == Wait::kDone ? nullptr : &fake,
      scheduler.stack,
      scheduler.stack_bytes);
#endif
  if (_setjmp(fiber.resume) == 0) {
    _longjmp(scheduler.back, 1);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(
      nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  scheduler.body();
  wait(Wait::kDone, "", 0);
}

inline void resume(unsigned thread) {
  Fiber& fiber = *scheduler.fibers[thread];
  scheduler.current = thread;
  threadIdx = dim3(thread, 0, 0);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(
      &scheduler.fake, fiber.stack.get(), kStackBytes);
#endif
  if (_setjmp(scheduler.back) == 0) {
    if (fiber.started) {
      _longjmp(fiber.resume, 1);
    }
    fiber.started = true;
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStackBytes;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, fiber_main, 0);
    setcontext(&fiber.first);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(scheduler.fake, nullptr, nullptr);
#endif
}

/// Releases threads [begin, end) if all of them wait for `what` at one place.
inline bool release(unsigned begin, unsigned end, Wait what) {
  const Fiber& first = *scheduler.fibers[begin];
  for (unsigned t = begin; t < end; ++t) {
    const Fiber& fiber = *scheduler.fibers[t];
    if (fiber.wait != what || fiber.line != first.line ||
        std::strcmp(fiber.file, first.file) != 0) {
      return false;
    }
  }
  for (unsigned t = begin; t < end; ++t) {
    scheduler.fibers[t]->wait = Wait::kRunning;
  }
  return true;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  while (scheduler.fibers.size() < threads) {
    scheduler.fibers.push_back(std::make_unique<Fiber>());
  }
  for (unsigned t = 0; t < threads; ++t) {
    scheduler.fibers[t]->started = false;
    scheduler.fibers[t]->wait = Wait::kRunning;
  }
  while (true) {
    for (const unsigned t : scheduler.order(threads)) {
      if (scheduler.fibers[t]->wait == Wait::kRunning) {
        resume(t);
      }
    }
    bool progress = release(0, threads, Wait::kBlock);
    unsigned done = 0;
    for (unsigned t = 0; t < threads; t += kWarp) {
      progress |= release(t, t + kWarp, Wait::kWarp);
    }
    for (unsigned t = 0; t < threads; ++t) {
      done += scheduler.fibers[t]->wait == Wait::kDone ? 1 : 0;
    }
    if (done == threads) {
      return;
    }
    if (!progress) {
      std::string places;
      for (unsigned t = 0; t < threads && places.size() < 400; ++t) {
        const Fiber& fiber = *scheduler.fibers[t];
        places += "\n  thread " + std::to_string(t) +
            (fiber.wait == Wait::kDone ? " has returned"
                                       : std::string(" waits at ") +
                     fiber.file + ":" + std::to_string(fiber.line));
      }
      throw std::runtime_error("divergent barrier or shuffle:" + places);
    }
  }
}

inline void block_barrier(const char* file, int line) {
  wait(Wait::kBlock, file, line);
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int lanes, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "CUDA shuffles words of 4 and 8 bytes");
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "only full-warp shuffles are emulated\n");
    std::abort();
  }
  const unsigned thread = scheduler.current;
  Fiber& mine = *scheduler.fibers[thread];
  const unsigned slot = mine.shuffles++ % 2;
  std::memcpy(mine.offered[slot], &value, sizeof(T));
  wait(Wait::kWarp, file, line);
  const Fiber& other = *scheduler.fibers[thread ^ static_cast<unsigned>(lanes)];
  std::memcpy(&value, other.offered[slot], sizeof(T));
  return value;
}

} // namespace cuda_emulation

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config,
    void (*kernel)(Params...),
    Args... args) {
  using cuda_emulation::scheduler;
  ++scheduler.launches;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (blockDim.x % cuda_emulation::kWarp != 0 || blockDim.x > 1024) {
    throw std::runtime_error("not a whole number of warps, or too many");
  }
  scheduler.body = [&] { kernel(static_cast<Params>(args)...); };
  for (const unsigned block : scheduler.order(gridDim.x)) {
    blockIdx = dim3(block, 0, 0);
    cuda_emulation::run_block();
  }
  return cudaSuccess;
}
