// One direction of traffic with all peers: the worker thread, and callers that wait.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "bell.hpp"
#include "link.hpp"

namespace flashtrain {

// Both the worker and every waiting caller move messages, in posting order, passing over peers whose
// ring is full (or empty). With nothing to move they sleep on the bell.
class Courier {
 public:
  // `name` shows in thread listings, at most 15 letters; `silence` says what a peer failed to do.
  Courier(Bell& bell, std::string name, std::string silence)
      : bell_(bell), name_(std::move(name)), silence_(std::move(silence)) {}
  ~Courier() { stop(); }

  void add(std::unique_ptr<Link> link) { links_.push_back(std::move(link)); }
  Link* link(uint32_t peer) const;

  void post(const RequestPointer& request);

  // Block until the request has ended or its peer has moved nothing for `timeout` nanoseconds. `probe`,
  // called every 0.1 s, says why the peer will never move anything again, or nothing; it may throw.
  // Returns what went wrong, or nothing.
  std::string wait(const RequestPointer& request, int64_t timeout, const std::function<std::string()>& probe);

  void abort(const Operation& operation);

  // End the worker and tell callers to leave; the owner waits for those.
  void stop();
  // In a forked child the worker does not exist: let go of it.
  void disown();

  // Processor time that the worker has used, in nanoseconds. Not after stop().
  int64_t worker_time();

 private:
  class Caller;

  void work();
  std::string wait_as_caller(const RequestPointer& request, int64_t timeout,
                             const std::function<std::string()>& probe);
  bool move_one(Link* preferred, uint32_t callers);

  Bell& bell_;
  const std::string name_, silence_;
  std::vector<std::unique_ptr<Link>> links_;
  std::thread worker_;
  std::atomic<bool> stopping_{false};
  uint64_t turns_ = 0;
};

}  // namespace flashtrain
