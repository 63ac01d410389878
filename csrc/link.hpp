// One direction of traffic with one peer: requests in posting order over one ring.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "bell.hpp"
#include "ring.hpp"
#include "segment.hpp"

namespace flashtrain {

// An operation as all ranks number and name it.
struct Operation {
  Operation(uint64_t epoch, std::string label);

  const uint64_t epoch;
  const std::string label;  // "site: operation"
  const uint64_t site;      // hash of the label
};

class Courier;
class Link;

// One message to send or to receive. Threads share it; `data` may be touched while `state` is pending.
struct Request {
  enum State : uint32_t { kPending, kDone, kFailed };

  Request(std::shared_ptr<const Operation> operation, uint32_t step, uint32_t chunk, uint32_t slot, uintptr_t data,
          uint64_t bytes)
      : operation(std::move(operation)), step(step), chunk(chunk), slot(slot),
        data(reinterpret_cast<std::byte*>(data)), bytes(bytes) {}

  const std::shared_ptr<const Operation> operation;
  const uint32_t step, chunk, slot;
  std::byte* const data;
  const uint64_t bytes;
  Link* link = nullptr;
  Courier* courier = nullptr;
  uint64_t turn = 0;   // place in posting order over all links of one direction
  uint64_t moved = 0;  // guarded by the link's ring mutex
  // Release on the way out of kPending: whoever sees the end sees the bytes, `landed` and `failure`.
  std::atomic<uint32_t> state{kPending};
  int64_t landed = 0;
  std::string failure;

  bool pending() const { return state.load(std::memory_order_acquire) == kPending; }
};

using RequestPointer = std::shared_ptr<Request>;

// What one look at a link came to. kBusy: another thread was at work on it, so nobody looked.
enum class Outcome { kMoved, kNothing, kBusy };

// Two mutexes: `ring` is held while bytes are copied, so holding it means that nobody touches any
// tensor of this link; `queue` only for moments. Order: ring before queue.
class Link {
 public:
  static constexpr uint64_t kNoTurn = UINT64_MAX;

  // `peer_bell` is that of the peer's thread at the other end of the ring, `bell` the own side's.
  Link(uint32_t peer, Bell& bell, Bell& peer_bell) : peer(peer), bell_(bell), peer_bell_(peer_bell) {}
  virtual ~Link() = default;

  // Enqueue, and move the message at once if it is short and the ring allows. True: somebody must look
  // at the link; otherwise it is enough to listen to the bell.
  bool post(const RequestPointer& request);
  // Move one piece of at most `limit` bytes if the ring allows. `callers` is how many callers the moving
  // thread itself counts for in the bell.
  Outcome advance(uint64_t limit, uint32_t callers);
  // Drop the operation's requests. On return no thread touches their memory.
  void abort(const Operation& operation);
  // Whether something can move now, or may, because a thread that came meanwhile found this one at work; if not, the
  // bell will ring once it can. False too if another thread is at work here, which then looks itself, or says so
  // here. For a thread that turns away from the link.
  bool ready();

  uint64_t first_turn();
  // When something last moved here.
  int64_t progress() const { return progress_.load(std::memory_order_relaxed); }

  const uint32_t peer;

 protected:
  virtual bool step(uint64_t limit, uint32_t callers) = 0;
  virtual bool can_move() = 0;
  virtual void forget(uint64_t) {}

  RequestPointer first();
  void finish(const RequestPointer& request, uint32_t callers);
  // The stream is unusable: fail everything posted and everything posted from now on.
  void fail(const std::string& why, uint32_t callers);

  std::mutex ring_;
  std::atomic<int64_t> progress_{0};
  Bell& bell_;
  Bell& peer_bell_;

 private:
  // Owns nothing if another thread is at work here.
  std::unique_lock<std::mutex> enter();

  std::mutex queue_;
  std::atomic<bool> turned_away_{false};  // a thread was, since the last look began
  std::deque<RequestPointer> requests_;
  std::string broken_;
};

class Outbox : public Link {
 public:
  Outbox(uint32_t peer, Bell& bell, Segment& segment, uint32_t rank);

 protected:
  bool step(uint64_t limit, uint32_t callers) override;
  bool can_move() override;

 private:
  // Whether the ring has room for the next piece; if not, asks to be rung for a useful amount.
  bool reserve(const Request& request);

  Producer producer_;
  uint64_t piece_;
};

class Inbox : public Link {
 public:
  Inbox(uint32_t peer, Bell& bell, Segment& own, Bell& peer_bell);

 protected:
  bool step(uint64_t limit, uint32_t callers) override;
  bool can_move() override;
  void forget(uint64_t epoch) override { forgotten_.insert(epoch); }

 private:
  // Why the record is not the next piece of the request; empty if it is.
  std::string mismatch(const Header& header, const Request& request) const;
  void pop(const Header& header);

  Consumer consumer_;
  std::set<uint64_t> forgotten_;  // aborted operations: what still comes for them is dropped
};

}  // namespace flashtrain
