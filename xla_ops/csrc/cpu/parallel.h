// Parallel loops on XLA's own thread pool.

#ifndef XLA_OPS_CSRC_CPU_PARALLEL_H_
#define XLA_OPS_CSRC_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace xla_ops {

// Runs body(i) for every i in [0, count), on the pool's threads and on the caller's. If bodies throw, the
// rest still run, and one of the exceptions is thrown to the caller at the end.
//
// The caller works too, and then waits only for items that some thread has begun: never for a task that the
// pool has not started. A handler may itself run on a pool thread, and waiting for the queue there could
// wait for itself.
inline void parallel_for(xla::ffi::ThreadPool& pool, int64_t count,
                         const std::function<void(int64_t)>& body) {
  struct State {
    const std::function<void(int64_t)>* body;
    int64_t count;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::exception_ptr exception;
    std::mutex mutex;
    std::condition_variable all_done;

    void work() {
      int64_t finished = 0;
      std::exception_ptr thrown;
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++finished) {
        try {
          (*body)(i);
        } catch (...) {
          thrown = std::current_exception();
        }
      }
      if (finished == 0) return;
      std::lock_guard<std::mutex> lock(mutex);
      if (thrown) exception = thrown;
      done += finished;
      if (done == count) all_done.notify_all();
    }
  };
  auto state = std::make_shared<State>();
  state->body = &body;
  state->count = count;
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([state] { state->work(); });
  state->work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
  if (state->exception) std::rethrow_exception(state->exception);
}

}  // namespace xla_ops

#endif  // XLA_OPS_CSRC_CPU_PARALLEL_H_
