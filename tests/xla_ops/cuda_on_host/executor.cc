// Runs a grid of blocks of threads on the host; see cuda_runtime.h.

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

Device device;
int64_t additions = 0;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, message);
  std::abort();
}

// A barrier of `size` threads, each of which leaves a word. A thread can return to the barrier before the
// others have left it. They still find the words of their own round, since words alternate between two
// buffers and no thread can be two rounds ahead.
struct Barrier {
  unsigned size = 0, arrived = 0;
  uint64_t round = 0;
  std::vector<uint32_t> words[2];
};

// A position in a stack, to jump back to. Unlike swapcontext, jumps make no system call, and the sanitizer
// does not clear its shadow memory of the whole stack. At the many barriers of kernels, these would take most
// of the time.
using JumpBuffer = void* [5];

// Runs one thread of a block. All blocks use the same fibers.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, done = false;
  JumpBuffer position;
  unsigned thread = 0;
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;
  JumpBuffer scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  bool progress = false;
} block;

__attribute__((no_sanitize("address"))) void switch_to_scheduler() {
  Fiber* fiber = block.running;
  __sanitizer_start_switch_fiber(&fiber->fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
  if (__builtin_setjmp(fiber->position) == 0) __builtin_longjmp(block.scheduler, 1);
  __sanitizer_finish_switch_fiber(block.running->fake_stack, nullptr, nullptr);
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  while (true) {
    (*block.body)();
    block.running->done = true;
    switch_to_scheduler();
  }
}

// Never returns, so it must leave no poisoned memory on the stack.
[[noreturn]] __attribute__((no_sanitize("address"))) void start(Fiber& fiber) {
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
  std::abort();
}

__attribute__((no_sanitize("address"))) void resume(Fiber& fiber) {
  block.running = &fiber;
  threadIdx = dim3(fiber.thread);
  static void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
  if (__builtin_setjmp(block.scheduler) == 0) {
    if (!fiber.started) start(fiber);
    __builtin_longjmp(fiber.position, 1);
  }
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Leaves a word, waits for the other threads, and returns all words.
const uint32_t* arrive_and_wait(Barrier& barrier, unsigned at, uint32_t word) {
  const uint64_t round = barrier.round;
  uint32_t* words = barrier.words[round % 2].data();
  words[at] = word;
  block.progress = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
  }
  while (barrier.round == round) switch_to_scheduler();
  return words;
}

void reset(Barrier& barrier, unsigned size) {
  barrier.size = size, barrier.arrived = 0, barrier.round = 0;
  for (auto& words : barrier.words) words.assign(size, 0);
}

void run_block(const cudaLaunchConfig_t& config) {
  const unsigned threads = blockDim.x;
  block.shared.reset(new char[config.dynamicSmemBytes]);
  std::memset(block.shared.get(), 0xff, config.dynamicSmemBytes);
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  reset(block.all, threads);
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < block.warps.size(); ++w)
    reset(block.warps[w], std::min(kWarp, threads - w * kWarp));
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.done = false, fiber.thread = t;
  }
  for (unsigned left = threads; left > 0;) {
    block.progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[blockIdx.x % 2 ? threads - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      if (fiber.done) --left, block.progress = true;
    }
    if (!block.progress) fail("deadlock: waits for threads that do not arrive");
  }
}

}  // namespace

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024 ||
      config.dynamicSmemBytes > static_cast<size_t>(device.shared_bytes)) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config.gridDim, blockDim = config.blockDim;
  block.body = &thread;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(config);
  return cudaSuccess;
}

bool sync_block(bool value) {
  const uint32_t* words = arrive_and_wait(block.all, block.running->thread, value);
  for (unsigned t = 0; t < block.all.size; ++t) {
    if (words[t]) return true;
  }
  return false;
}

const uint32_t* exchange_all(uint32_t word) {
  Barrier& warp = block.warps[block.running->thread / kWarp];
  if (warp.size != kWarp) fail("exchange within a warp of fewer than 32 threads");
  return arrive_and_wait(warp, block.running->thread % kWarp, word);
}

uint32_t exchange(uint32_t word, int from) { return exchange_all(word)[from]; }

void* dynamic_shared_memory() { return block.shared.get(); }

}  // namespace cuda_on_host
