// Keeps the operations that the device has yet to finish, and sees to it that none waits for ever.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "driver.hpp"
#include "program.hpp"

namespace flashtrain {

// One operation on its way through the device.
struct Flight {
  uint32_t epoch;
  std::string site;
  std::shared_ptr<const Program> program;
  EventHandle begun, done;  // on the stream that computes
  bool closed = false;      // done has been recorded
  int64_t noticed = 0;      // when it was first seen to have begun, on CLOCK_MONOTONIC
};

// A thread looks a few times per time-out at the oldest operation. One that began a time-out ago and still
// lacks a message has failed: it says so to the peers, which then fail too, and raises every flag of this
// rank, so that streams and kernels that wait for one go on, with data that nobody must use. From then on
// check() throws. The context stays usable.
class Watchdog {
 public:
  // The calling thread's context is the one that is watched. `timeout` is in seconds.
  Watchdog(const Driver& driver, uint32_t rank, FlagTable table, double timeout);
  ~Watchdog();

  // Throws std::runtime_error that says where an operation stands, once one has failed.
  void check() const {
    if (failed_.load(std::memory_order_acquire)) throw_failure();
  }
  ContextHandle context() const { return context_; }

  // Blocks while the host is too far ahead of the device; then record `begun` and hand the flight to add().
  std::shared_ptr<Flight> prepare(uint32_t epoch, std::string site, std::shared_ptr<const Program> program);
  void add(const std::shared_ptr<Flight>& flight);
  // `done` has been recorded.
  void close(const std::shared_ptr<Flight>& flight);
  // The host will not finish this operation.
  void give_up(const std::shared_ptr<Flight>& flight, const std::string& why);
  void stop();

 private:
  void watch();
  void inspect(Flight& flight);
  bool read_table();
  std::string notice_of_a_peer(const Flight& flight) const;
  const Message* missing(const Flight& flight) const;
  std::string where(const Flight& flight, const Message* message) const;
  void fail(const std::string& text, uint32_t epoch, uint32_t chunk, uint32_t peer);
  void release();
  void retire();
  EventHandle event();
  bool settle();
  [[noreturn]] void throw_failure() const;

  const Driver& driver_;
  const uint32_t rank_;
  const FlagTable table_;
  const int64_t timeout_, interval_;
  ContextHandle context_ = nullptr;
  StreamHandle stream_ = nullptr;      // for the thread's own small copies
  uint32_t* seen_ = nullptr;           // pinned: this rank's table as last read
  uint32_t* written_ = nullptr;        // pinned: what release() and fail() write

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Flight>> flights_;  // oldest first
  std::vector<EventHandle> events_, spare_;
  std::string failure_;
  uint32_t last_epoch_ = 0;
  std::atomic<bool> failed_{false}, stopping_{false};
  std::thread thread_;
};

}  // namespace flashtrain
