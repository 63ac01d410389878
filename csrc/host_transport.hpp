// Moves messages between the ranks of one process group on one machine through shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "courier.hpp"
#include "link.hpp"
#include "segment.hpp"

namespace flashtrain {

// What a transport says itself, unlike an exception of whoever is called while it waits.
struct TransportFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Messages of one pair of ranks arrive in the order in which they were posted, and each is checked
// against the receive that was posted in the same place. Not for use in a forked child: it has neither
// the threads nor the memory, and every call but the destructor throws there.
//
// Every call but wait and join needs one lock around them all, which is the interpreter's; wait runs
// without it, in any number of threads.
class HostTransport {
 public:
  // Throws std::runtime_error if memory cannot be had.
  HostTransport(uint32_t rank, uint32_t world, uint64_t ring_bytes);
  ~HostTransport() {
    if (close()) join();
  }
  HostTransport(const HostTransport&) = delete;
  HostTransport& operator=(const HostTransport&) = delete;

  Address address() const { return own_.address(); }
  // Throws std::runtime_error that says why the peer's memory cannot be mapped.
  void connect(uint32_t peer, const Address& address);
  // All ranks have connected: start.
  void start();

  std::shared_ptr<const Operation> open(std::string label);
  RequestPointer send(std::shared_ptr<const Operation> operation, uint32_t step, uint32_t peer, uint32_t chunk,
                      uint32_t slot, uintptr_t data, uint64_t bytes);
  RequestPointer receive(std::shared_ptr<const Operation> operation, uint32_t step, uint32_t peer, uint32_t chunk,
                         uint32_t slot, uintptr_t data, uint64_t bytes);
  // Seconds on CLOCK_MONOTONIC when the message had moved. Throws TransportFailure that says what
  // happened. `breathe` is called every 0.1 s and may throw to break the wait off.
  double wait(const RequestPointer& request, double timeout, const std::function<void()>& breathe);
  void abort(const Operation& operation);
  // Refuse further calls and tell the peers; true for the first call, which join() must follow. The
  // lock must be free during join(): callers that wait may need it on their way out.
  bool close();
  void join();

  // Processor time of the worker threads, in seconds.
  double worker_time() const;

 private:
  RequestPointer post(Courier& courier, uint32_t peer, RequestPointer request);
  bool died(uint32_t peer) const;
  std::string gone(uint32_t peer) const;
  void check_usable() const;
  bool forked() const;

  const uint32_t rank_, world_;
  const int process_;
  Segment own_;
  std::vector<Segment> peers_;
  std::unique_ptr<Courier> sending_, receiving_;
  uint64_t epochs_ = 0;
  double worker_time_ = 0;  // once closed
  std::shared_mutex waiting_;  // shared by callers inside wait and abort: the memory stays mapped for them
  std::atomic<bool> closed_{false};
};

}  // namespace flashtrain
