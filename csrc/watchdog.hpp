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

#include "program.hpp"

namespace flashtrain {

// One operation on its way through the device.
struct Flight {
  uint32_t epoch;
  std::string site;
  std::shared_ptr<const Program> program;
  uint32_t up;           // what its flags hold when they are up
  uint32_t shift = 0;    // how many columns further than in the program its flags are
  uint32_t ticket = 0;   // by which the device tells of a captured operation; 0 for others
  int64_t noticed = 0;   // when it was first seen to have begun, on CLOCK_MONOTONIC
};

// A thread looks a few times per time-out at the oldest operation. One that began a time-out ago and still
// lacks a message has failed: it tells the peers, which then fail too, and raises every flag of this rank in
// the host table, so that streams that wait go on, with data that nobody must use. From then on check() throws.
// Kernels that wait by themselves must poll stop_word(). The context stays usable.
//
// It never calls the driver. A host thread that launches into a full queue blocks inside the driver, behind
// the very wait that is to be released, and keeps other threads out; and where streams share one hardware
// queue (CUDA_DEVICE_MAX_CONNECTIONS=1), so does a copy that would raise the flag. Hence flags that a
// processor can read and write.
//
// Of captured operations the host sees neither beginning nor end: the device writes the ticket of the one under
// way, and that one has ended, into the words FlagTable calls progress.
class Watchdog {
 public:
  // `table` by the processor's addresses; `timeout` in seconds.
  Watchdog(uint32_t rank, FlagTable table, double timeout);
  ~Watchdog() { stop(); }

  // Throws std::runtime_error that says where an operation stands, once one has failed.
  void check() const {
    if (failed_.load(std::memory_order_acquire)) throw_failure();
  }
  // An operation begins. Blocks while the host is too far ahead of the device.
  std::shared_ptr<const Flight> add(uint32_t epoch, const std::string& site, std::shared_ptr<const Program> program);
  // An operation that replays of a graph run from here on; `shift` as in Flight. A watchdog keeps either these
  // or others.
  std::shared_ptr<const Flight> enroll(uint32_t number, const std::string& site, std::shared_ptr<const Program> program,
                                       uint32_t shift);
  // The host will not finish this operation.
  void give_up(const Flight& flight, const std::string& why);
  void stop();

 private:
  void watch();
  void inspect(Flight& flight);
  std::shared_ptr<Flight> replayed();
  bool begun(const Flight& flight) const;
  const Message* missing(const Flight& flight) const;
  std::string notice_of_a_peer(const Flight& flight) const;
  std::string where(const Flight& flight, const Message* message) const;
  void fail(const std::string& text, uint32_t epoch, uint32_t chunk, uint32_t peer);
  void release();
  void retire();
  [[noreturn]] void throw_failure() const;

  const uint32_t rank_;
  const FlagTable table_;
  const int64_t timeout_, interval_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Flight>> flights_;  // oldest first; the last stays until another has begun
  std::vector<std::shared_ptr<Flight>> captured_;  // at their ticket less one
  std::shared_ptr<Flight> seen_;                 // of those, what was last under way
  std::string failure_;
  uint32_t last_epoch_ = 0;
  std::atomic<bool> failed_{false};
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace flashtrain
