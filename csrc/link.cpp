#include "link.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "clock.hpp"

namespace flashtrain {
namespace {

// Longest message that the posting thread moves itself. Copying this much takes a few microseconds,
// about as long as waking the worker.
constexpr uint64_t kInline = 32 << 10;

// Longest piece: small enough that the receiver starts soon and overlaps with the sender, large enough
// that the cost of a record does not show.
constexpr uint64_t kPiece = 64 << 10;

// FNV-1a, because std::hash differs between builds.
uint64_t hash(const std::string& text) {
  uint64_t value = 14695981039346656037ULL;
  for (const unsigned char letter : text) value = (value ^ letter) * 1099511628211ULL;
  return value;
}

std::string name(uint64_t epoch, const std::string& label, const Header& header) {
  return "operation " + std::to_string(epoch) + " (" + label + ") step " + std::to_string(header.step) +
         ", chunk " + std::to_string(header.chunk) + ", slot " + std::to_string(header.slot) + ", " +
         std::to_string(header.bytes) + " bytes";
}

Header header_of(const Request& request) {
  Header header{};
  header.epoch = request.operation->epoch;
  header.site = request.operation->site;
  header.bytes = request.bytes;
  header.step = request.step;
  header.chunk = request.chunk;
  header.slot = request.slot;
  return header;
}

}  // namespace

Operation::Operation(uint64_t epoch, std::string text)
    : epoch(epoch), label(std::move(text)), site(hash(label)) {}

bool Link::post(const RequestPointer& request) {
  {
    const std::lock_guard lock(queue_);
    if (!broken_.empty()) {
      request->failure = broken_;
      request->state.store(Request::kFailed, std::memory_order_release);
      return false;
    }
    requests_.push_back(request);
  }
  Outcome outcome = Outcome::kMoved;
  while (outcome == Outcome::kMoved && request->pending()) outcome = advance(kInline, 0);
  return outcome == Outcome::kBusy || ready();
}

std::unique_lock<std::mutex> Link::enter() {
  std::unique_lock lock(ring_, std::try_to_lock);
  if (!lock.owns_lock()) {
    turned_away_.store(true, std::memory_order_release);
    // Pairs with the fence in ready(): either that thread sees the word, or this one finds it gone.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!lock.try_lock()) return lock;
  }
  // The look that follows is that of those who were turned away before, too.
  if (turned_away_.load(std::memory_order_relaxed)) turned_away_.exchange(false, std::memory_order_acquire);
  return lock;
}

Outcome Link::advance(uint64_t limit, uint32_t callers) {
  // If another thread is at work here it looks again, or wakes the worker when it leaves.
  const std::unique_lock lock = enter();
  if (!lock.owns_lock()) return Outcome::kBusy;
  return step(limit, callers) ? Outcome::kMoved : Outcome::kNothing;
}

bool Link::ready() {
  bool can = false;
  {
    const std::unique_lock lock = enter();
    if (!lock.owns_lock()) return false;
    can = can_move();
  }
  // This may have been the last look of all: the worker, woken for what came during it, was turned away and sleeps.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return can || turned_away_.load(std::memory_order_relaxed);
}

void Link::abort(const Operation& operation) {
  const std::lock_guard ring(ring_);
  const std::lock_guard queue(queue_);
  const auto dropped = std::stable_partition(requests_.begin(), requests_.end(), [&](const RequestPointer& request) {
    return request->operation->epoch != operation.epoch;
  });
  for (auto request = dropped; request != requests_.end(); ++request) {
    (*request)->failure = "the operation was given up";
    (*request)->state.store(Request::kFailed, std::memory_order_release);
  }
  requests_.erase(dropped, requests_.end());
  forget(operation.epoch);
}

uint64_t Link::first_turn() {
  const std::lock_guard lock(queue_);
  return requests_.empty() ? kNoTurn : requests_.front()->turn;
}

RequestPointer Link::first() {
  const std::lock_guard lock(queue_);
  return requests_.empty() ? nullptr : requests_.front();
}

void Link::finish(const RequestPointer& request, uint32_t callers) {
  {
    const std::lock_guard lock(queue_);
    requests_.pop_front();
  }
  request->landed = now();
  request->state.store(Request::kDone, std::memory_order_release);
  // Pairs with the announcement in Courier::wait: a caller that this load misses sees the new state.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (bell_.callers.load(std::memory_order_relaxed) > callers) bell_.ring_all();
}

void Link::fail(const std::string& why, uint32_t callers) {
  {
    const std::lock_guard lock(queue_);
    broken_ = why;
    for (const RequestPointer& request : requests_) {
      request->failure = why;
      request->state.store(Request::kFailed, std::memory_order_release);
    }
    requests_.clear();
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (bell_.callers.load(std::memory_order_relaxed) > callers) bell_.ring_all();
}

Outbox::Outbox(uint32_t peer, Bell& bell, Segment& segment, uint32_t rank)
    : Link(peer, bell, segment->receive_bell),
      producer_(segment.control(rank), segment.ring(rank), segment->ring_bytes),
      // A quarter of the ring at most: the consumer empties one piece while the producer fills another.
      piece_(std::min(kPiece, segment->ring_bytes / 4 - sizeof(Header))) {}

bool Outbox::reserve(const Request& request) {
  const uint64_t left = request.bytes - request.moved;
  const uint64_t needed = record_bytes(std::min(left, piece_));
  // All that is left or half a ring, so that it is worth waking up for.
  return producer_.reserve(needed, std::max(needed, std::min(record_bytes(left), producer_.capacity() / 2)));
}

bool Outbox::can_move() {
  const RequestPointer request = first();
  return request && reserve(*request);
}

bool Outbox::step(uint64_t limit, uint32_t callers) {
  const RequestPointer request = first();
  if (!request || request->bytes > limit || !reserve(*request)) return false;
  const uint64_t piece = std::min(request->bytes - request->moved, piece_);
  Header header = header_of(*request);
  header.offset = request->moved;
  header.piece = static_cast<uint32_t>(piece);
  const std::string& label = request->operation->label;
  label.copy(header.label, sizeof header.label - 1, label.size() - std::min(label.size(), sizeof header.label - 1));
  const bool wanted = producer_.publish(header, request->data + request->moved);
  request->moved += piece;
  progress_.store(now(), std::memory_order_relaxed);
  if (wanted) peer_bell_.ring();
  if (request->moved == request->bytes) finish(request, callers);
  return true;
}

Inbox::Inbox(uint32_t peer, Bell& bell, Segment& own, Bell& peer_bell)
    : Link(peer, bell, peer_bell), consumer_(own.control(peer), own.ring(peer), own->ring_bytes) {}

bool Inbox::can_move() {
  const RequestPointer request = first();
  Header header;
  return consumer_.peek(header, request || !forgotten_.empty()) && (request || forgotten_.count(header.epoch) != 0);
}

bool Inbox::step(uint64_t limit, uint32_t callers) {
  const RequestPointer request = first();
  Header header;
  if (!consumer_.peek(header, request || !forgotten_.empty())) return false;
  if (!consumer_.sound(header)) {
    fail("rank " + std::to_string(peer) + " wrote a record that makes no sense", callers);
    return false;
  }
  if (forgotten_.count(header.epoch) != 0) {
    pop(header);
    return true;
  }
  if (!request || header.piece > limit) return false;
  if (const std::string why = mismatch(header, *request); !why.empty()) {
    fail(why, callers);
    return false;
  }
  consumer_.read(header, request->data + request->moved);
  request->moved += header.piece;
  progress_.store(now(), std::memory_order_relaxed);
  const bool whole = request->moved == request->bytes;
  pop(header);
  if (whole) finish(request, callers);
  return true;
}

std::string Inbox::mismatch(const Header& header, const Request& request) const {
  const Header expected = header_of(request);
  if (header.epoch == expected.epoch && header.site == expected.site && header.chunk == expected.chunk &&
      header.slot == expected.slot && header.bytes == expected.bytes && header.offset == request.moved) {
    return {};
  }
  const std::string sender = "rank " + std::to_string(peer);
  // A sender that gave its operation up goes on with another message in the middle of this one.
  if (request.moved > 0) {
    return sender + " broke off after " + std::to_string(request.moved) + " of " + std::to_string(request.bytes) +
           " bytes";
  }
  const std::string label(header.label, strnlen(header.label, sizeof header.label));
  return "expected " + name(expected.epoch, request.operation->label, expected) + "; " + sender + " sent " +
         name(header.epoch, label, header) + ": the ranks are out of step";
}

void Inbox::pop(const Header& header) {
  if (consumer_.pop(header)) peer_bell_.ring();
}

}  // namespace flashtrain
