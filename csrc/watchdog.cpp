#include "watchdog.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "clock.h"

namespace flashtrain {
namespace {

// The host may be this many operations ahead. A launch into a full queue blocks inside the driver, where it
// can keep this thread from freeing the very stream that the queue waits for; so the queue must not fill.
constexpr size_t kDeepest = 32;
// How far ahead a released flag is set: beyond any epoch in use, and still ahead in signed difference.
constexpr uint32_t kReleased = 1u << 30;
constexpr int64_t kLongestInterval = 200'000'000, kShortestInterval = 2'000'000;
constexpr auto kPause = std::chrono::microseconds(20);

std::string number(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

Watchdog::Watchdog(const Driver& driver, uint32_t rank, FlagTable table, double timeout)
    : driver_(driver),
      rank_(rank),
      table_(std::move(table)),
      timeout_(std::llround(timeout * 1e9)),
      interval_(std::clamp(timeout_ / 20, kShortestInterval, kLongestInterval)) {
  driver_.check(driver_.context_get_current(&context_), "cuCtxGetCurrent");
  if (context_ == nullptr) throw std::runtime_error("no CUDA context is current; touch the device first");
  int least = 0, greatest = 0;
  driver_.check(driver_.context_get_priorities(&least, &greatest), "cuCtxGetStreamPriorityRange");
  driver_.check(driver_.stream_create(&stream_, kStreamNonBlocking, greatest), "cuStreamCreateWithPriority");
  void* memory = nullptr;
  const uint64_t bytes = FlagTable::bytes(table_.world());
  driver_.check(driver_.allocate_host(&memory, 2 * bytes), "cuMemAllocHost");
  seen_ = static_cast<uint32_t*>(memory);
  written_ = seen_ + FlagTable::words(table_.world());
  thread_ = std::thread([this] { watch(); });
}

Watchdog::~Watchdog() {
  stop();
  // While the process ends the driver may be gone: there is nobody left to tell.
  driver_.stream_destroy(stream_);
  driver_.free_host(seen_);
  for (const EventHandle event : events_) driver_.event_destroy(event);
}

void Watchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<Flight> Watchdog::prepare(uint32_t epoch, std::string site, std::shared_ptr<const Program> program) {
  std::unique_lock lock(mutex_);
  retire();
  while (flights_.size() >= kDeepest) {
    lock.unlock();
    std::this_thread::sleep_for(kPause);
    check();
    lock.lock();
    retire();
  }
  auto flight = std::make_shared<Flight>();
  flight->epoch = epoch;
  flight->site = std::move(site);
  flight->program = std::move(program);
  flight->begun = event();
  flight->done = event();
  return flight;
}

void Watchdog::add(const std::shared_ptr<Flight>& flight) {
  const std::lock_guard lock(mutex_);
  last_epoch_ = flight->epoch;
  flights_.push_back(flight);
}

void Watchdog::close(const std::shared_ptr<Flight>& flight) {
  const std::lock_guard lock(mutex_);
  flight->closed = true;
}

void Watchdog::give_up(const std::shared_ptr<Flight>& flight, const std::string& why) {
  {
    const std::lock_guard lock(mutex_);
    flight->closed = true;
    if (!failed_) {
      failure_ = where(*flight, nullptr) + ": " + why;
      failed_.store(true, std::memory_order_release);
    }
  }
  // The thread tells the peers and frees what already waits.
  wake_.notify_all();
}

void Watchdog::throw_failure() const {
  const std::lock_guard lock(mutex_);
  throw std::runtime_error(failure_);
}

EventHandle Watchdog::event() {
  if (spare_.empty()) {
    EventHandle created = nullptr;
    driver_.check(driver_.event_create(&created, kEventWithoutTiming), "cuEventCreate");
    events_.push_back(created);
    return created;
  }
  const EventHandle reused = spare_.back();
  spare_.pop_back();
  return reused;
}

void Watchdog::retire() {
  while (!flights_.empty() && flights_.front()->closed) {
    const Flight& oldest = *flights_.front();
    if (!driver_.over(driver_.event_query(oldest.done), "cuEventQuery")) break;
    spare_.push_back(oldest.begun);
    spare_.push_back(oldest.done);
    flights_.pop_front();
  }
}

void Watchdog::watch() {
  bool told = false;
  try {
    driver_.check(driver_.context_set_current(context_), "cuCtxSetCurrent");
    // Queries and copies of this thread have nothing to do with a capture that another thread runs.
    int mode = kCaptureRelaxed;
    driver_.check(driver_.exchange_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode");
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      wake_.wait_for(lock, std::chrono::nanoseconds(interval_));
      if (stopping_) break;
      retire();
      const std::shared_ptr<Flight> oldest = flights_.empty() ? nullptr : flights_.front();
      const bool given_up = failed_ && !told;
      lock.unlock();
      if (given_up) fail("", last_epoch_, FlagTable::kNone, rank_);
      if (failed_) {
        told = true;
        if (oldest) release();   // a late peer may have lowered a flag again
      } else if (oldest) {
        inspect(*oldest);
        told = failed_;
      }
      lock.lock();
    }
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = "rank " + std::to_string(rank_) + ": the watchdog has stopped: " + error.what();
    failed_.store(true, std::memory_order_release);
  }
}

void Watchdog::inspect(Flight& flight) {
  if (flight.noticed == 0) {
    if (driver_.over(driver_.event_query(flight.begun), "cuEventQuery")) flight.noticed = now();
    return;
  }
  if (!read_table()) return;
  const Message* awaited = missing(flight);
  const std::string notice = notice_of_a_peer(flight);
  if (!notice.empty()) {
    const uint32_t chunk = awaited != nullptr ? awaited->chunk : FlagTable::kNone;
    fail(where(flight, awaited) + ": " + notice, flight.epoch, chunk, awaited != nullptr ? awaited->peer : rank_);
  } else if (awaited != nullptr && now() - flight.noticed > timeout_) {
    fail(where(flight, awaited) + ": nothing arrived within " + number(seconds(timeout_)) + " s (operation " +
             std::to_string(flight.epoch) + ")",
         flight.epoch, awaited->chunk, awaited->peer);
  }
}

// False if the thread must stop before the copy is there.
bool Watchdog::read_table() {
  driver_.check(driver_.copy_to_host(seen_, table_.flag(rank_, 0, 0), FlagTable::bytes(table_.world()), stream_),
                "cuMemcpyDtoHAsync");
  return settle();
}

// Copies go by way of copy engines, whose queues are not those of the streams that wait, even where
// CUDA_DEVICE_MAX_CONNECTIONS is 1.
bool Watchdog::settle() {
  while (!driver_.over(driver_.stream_query(stream_), "cuStreamQuery")) {
    if (stopping_) return false;
    std::this_thread::sleep_for(kPause);
  }
  return true;
}

const Message* Watchdog::missing(const Flight& flight) const {
  for (const Message& message : flight.program->arrivals) {
    if (!reached(seen_[uint64_t{message.peer} * FlagTable::kColumns + message.column], flight.epoch)) return &message;
  }
  return nullptr;
}

std::string Watchdog::notice_of_a_peer(const Flight& flight) const {
  for (uint32_t peer = 0; peer < table_.world(); ++peer) {
    const uint32_t* notice = seen_ + FlagTable::flag_words(table_.world()) + uint64_t{peer} * FlagTable::kNoticeWords;
    if (peer == rank_ || notice[0] == 0) continue;
    const std::string which = notice[1] == flight.epoch ? "this operation" : "operation " + std::to_string(notice[1]);
    const std::string who = "rank " + std::to_string(peer) + " gave up " + which;
    if (notice[2] == FlagTable::kNone) return who;
    return who + ", in which chunk " + std::to_string(notice[2]) + " of rank " + std::to_string(notice[3]) +
           " never arrived";
  }
  return "";
}

std::string Watchdog::where(const Flight& flight, const Message* message) const {
  std::string text = "rank " + std::to_string(rank_) + ": " + (flight.site.empty() ? "unnamed site" : flight.site) +
                     ": " + flight.program->op;
  if (message == nullptr) return text + " (operation " + std::to_string(flight.epoch) + ")";
  return text + " step " + std::to_string(message->step) + " of " + std::to_string(flight.program->steps) +
         ", chunk " + std::to_string(message->chunk) + ", peer rank " + std::to_string(message->peer);
}

void Watchdog::fail(const std::string& text, uint32_t epoch, uint32_t chunk, uint32_t peer) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = text;
    failed_.store(true, std::memory_order_release);
  }
  uint32_t* notice = written_ + FlagTable::flag_words(table_.world());
  const uint32_t fields[FlagTable::kNoticeWords] = {1, epoch, chunk, peer};
  std::copy(std::begin(fields), std::end(fields), notice);
  for (uint32_t other = 0; other < table_.world(); ++other) {
    if (other == rank_) continue;
    // The word that says that there is a notice goes last.
    const uint64_t to = table_.notice(other, rank_);
    const uint64_t rest = sizeof(fields) - sizeof(uint32_t);
    driver_.check(driver_.copy_to_device(to + sizeof(uint32_t), notice + 1, rest, stream_), "cuMemcpyHtoDAsync");
    driver_.check(driver_.copy_to_device(to, notice, sizeof(uint32_t), stream_), "cuMemcpyHtoDAsync");
  }
  release();
}

void Watchdog::release() {
  const uint64_t words = FlagTable::flag_words(table_.world());
  {
    const std::lock_guard lock(mutex_);
    std::fill(written_, written_ + words, last_epoch_ + kReleased);
  }
  driver_.check(driver_.copy_to_device(table_.flag(rank_, 0, 0), written_, words * sizeof(uint32_t), stream_),
                "cuMemcpyHtoDAsync");
  settle();
}

}  // namespace flashtrain
