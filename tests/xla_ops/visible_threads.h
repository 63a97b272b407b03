// A thread pool that ThreadSanitizer can observe. The compiler includes this file first when the CPU module
// is built with ThreadSanitizer (tests/sanitize.py).
//
// XLA is not built with the sanitizer, which therefore does not see XLA's synchronization. It would report
// races between the call that schedules a task and the task, and between a handler and a later handler that
// reads its results. Here tasks go through a mutex, and a call is ordered after the calls that ended before
// it began. Accesses within one call, and by concurrent calls, are only ordered by the synchronization in
// csrc/cpu.

#pragma once

#if __has_include("xla/ffi/api/ffi.h")  // kernels.cc does not depend on XLA

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}

namespace xla::ffi {

class VisibleThreads {
 public:
  VisibleThreads() { __tsan_acquire(&ended()); }
  VisibleThreads(const VisibleThreads&) = default;
  ~VisibleThreads() { __tsan_release(&ended()); }

  int64_t num_threads() const { return kThreads; }

  template <typename F>
  void Schedule(F&& f) {
    static Queue* queue = new Queue;  // never destroyed, since its threads do not end
    std::lock_guard<std::mutex> lock(queue->mutex);
    queue->tasks.emplace_back(std::forward<F>(f));
    queue->not_empty.notify_one();
  }

 private:
  static constexpr int64_t kThreads = 4;

  struct Queue {
    Queue() {
      for (int64_t i = 0; i < kThreads; ++i) std::thread([this] { work(); }).detach();
    }

    void work() {
      while (true) {
        std::unique_lock<std::mutex> lock(mutex);
        not_empty.wait(lock, [&] { return !tasks.empty(); });
        std::function<void()> task = std::move(tasks.front());
        tasks.pop_front();
        lock.unlock();
        task();
      }
    }

    std::mutex mutex;
    std::condition_variable not_empty;
    std::deque<std::function<void()>> tasks;
  };

  static char& ended() {
    static char address;
    return address;
  }
};

template <>
struct CtxDecoding<VisibleThreads> {
  using Type = VisibleThreads;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) {
    return Type();
  }
};

}  // namespace xla::ffi

#define ThreadPool VisibleThreads

#endif
