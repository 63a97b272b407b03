// See cuda_runtime.h.

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

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// Where `size` threads meet. A thread that is through may come back before the others have left: they still
// find the words of their own meeting, since words alternate between two places and nobody can be two
// meetings ahead.
struct Meeting {
  unsigned size = 0, arrived = 0;
  uint64_t number = 0;
  std::vector<uint32_t> words[2];
};

// Where a stack was left. Unlike swapcontext, jumps make no system call, and the sanitizer does not clear the
// memory it has of the whole stack: kernels meet so often that these would be most of the time.
using Place = void* [5];

// A thread of every block.
struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, done = false;
  Place place;
  unsigned thread = 0;
  void* fake_stack = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::unique_ptr<char[]> shared;
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;
  Place scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  bool progress = false;
} block;

__attribute__((no_sanitize("address"))) void back_to_scheduler() {
  Fiber* fiber = block.running;
  __sanitizer_start_switch_fiber(&fiber->fake_stack, block.scheduler_stack, block.scheduler_stack_bytes);
  if (__builtin_setjmp(fiber->place) == 0) __builtin_longjmp(block.scheduler, 1);
  __sanitizer_finish_switch_fiber(block.running->fake_stack, nullptr, nullptr);
}

void run_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
  while (true) {
    (*block.body)();
    block.running->done = true;
    back_to_scheduler();
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
    __builtin_longjmp(fiber.place, 1);
  }
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Leaves a word, waits for the other threads, and returns all words.
const uint32_t* meet(Meeting& meeting, unsigned at, uint32_t word) {
  const uint64_t number = meeting.number;
  uint32_t* words = meeting.words[number % 2].data();
  words[at] = word;
  block.progress = true;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.number;
  }
  while (meeting.number == number) back_to_scheduler();
  return words;
}

void prepare(Meeting& meeting, unsigned size) {
  meeting.size = size, meeting.arrived = 0, meeting.number = 0;
  for (auto& words : meeting.words) words.assign(size, 0);
}

void run_block(const cudaLaunchConfig_t& config) {
  const unsigned threads = blockDim.x;
  block.shared.reset(new char[config.dynamicSmemBytes]);
  std::memset(block.shared.get(), 0xff, config.dynamicSmemBytes);
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  prepare(block.all, threads);
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (unsigned w = 0; w < block.warps.size(); ++w)
    prepare(block.warps[w], std::min(kWarp, threads - w * kWarp));
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
    if (!block.progress) fail("waits for threads that do not come");
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

bool meet_block(bool value) {
  const uint32_t* words = meet(block.all, block.running->thread, value);
  for (unsigned t = 0; t < block.all.size; ++t) {
    if (words[t]) return true;
  }
  return false;
}

const uint32_t* exchange_all(uint32_t word) {
  Meeting& warp = block.warps[block.running->thread / kWarp];
  if (warp.size != kWarp) fail("exchanges within a warp that is not full");
  return meet(warp, block.running->thread % kWarp, word);
}

uint32_t exchange(uint32_t word, int from) { return exchange_all(word)[from]; }

void* dynamic_shared_memory() { return block.shared.get(); }

}  // namespace cuda_on_host
