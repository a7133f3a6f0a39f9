// A thread pool for loops of a few microseconds: idle threads spin for a moment, then sleep.
//
//   pool().parallel(chunks, threads, [&](int64_t chunk) { ... });
//
// runs every chunk in [0, chunks) once, on the caller and at most `threads` - 1 other threads, and returns when all are
// done. Chunks must not depend on which thread runs them. A call from inside a chunk, or while another thread uses the
// pool, runs in the caller alone. A chunk must not throw. After a fork the child gets a new pool.
//
// Chunks are assigned by one 64-bit ticket: the number of the loop in the high half, the next chunk in the low half. A
// thread takes a chunk only by advancing the ticket of the loop it saw, and the caller leaves a loop only when all its
// chunks are done, so a late thread finds no chunk and never reads a loop body that is gone.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace reallm {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  static constexpr int kMaxThreads = 64, kSpins = 4000;

  template <class F>
  void parallel(int64_t chunks, int threads, const F& fn) {
    threads = threads > kMaxThreads ? kMaxThreads : threads;
    if (chunks < 2 || threads < 2 || chunks >= kChunk || busy_.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < chunks; i++) fn(i);
      return;
    }
    start(threads - 1);
    run_ = [](const void* body, int64_t i) { (*static_cast<const F*>(body))(i); };
    body_ = &fn;
    done_.store(0, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    const uint64_t loop = (ticket_.load(std::memory_order_relaxed) / kChunk + 1) * kChunk;
    limit_.store(loop + uint64_t(chunks), std::memory_order_relaxed);
    ticket_.store(loop, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> hold(mutex_);
      wake_.notify_all();
    }
    work(loop);
    for (int spin = 0; done_.load(std::memory_order_acquire) < chunks; spin++) spin < kSpins ? relax() : (void)sched_yield();
    busy_.clear(std::memory_order_release);
  }

 private:
  static constexpr int64_t kChunk = int64_t(1) << 32;

  // Take chunks of `loop` until none is left.
  void work(uint64_t loop) {
    uint64_t seen = ticket_.load(std::memory_order_acquire);
    while (seen / kChunk == loop / kChunk) {
      const uint64_t limit = limit_.load(std::memory_order_relaxed);
      if (limit / kChunk != loop / kChunk || seen >= limit) return;  // no chunk is left, or the next loop has begun
      if (!ticket_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      run_(body_, int64_t(seen % kChunk));
      done_.fetch_add(1, std::memory_order_release);
      seen = ticket_.load(std::memory_order_acquire);
    }
  }

  void start(int helpers) {
    for (; started_ < helpers; started_++) std::thread(&Pool::wait, this, started_).detach();
  }

  void wait(int self) {
    uint64_t last = 0;
    for (;;) {
      uint64_t loop = last;
      for (int spin = 0; spin < kSpins; spin++) {
        loop = ticket_.load(std::memory_order_acquire) / kChunk;
        if (loop != last) break;
        relax();
      }
      if (loop == last) {
        std::unique_lock<std::mutex> hold(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(hold, [&] { return ticket_.load(std::memory_order_seq_cst) / kChunk != last; });
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
        continue;
      }
      last = loop;
      if (self < helpers_.load(std::memory_order_relaxed)) work(loop * kChunk);
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<uint64_t> ticket_{0}, limit_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<int> sleeping_{0}, helpers_{0};
  int started_ = 0;  // guarded by busy_
  void (*run_)(const void*, int64_t) = nullptr;
  const void* body_ = nullptr;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// The pool of this process; never destroyed, because its threads may outlive every static object.
inline std::atomic<Pool*>& pool_slot() {
  static std::atomic<Pool*> slot{nullptr};
  return slot;
}

inline Pool& pool() {
  Pool* found = pool_slot().load(std::memory_order_acquire);
  if (found) return *found;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool_slot().store(nullptr); }); });
  Pool* fresh = new Pool;
  if (pool_slot().compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;  // it has started no thread yet
  return *found;
}

}  // namespace reallm
