// The part of the copy engine that is for CUDA graphs; why it suffices is shown in copy_engine.hpp.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>

#include "copy_engine.hpp"

namespace flashtrain {
namespace {

constexpr size_t kBatch = 255;  // words that the driver takes at once

}  // namespace

// Whether the operation that begins on `stream` has one before it, in the same capture if it is captured.
bool CopyEngine::follows(StreamHandle stream) {
  int capturing = 0;
  uint64_t capture = 0;
  driver_.check(driver_.stream_get_capture_info(stream, &capturing, &capture, nullptr, nullptr, nullptr),
                "cuStreamGetCaptureInfo");
  if ((capturing != 0) != captured_) {
    throw std::logic_error(captured_ ? "this transport is for captured operations"
                                     : "this transport cannot be captured in a CUDA graph");
  }
  if (!captured_) return !first_;
  if (!first_ && capture == capture_) return true;
  capture_ = capture;
  epoch_ = 0;
  return false;
}

// Every rank tells all others that it has come so far, and waits for them.
void CopyEngine::meet(const std::string& site) {
  std::vector<Program::Fields> messages;
  for (uint32_t peer = 0; peer < host_.world(); ++peer) {
    if (peer != rank_) messages.push_back({peer, 0, 0, peer, 0, 0});
  }
  const auto program = std::make_shared<const Program>("start of a replay", 1, messages, messages);
  const auto flight = watchdog_->enroll(0, site, program, FlagTable::kMeeting);
  std::vector<WordOperation> words = {{kWriteWord, host_.under_way(rank_), flight->ticket, kWriteAfterEarlierWrites}};
  for (const Message& to : program->sends) {
    words.push_back({kWriteWord, host_.flag(to.peer, rank_, FlagTable::kMeeting), flight->up, kWriteAfterEarlierWrites});
  }
  for (const Message& from : program->arrivals) {
    words.push_back({kWaitForWord, host_.flag(rank_, from.peer, FlagTable::kMeeting), flight->up, wait_flags_});
  }
  for (const Message& from : program->arrivals) {
    words.push_back({kWriteWord, host_.flag(rank_, from.peer, FlagTable::kMeeting), 0, kWriteAfterEarlierWrites});
  }
  words.push_back({kWriteWord, host_.ended(rank_), 1, kWriteAfterEarlierWrites});
  together(stream_, std::move(words));
}

// The pushes of the captured operation are over. When all has arrived, what is up goes down, for the next operation
// that uses these columns.
void CopyEngine::wait_and_lower() {
  std::vector<WordOperation> words;
  for (uint32_t arrival = 0; arrival < awaited_.size(); ++arrival) {
    if (awaited_[arrival]) continue;
    const Message& message = flight_->program->arrivals[arrival];
    words.push_back({kWaitForWord, host_.flag(rank_, message.peer, message.column + flight_->shift), flight_->up,
                     wait_flags_});
  }
  for (const Message& message : flight_->program->arrivals) {
    for (const FlagTable* table : {&device_, &host_}) {
      if (table == &device_ && !device_flags_) continue;
      const uint64_t flag = table->flag(rank_, message.peer, message.column + flight_->shift);
      words.push_back({kWriteWord, flag, 0, kWriteAfterEarlierWrites});
    }
  }
  for (uint32_t send = 0; signalled_ && send < pushed_.size(); ++send) {
    words.push_back({kWriteWord, signal(send), 0, kWriteAfterEarlierWrites});
  }
  for (uint32_t send = 0; carried_ && send < pushed_.size(); ++send) {
    words.push_back({kWriteWord, device_.flag(rank_, rank_, send), 0, kWriteAfterEarlierWrites});
  }
  words.push_back({kWriteWord, host_.under_way(rank_), 0, kWriteAfterEarlierWrites});
  words.push_back({kWriteWord, host_.ended(rank_), 1, kWriteAfterEarlierWrites});
  together(stream_, std::move(words));
}

// `stream` does these in order; in a graph they are one node.
void CopyEngine::together(StreamHandle stream, std::vector<WordOperation> operations) {
  for (size_t done = 0; done < operations.size(); done += kBatch) {
    const size_t count = std::min(kBatch, operations.size() - done);
    driver_.check(driver_.stream_batch(stream, static_cast<unsigned>(count), &operations[done], 0), "cuStreamBatchMemOp");
  }
}

}  // namespace flashtrain
