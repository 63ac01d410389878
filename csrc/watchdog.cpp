#include "watchdog.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "clock.hpp"

namespace flashtrain {
namespace {

// So many operations the host may be ahead of the device: enough to hide its own hiccups, and its failures
// are still told near the place where they happened.
constexpr size_t kDeepest = 32;
// How far ahead a released flag is set: beyond any epoch in use, and still ahead in signed difference.
constexpr uint32_t kReleased = 1u << 30;
constexpr int64_t kLongestInterval = 200'000'000, kShortestInterval = 2'000'000;
// Replays that follow a failure come to waits that nothing else ends.
constexpr int64_t kReleaseInterval = 1'000'000;
constexpr auto kPause = std::chrono::microseconds(20);

uint32_t load(uint64_t address) {
  return __atomic_load_n(reinterpret_cast<const uint32_t*>(static_cast<uintptr_t>(address)), __ATOMIC_ACQUIRE);
}

void store(uint64_t address, uint32_t value) {
  __atomic_store_n(reinterpret_cast<uint32_t*>(static_cast<uintptr_t>(address)), value, __ATOMIC_RELEASE);
}

std::string number(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

Watchdog::Watchdog(uint32_t rank, FlagTable table, double timeout)
    : rank_(rank),
      table_(std::move(table)),
      timeout_(std::llround(timeout * 1e9)),
      interval_(std::clamp(timeout_ / 20, kShortestInterval, kLongestInterval)),
      thread_([this] { watch(); }) {}

void Watchdog::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::shared_ptr<const Flight> Watchdog::add(uint32_t epoch, const std::string& site,
                                            std::shared_ptr<const Program> program) {
  auto flight = std::make_shared<Flight>();
  flight->epoch = epoch;
  flight->site = site;
  flight->program = std::move(program);
  flight->up = epoch;
  std::unique_lock lock(mutex_);
  retire();
  while (flights_.size() > kDeepest) {
    lock.unlock();
    std::this_thread::sleep_for(kPause);
    check();
    lock.lock();
    retire();
  }
  last_epoch_ = epoch;
  flights_.push_back(flight);
  return flight;
}

std::shared_ptr<const Flight> Watchdog::enroll(uint32_t number, const std::string& site,
                                               std::shared_ptr<const Program> program, uint32_t shift) {
  auto flight = std::make_shared<Flight>();
  flight->epoch = number;
  flight->site = site;
  flight->program = std::move(program);
  flight->up = 1;
  flight->shift = shift;
  const std::lock_guard lock(mutex_);
  captured_.push_back(flight);
  flight->ticket = static_cast<uint32_t>(captured_.size());
  return flight;
}

void Watchdog::give_up(const Flight& flight, const std::string& why) {
  fail(where(flight, nullptr) + ": " + why, flight.epoch, FlagTable::kNone, rank_);
}

void Watchdog::throw_failure() const {
  const std::lock_guard lock(mutex_);
  throw std::runtime_error(failure_);
}

// Whether the device has come to this operation: what it pushed first is at its receiver.
bool Watchdog::begun(const Flight& flight) const {
  if (flight.ticket != 0) return true;  // the device said so
  const Message& first = flight.program->sends.front();
  return reached(load(table_.flag(first.peer, rank_, first.column)), flight.epoch);
}

void Watchdog::retire() {
  // Operations follow one another on the device: where one has begun, those before it are over.
  while (flights_.size() > 1 && begun(*flights_[1])) flights_.pop_front();
}

// The captured operation that is under way.
std::shared_ptr<Flight> Watchdog::replayed() {
  const uint32_t ticket = load(table_.under_way(rank_));
  auto* const word = reinterpret_cast<uint32_t*>(static_cast<uintptr_t>(table_.ended(rank_)));
  const bool ended = __atomic_exchange_n(word, 0, __ATOMIC_ACQ_REL) != 0;
  const std::shared_ptr<Flight> flight = ticket == 0 || ticket > captured_.size() ? nullptr : captured_[ticket - 1];
  // The same operation again is another one if any has ended meanwhile.
  if (flight && (ended || flight != seen_)) flight->noticed = 0;
  seen_ = flight;
  return flight;
}

void Watchdog::watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const bool releasing = failed_ && !captured_.empty();
    wake_.wait_for(lock, std::chrono::nanoseconds(releasing ? kReleaseInterval : interval_));
    if (stopping_) break;
    retire();
    const std::shared_ptr<Flight> oldest = flights_.empty() ? replayed() : flights_.front();
    lock.unlock();
    if (failed_) {
      release();  // a late peer may have lowered a flag again
    } else if (oldest) {
      inspect(*oldest);
    }
    lock.lock();
  }
}

void Watchdog::inspect(Flight& flight) {
  const Message* awaited = missing(flight);
  const std::string notice = notice_of_a_peer(flight);
  if (!notice.empty()) {
    const uint32_t chunk = awaited != nullptr ? awaited->chunk : FlagTable::kNone;
    fail(where(flight, awaited) + ": " + notice, flight.epoch, chunk, awaited != nullptr ? awaited->peer : rank_);
    return;
  }
  if (awaited == nullptr || !begun(flight)) return;
  if (flight.noticed == 0) flight.noticed = now();
  if (now() - flight.noticed <= timeout_) return;
  fail(where(flight, awaited) + ": nothing arrived within " + number(seconds(timeout_)) + " s (operation " +
           std::to_string(flight.epoch) + ")",
       flight.epoch, awaited->chunk, awaited->peer);
}

const Message* Watchdog::missing(const Flight& flight) const {
  for (const Message& message : flight.program->arrivals) {
    const uint64_t flag = table_.flag(rank_, message.peer, message.column + flight.shift);
    if (!reached(load(flag), flight.up)) return &message;
  }
  return nullptr;
}

std::string Watchdog::notice_of_a_peer(const Flight& flight) const {
  for (uint32_t peer = 0; peer < table_.world(); ++peer) {
    const uint64_t notice = table_.notice(rank_, peer);
    if (peer == rank_ || load(notice) == 0) continue;
    const uint32_t epoch = load(notice + 4), chunk = load(notice + 8), awaited = load(notice + 12);
    const std::string which = epoch == flight.epoch ? "this operation" : "operation " + std::to_string(epoch);
    const std::string who = "rank " + std::to_string(peer) + " gave up " + which;
    if (chunk == FlagTable::kNone) return who;
    return who + ", in which chunk " + std::to_string(chunk) + " of rank " + std::to_string(awaited) + " never arrived";
  }
  return "";
}

std::string Watchdog::where(const Flight& flight, const Message* message) const {
  std::string text = "rank " + std::to_string(rank_) + ": " + (flight.site.empty() ? "unnamed site" : flight.site) +
                     ": " + flight.program->op + (flight.ticket != 0 ? " of a CUDA graph" : "");
  if (message == nullptr) return text + " (operation " + std::to_string(flight.epoch) + ")";
  return text + " step " + std::to_string(message->step) + " of " + std::to_string(flight.program->steps) +
         ", chunk " + std::to_string(message->chunk) + ", peer rank " + std::to_string(message->peer);
}

void Watchdog::fail(const std::string& text, uint32_t epoch, uint32_t chunk, uint32_t peer) {
  {
    const std::lock_guard lock(mutex_);
    if (failed_) return;
    failure_ = text;
    failed_.store(true, std::memory_order_release);
  }
  for (uint32_t other = 0; other < table_.world(); ++other) {
    // In the own table it is for this rank's kernels. The word that says that there is a notice goes last.
    const uint64_t notice = table_.notice(other, rank_);
    store(notice + 4, epoch);
    store(notice + 8, chunk);
    store(notice + 12, peer);
    store(notice, 1);
  }
  release();
}

void Watchdog::release() {
  uint32_t released;
  {
    const std::lock_guard lock(mutex_);
    released = last_epoch_ + kReleased;
  }
  for (uint32_t word = 0; word < FlagTable::flag_words(table_.world()); ++word) {
    store(table_.flag(rank_, 0, 0) + sizeof(uint32_t) * word, released);
  }
}

}  // namespace flashtrain
