// A single-producer single-consumer byte ring in shared memory, one for each ordered pair of ranks.
//
// It holds records: a header and a piece of a message. A message longer than one piece takes several
// records, so that any size streams through a bounded ring and the two copies overlap.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace flashtrain {

// Two cache lines: processors fetch lines in pairs, and two counters in one pair would still bounce.
constexpr size_t kLine = 128;

struct Header {
  uint64_t epoch;   // number of the operation, counted alike on every rank
  uint64_t site;    // hash of the whole label
  uint64_t bytes;   // of the message
  uint64_t offset;  // of this piece
  uint32_t piece;   // bytes of this piece
  uint32_t step, chunk, slot;
  char label[80];   // end of "site: operation", for messages only
};
static_assert(sizeof(Header) == kLine);

constexpr uint64_t record_bytes(uint64_t piece) { return sizeof(Header) + (piece + kLine - 1) / kLine * kLine; }

// Positions count bytes since the start and never wrap. Each side also says at which position of the
// other it wants its bell rung, so nobody is woken for room or data that does not help.
struct RingControl {
  alignas(kLine) std::atomic<uint64_t> tail;  // written by the producer: records end here
  std::atomic<uint64_t> producer_wants;       // ring when head gets here
  alignas(kLine) std::atomic<uint64_t> head;  // written by the consumer: records start here
  std::atomic<uint64_t> consumer_wants;       // ring when tail gets here
};

constexpr bool crossed(uint64_t before, uint64_t after, uint64_t wanted) {
  return before < wanted && wanted <= after;
}

class Producer {
 public:
  Producer(RingControl* control, std::byte* data, uint64_t capacity)
      : control_(control), data_(data), capacity_(capacity) {}

  // Whether a record of `needed` bytes fits. If not, asks to be rung once `comfortable` bytes are free.
  bool reserve(uint64_t needed, uint64_t comfortable) {
    if (room() >= needed) return true;
    // Acquire: the consumer has finished reading the bytes that it gave back.
    head_ = control_->head.load(std::memory_order_acquire);
    if (room() >= needed) return true;
    control_->producer_wants.store(tail_ + comfortable - capacity_, std::memory_order_relaxed);
    // Pairs with the fence in Consumer::pop: either it sees the wish or this load sees its head.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    head_ = control_->head.load(std::memory_order_acquire);
    return room() >= needed;
  }

  // Append a record; reserve() has said that it fits. True: the consumer wants its bell rung.
  bool publish(const Header& header, const std::byte* payload) {
    std::memcpy(data_ + tail_ % capacity_, &header, sizeof header);
    const uint64_t start = (tail_ + sizeof header) % capacity_;
    const uint64_t first = std::min<uint64_t>(header.piece, capacity_ - start);
    if (first > 0) std::memcpy(data_ + start, payload, first);
    if (first < header.piece) std::memcpy(data_, payload + first, header.piece - first);
    const uint64_t before = tail_;
    tail_ += record_bytes(header.piece);
    // Release: whoever sees this tail sees the record.
    control_->tail.store(tail_, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return crossed(before, tail_, control_->consumer_wants.load(std::memory_order_relaxed));
  }

  uint64_t capacity() const { return capacity_; }

 private:
  uint64_t room() const { return capacity_ - (tail_ - head_); }

  RingControl* control_;
  std::byte* data_;
  uint64_t capacity_;
  uint64_t tail_ = 0;
  uint64_t head_ = 0;  // as last seen: rereading it for every record would pull the consumer's line over
};

class Consumer {
 public:
  Consumer(RingControl* control, const std::byte* data, uint64_t capacity)
      : control_(control), data_(data), capacity_(capacity) {}

  // Copy the first record's header. False: there is none; if `hungry`, asks to be rung for the next.
  bool peek(Header& header, bool hungry) {
    if (tail_ == head_) {
      tail_ = control_->tail.load(std::memory_order_acquire);
      if (tail_ == head_ && hungry) {
        control_->consumer_wants.store(head_ + 1, std::memory_order_relaxed);
        // Pairs with the fence in Producer::publish: either it sees the wish or this load its tail.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        tail_ = control_->tail.load(std::memory_order_acquire);
      }
      if (tail_ == head_) return false;
    }
    std::memcpy(&header, data_ + head_ % capacity_, sizeof header);
    return true;
  }

  // Whether the header describes a record that is wholly there; else the ring holds garbage.
  bool sound(const Header& header) const {
    return record_bytes(header.piece) <= tail_ - head_ && header.offset + header.piece <= header.bytes;
  }

  void read(const Header& header, std::byte* into) const {
    const uint64_t start = (head_ + sizeof header) % capacity_;
    const uint64_t first = std::min<uint64_t>(header.piece, capacity_ - start);
    if (first > 0) std::memcpy(into, data_ + start, first);
    if (first < header.piece) std::memcpy(into + first, data_, header.piece - first);
  }

  // Drop the first record. True: the producer wants its bell rung.
  bool pop(const Header& header) {
    const uint64_t before = head_;
    head_ += record_bytes(header.piece);
    // Release: the reads of this record end before the producer may overwrite it.
    control_->head.store(head_, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return crossed(before, head_, control_->producer_wants.load(std::memory_order_relaxed));
  }

 private:
  RingControl* control_;
  const std::byte* data_;
  uint64_t capacity_;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;  // as last seen
};

}  // namespace flashtrain
