// A doorbell in shared memory: threads of one rank sleep on it, threads of any rank ring it.
#pragma once

#include <atomic>
#include <climits>
#include <cstdint>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace flashtrain {

// Two kinds of sleepers share the bell. A caller that waits for a message moves data itself, so while
// there is one the worker may sleep on: one thread switch per message instead of two.
enum Sleeper : uint32_t { kWorker = 1, kCaller = 2 };

struct Bell {
  std::atomic<uint32_t> count;          // the futex word: rings so far
  std::atomic<uint32_t> callers;        // callers inside a wait, asleep or not
  std::atomic<uint32_t> worker_asleep;  // 1 from before the worker's last look at its links

  uint32_t heard() const { return count.load(std::memory_order_acquire); }

  // Call after publishing what the sleeper should see. The fence orders that store before the loads
  // below; the sleeper announces itself, fences, and looks again. So at least one of the two sees the
  // other, and no wake-up is lost.
  void ring() {
    count.fetch_add(1, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (callers.load(std::memory_order_relaxed) != 0) {
      wake(kCaller);
    } else if (worker_asleep.load(std::memory_order_relaxed) != 0) {
      wake(kWorker);
    }
  }

  // For events that every sleeper must look at: completions by another thread, shut-down.
  void ring_all() {
    count.fetch_add(1, std::memory_order_release);
    wake(kCaller | kWorker);
  }

  // Sleep unless the bell rang since `heard` was read; `deadline` on CLOCK_MONOTONIC, nullptr for never.
  // Returns early on signals too: callers look and come back.
  void sleep(uint32_t heard, Sleeper kind, const timespec* deadline) {
    syscall(SYS_futex, &count, FUTEX_WAIT_BITSET, heard, deadline, nullptr, kind);
  }

 private:
  void wake(uint32_t kinds) { syscall(SYS_futex, &count, FUTEX_WAKE_BITSET, INT_MAX, nullptr, nullptr, kinds); }
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "atomics that hide a lock do not work between processes");

}  // namespace flashtrain
