// The memory that a rank shares: its bells and one incoming ring for each peer.
#pragma once

#include <cstdint>
#include <string>

#include "bell.hpp"
#include "ring.hpp"

namespace flashtrain {

// Changes with the layout of anything in shared memory; ranks of unlike builds refuse each other.
constexpr uint32_t kLayout = 1;

struct SegmentHeader {
  uint64_t token;       // random: proves that a descriptor leads to the segment it was announced for
  uint64_t start_time;  // of the owner's process
  uint64_t ring_bytes;
  int32_t pid;
  uint32_t rank, world, layout;
  std::atomic<uint32_t> closed;      // the owner has shut down
  alignas(kLine) Bell receive_bell;  // rung by producers: there is data
  alignas(kLine) Bell send_bell;     // rung by consumers of this rank's messages: there is room
};

// What a rank tells the others so that they can map its segment.
struct Address {
  int pid, descriptor;
  uint64_t start_time, token;
};

// An anonymous memory file: no name anywhere, so nothing is left behind however its users end.
class Segment {
 public:
  Segment() = default;
  Segment(Segment&& other) noexcept { *this = std::move(other); }
  Segment& operator=(Segment&& other) noexcept;
  ~Segment() { unmap(); }

  static Segment create(uint32_t rank, uint32_t world, uint64_t ring_bytes);
  // Throws std::runtime_error that says why, if the file cannot be opened or is not the announced one.
  static Segment open(const Address& address, uint32_t rank, uint32_t world);

  SegmentHeader* operator->() const { return header_; }
  explicit operator bool() const { return header_ != nullptr; }
  Address address() const;
  RingControl* control(uint32_t source) const;
  std::byte* ring(uint32_t source) const;

  // The peers have mapped it: the descriptor is no longer needed.
  void close_descriptor();
  void unmap();
  // In a forked child nothing is mapped there, but perhaps by somebody else by now: let go of it.
  void disown() { header_ = nullptr; }

 private:
  void map(size_t bytes);

  SegmentHeader* header_ = nullptr;
  size_t bytes_ = 0;
  int descriptor_ = -1;
};

// Start time of a living process, in clock ticks since boot; 0 if it is gone or a zombie. A pid alone
// does not name a process: the kernel gives it to another one later. Throws std::runtime_error if it cannot be
// told, as where this process has too many files open.
uint64_t process_start_time(int pid);

}  // namespace flashtrain
