// What one rank sends and takes in during one operation, and where every flag is.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace flashtrain {

// One chunk on its way between two ranks, as either end sees it.
struct Message {
  uint32_t peer;    // destination of a send, source of an arrival
  uint32_t column;  // how many messages of this operation the sender has for the same receiver before it
  uint32_t step, chunk;
  uint64_t offset;  // bytes from the start of the receiver's landing buffer
  uint64_t bytes;   // zero for an empty chunk, which is signalled all the same
};

// Copies of two senders to one receiver share its link, and each takes longer than both one after the other. So in a
// program with turns a rank begins with a receiver when the sender before it there has said that it is done.
struct Turn {
  static constexpr uint32_t kNone = ~0u;

  uint32_t awaited = kNone;  // the arrival that a send comes after
  uint32_t peer = kNone;     // the rank that is told behind it that its turn has come
  uint32_t column = 0;       // by this flag
};

// Sends and arrivals in schedule order. Both ends of a pair list its messages in the same order, so that
// columns agree. Turns that come to this rank are empty arrivals, the last ones.
struct Program {
  using Fields = std::array<uint64_t, 6>;  // of Message, in order
  using TurnFields = std::array<uint32_t, 3>;  // of Turn, in order

  // `turn_fields`: one a send, or none at all.
  Program(std::string op_name, uint32_t step_count, const std::vector<Fields>& send_fields,
          const std::vector<Fields>& arrival_fields, const std::vector<TurnFields>& turn_fields = {})
      : op(std::move(op_name)), steps(step_count), sends(read(send_fields)), arrivals(read(arrival_fields)),
        takes_turns(!turn_fields.empty()), turns(sends.size()) {
    for (size_t send = 0; send < turn_fields.size(); ++send) {
      const auto& [awaited, peer, column] = turn_fields[send];
      turns.at(send) = {awaited, peer, column};
    }
  }

  const std::string op;
  const uint32_t steps;
  const std::vector<Message> sends, arrivals;
  const bool takes_turns;
  std::vector<Turn> turns;  // one a send

 private:
  static std::vector<Message> read(const std::vector<Fields>& list) {
    std::vector<Message> messages;
    for (const auto& [peer, column, step, chunk, offset, bytes] : list) {
      messages.push_back({static_cast<uint32_t>(peer), static_cast<uint32_t>(column), static_cast<uint32_t>(step),
                          static_cast<uint32_t>(chunk), offset, bytes});
    }
    return messages;
  }
};

// A rank has flags of 32 bits in two places. The host table is memory of the machine that all ranks and all
// GPUs map: streams wait for it, and the host can read and raise it without the driver. The device table is
// memory of the rank's GPU, for kernels that wait themselves. Layout of each:
//
//     flags    [world][kColumns]        row s is written by rank s alone; a rank's own row is for signals
//                                       of its own kernels (see CopyEngine::push_signalled)
//     notices  [world][kNoticeWords]    row s is written by rank s alone, when it gives up
//     progress [kProgressWords]         written by the rank itself: which captured operation is under way
//                                       (0: none), and 1 when one has ended
//
// A flag holds the epoch of the last operation whose message has landed. Epochs only grow, modulo 2^32, and
// are compared by their signed difference, so flags are never reset between operations. Only captured operations,
// which have tables of their own, raise flags to 1 and lower them to 0: see CopyEngine. They use two sets of
// columns in turn, and one column for their meetings.
class FlagTable {
 public:
  static constexpr uint32_t kColumns = 256;
  static constexpr uint32_t kSetColumns = 127, kMeeting = 2 * kSetColumns;
  static constexpr uint32_t kProgressWords = 2;
  static constexpr uint32_t kNoticeWords = 4;  // 1, epoch, awaited chunk (or kNone), awaited rank
  static constexpr uint32_t kNone = ~0u;

  static constexpr uint64_t flag_words(uint32_t world) { return uint64_t{world} * kColumns; }
  static constexpr uint64_t words(uint32_t world) {
    return uint64_t{world} * (kColumns + kNoticeWords) + kProgressWords;
  }
  static constexpr uint64_t bytes(uint32_t world) { return words(world) * sizeof(uint32_t); }

  // `addresses` of each rank's table.
  explicit FlagTable(std::vector<uint64_t> addresses) : addresses_(std::move(addresses)) {}
  // Tables one after the other.
  FlagTable(uint64_t base, uint32_t world) {
    for (uint32_t rank = 0; rank < world; ++rank) addresses_.push_back(base + rank * bytes(world));
  }

  uint32_t world() const { return static_cast<uint32_t>(addresses_.size()); }
  uint64_t flag(uint32_t at, uint32_t writer, uint32_t column) const {
    return addresses_[at] + sizeof(uint32_t) * (uint64_t{writer} * kColumns + column);
  }
  uint64_t notice(uint32_t at, uint32_t writer) const {
    return addresses_[at] + sizeof(uint32_t) * (flag_words(world()) + uint64_t{writer} * kNoticeWords);
  }
  uint64_t under_way(uint32_t at) const { return notice(at, world()); }
  uint64_t ended(uint32_t at) const { return under_way(at) + sizeof(uint32_t); }

 private:
  std::vector<uint64_t> addresses_;
};

// Whether a flag that holds `value` tells of epoch `epoch`, or a later one.
constexpr bool reached(uint32_t value, uint32_t epoch) { return static_cast<int32_t>(value - epoch) >= 0; }

}  // namespace flashtrain
