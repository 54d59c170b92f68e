// SPDX-License-Identifier: Apache-2.0
//
// Stands in for CUDA's <cuda_runtime.h> so that g++ compiles the kernels of
// csrc/cuda for the host, where they can be tested without a GPU.
//
// A block's threads run as fibers, one after the other, each until its next
// barrier or shuffle. A barrier that not all threads reach, or that they reach
// at different lines, is reported as an error. The blocks of a cluster or of a
// cooperative launch have an operating system's thread each, of which one at a
// time runs, until its next barrier of the team; so every __shared__ variable
// is thread_local. Threads and blocks can be run in any order (set_seed), so a
// missing barrier shows as a result that depends on the seed. Not modelled:
// memory ordering between warps that run truly at once.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local
#define __syncthreads() cuda_emulation::block_barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes)             \
  cuda_emulation::shuffle(                              \
      mask,                                             \
      value,                                            \
      cuda_emulation::lane() ^ static_cast<int>(lanes), \
      __FILE__,                                         \
      __LINE__)
#define __shfl_sync(mask, value, lane) \
  cuda_emulation::shuffle(mask, value, lane, __FILE__, __LINE__)
// Lanes without one so far below keep their own value.
#define __shfl_up_sync(mask, value, lanes)                    \
  cuda_emulation::shuffle(                                    \
      mask,                                                   \
      value,                                                  \
      cuda_emulation::lane() < static_cast<int>(lanes)        \
          ? cuda_emulation::lane()                            \
          : cuda_emulation::lane() - static_cast<int>(lanes), \
      __FILE__,                                               \
      __LINE__)
#define __ballot_sync(mask, value) \
  cuda_emulation::ballot(mask, value, __FILE__, __LINE__)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1)
      : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace kdci::cuda {
/// The dynamic shared memory of the calling thread's block.
char* dynamic_shared_memory();
} // namespace kdci::cuda

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}

inline double rsqrt(double value) {
  return 1 / sqrt(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}

// One thread at a time runs.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

namespace cuda_emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t(256) << 10;
constexpr size_t kSharedBytes = size_t(227) << 10;

/// The device that is emulated, for the tests to choose.
struct Device {
  int clusters = 1;
  int largest_cluster = 8;
  int processors = 3;
  int shared_bytes = static_cast<int>(kSharedBytes);
};
inline Device device;

enum class Wait { kRunning, kBlock, kWarp, kTeam, kDone };

/// A copy that has been asked for and may not have been made yet.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

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
  std::vector<std::vector<Copy>> copies; // asynchronous, by commits
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0;
  unsigned current = 0;
  jmp_buf back;
  std::function<void()> body;
  char* shared = nullptr; // dynamic
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake = nullptr;
#endif
};

/// Of the block that the calling thread runs.
inline thread_local Scheduler scheduler;

inline uint64_t seed = 0; // 0: in order
inline int64_t launches = 0;

inline void set_seed(uint64_t value) {
  seed = value;
}

inline uint64_t random() {
  seed ^= seed << 13;
  seed ^= seed >> 7;
  seed ^= seed << 17;
  return seed;
}

inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    order[i] = i;
    if (seed != 0) {
      std::swap(order[i], order[random() % (i + 1)]);
    }
  }
  return order;
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

/// Runs the block until it has ended (true) or waits for its team (false).
inline bool run_block() {
  const unsigned threads = blockDim.x;
  while (true) {
    for (const unsigned t : order_of(threads)) {
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
      return true;
    }
    if (!progress) {
      if (release(0, threads, Wait::kTeam)) {
        return false;
      }
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

inline void start_block(
    unsigned block,
    dim3 blocks,
    dim3 threads,
    char* shared,
    size_t shared_bytes,
    const std::function<void()>& body) {
  blockIdx = dim3(block);
  gridDim = blocks;
  blockDim = threads;
  scheduler.body = body;
  scheduler.shared = shared;
  // Not a number, so that results show what is read before it is written.
  std::memset(shared, 0xff, shared_bytes);
  while (scheduler.fibers.size() < threads.x) {
    scheduler.fibers.push_back(std::make_unique<Fiber>());
  }
  for (unsigned t = 0; t < threads.x; ++t) {
    Fiber& fiber = *scheduler.fibers[t];
    fiber.started = false;
    fiber.wait = Wait::kRunning;
    fiber.copies.assign(1, {});
  }
}

/// Blocks that wait for each other, each in a thread of its own. One at a time
/// runs, from one barrier of the team to the next.
class Team {
 public:
  Team(unsigned blocks, const std::function<void(unsigned)>& start)
      : shared_(blocks), ended_(blocks, false) {
    for (unsigned block = 0; block < blocks; ++block) {
      threads_.emplace_back([this, block, start] { work(block, start); });
    }
  }

  void run() {
    const unsigned blocks = static_cast<unsigned>(threads_.size());
    std::vector<unsigned> order = order_of(blocks);
    size_t ended = 0;
    for (const unsigned block : order) {
      take_turn(block); // start
    }
    while (ended == 0 && error_.empty()) {
      for (const unsigned block : order_of(blocks)) {
        take_turn(block);
        ended += ended_[block] ? 1 : 0;
      }
    }
    if (ended < blocks && error_.empty()) {
      error_ = "some blocks have returned, others wait for their team";
    }
    stop_ = true;
    for (unsigned block = 0; block < blocks; ++block) {
      if (!ended_[block]) {
        take_turn(block);
      }
    }
    for (std::thread& thread : threads_) {
      thread.join();
    }
    if (!error_.empty()) {
      throw std::runtime_error(error_);
    }
  }

  /// The dynamic shared memory of a block.
  char* shared_of(unsigned block) const {
    return shared_[block];
  }

 private:
  static constexpr int kNobody = -1;

  void take_turn(unsigned block) {
    std::unique_lock<std::mutex> lock(mutex_);
    turn_ = static_cast<int>(block);
    changed_.notify_all();
    changed_.wait(lock, [&] { return turn_ == kNobody; });
  }

  void await_turn(unsigned block) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return turn_ == static_cast<int>(block); });
  }

  void end_turn() {
    const std::lock_guard<std::mutex> lock(mutex_);
    turn_ = kNobody;
    changed_.notify_all();
  }

  void work(unsigned block, const std::function<void(unsigned)>& start) {
    await_turn(block);
    start(block);
    shared_[block] = scheduler.shared;
    end_turn();
    await_turn(block);
    try {
      while (!stop_ && !run_block()) {
        end_turn();
        await_turn(block);
      }
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    ended_[block] = true;
    end_turn();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int turn_ = kNobody;
  bool stop_ = false;
  std::string error_;
  std::vector<char*> shared_;
  std::vector<bool> ended_;
  std::vector<std::thread> threads_;
};

inline Team* team = nullptr;

inline void block_barrier(const char* file, int line) {
  wait(Wait::kBlock, file, line);
}

/// Waits for all blocks of the launch.
inline void team_barrier(const char* file, int line) {
  wait(Wait::kTeam, file, line);
}

inline int lane() {
  return static_cast<int>(scheduler.current % kWarp);
}

/// Calls read(offered by the lane) for all lanes, when all have offered theirs.
template <typename T, typename Read>
void exchange(unsigned mask, T value, const char* file, int line, Read read) {
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
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned from = thread / kWarp * kWarp + lane;
    std::memcpy(&value, scheduler.fibers[from]->offered[slot], sizeof(T));
    read(static_cast<int>(lane), value);
  }
}

template <typename T>
T shuffle(unsigned mask, T value, int from, const char* file, int line) {
  T result = value;
  exchange(mask, value, file, line, [&](int lane, T offered) {
    result = lane == from ? offered : result;
  });
  return result;
}

inline unsigned ballot(unsigned mask, bool value, const char* file, int line) {
  unsigned result = 0;
  exchange(mask, value, file, line, [&](int lane, bool offered) {
    result |= offered ? 1u << lane : 0u;
  });
  return result;
}

} // namespace cuda_emulation

// -- The runtime's functions
// ---------------------------------------------------

enum cudaDeviceAttr {
  cudaDevAttrClusterLaunch,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(
    int* value,
    cudaDeviceAttr attribute,
    int) {
  const cuda_emulation::Device& device = cuda_emulation::device;
  switch (attribute) {
    case cudaDevAttrClusterLaunch:
      *value = device.clusters;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.processors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_bytes + 1024;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      break;
  }
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->sharedSizeBytes = 0;
  attributes->ptxVersion = cuda_emulation::device.clusters != 0 ? 90 : 80;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks,
    Kernel*,
    int,
    size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(
    int* clusters,
    Kernel*,
    const cudaLaunchConfig_t* config) {
  const auto wanted = static_cast<int>(config->gridDim.x);
  *clusters = wanted <= cuda_emulation::device.largest_cluster ? 1 : 0;
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config,
    void (*kernel)(Params...),
    Args... args) {
  using namespace cuda_emulation;
  ++launches;
  const dim3 blocks = config->gridDim;
  const dim3 threads = config->blockDim;
  if (threads.x % kWarp != 0 || threads.x > 1024) {
    throw std::runtime_error("not a whole number of warps, or too many");
  }
  if (config->dynamicSmemBytes > static_cast<size_t>(device.shared_bytes)) {
    throw std::runtime_error("a block has not so much shared memory");
  }
  const std::function<void()> body = [&] {
    kernel(static_cast<Params>(args)...);
  };
  const auto start = [&](unsigned block) {
    start_block(
        block,
        blocks,
        threads,
        kdci::cuda::dynamic_shared_memory(),
        config->dynamicSmemBytes,
        body);
  };
  if (config->numAttrs == 0) {
    for (const unsigned block : order_of(blocks.x)) {
      start(block);
      if (!run_block()) {
        throw std::runtime_error("these blocks are no team");
      }
    }
    return cudaSuccess;
  }
  const cudaLaunchAttribute& attribute = config->attrs[0];
  const bool grid = attribute.id == cudaLaunchAttributeCooperative;
  if (grid ? blocks.x > static_cast<unsigned>(device.processors)
           : device.clusters == 0 || attribute.val.clusterDim.x != blocks.x ||
              blocks.x > static_cast<unsigned>(device.largest_cluster)) {
    throw std::runtime_error("the device cannot run this team");
  }
  Team running(blocks.x, start);
  team = &running;
  running.run();
  team = nullptr;
  return cudaSuccess;
}
