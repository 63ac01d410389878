#include "copy_engine.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include <unistd.h>

namespace flashtrain {
namespace {

// Flags compare by signed difference, so none in use may lag by 2^31 epochs, though a column may go unused for
// long. Every so many epochs all are brought up.
constexpr uint32_t kRefresh = 1u << 30;

void* handle(uint64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

}  // namespace

CopyEngine::CopyEngine(const std::string& library, uint32_t rank, double timeout, uint32_t epoch,
                       uint64_t host_tables, const std::vector<uint64_t>& device_tables, bool captured)
    : driver_(Driver::load(library)),
      rank_(rank),
      captured_(captured),
      tables_(handle(host_tables)),
      host_(map(host_tables, static_cast<uint32_t>(device_tables.size())), static_cast<uint32_t>(device_tables.size())),
      device_(device_tables),
      process_(getpid()),
      watchdog_(std::make_unique<Watchdog>(rank, FlagTable(host_tables, device_.world()), timeout)),
      epoch_(epoch) {
  int device = 0, can_flush = 0, least = 0, greatest = 0;
  driver_.check(driver_.context_get_current(&context_), "cuCtxGetCurrent");
  driver_.check(driver_.context_get_device(&device), "cuCtxGetDevice");
  driver_.check(driver_.device_get_attribute(&can_flush, kCanFlushRemoteWrites, device), "cuDeviceGetAttribute");
  // A chunk and its flag are two remote writes, and a device may reorder them unless asked to flush.
  if (can_flush != 0) wait_flags_ |= kWaitThenFlush;
  driver_.check(driver_.context_get_priorities(&least, &greatest), "cuCtxGetStreamPriorityRange");
  driver_.check(driver_.stream_create(&copies_, kStreamNonBlocking, greatest), "cuStreamCreateWithPriority");
  for (EventHandle* event : {&begun_, &ready_, &copied_, &done_}) {
    driver_.check(driver_.event_create(event, kEventWithoutTiming), "cuEventCreate");
  }
}

uint64_t CopyEngine::map(uint64_t tables, uint32_t world) {
  DeviceAddress mapped = 0;
  driver_.check(driver_.host_register(tables_, world * FlagTable::bytes(world), kRegisterForAllDevices),
                "cuMemHostRegister");
  driver_.check(driver_.host_get_device_pointer(&mapped, handle(tables), 0), "cuMemHostGetDevicePointer");
  return mapped;
}

CopyEngine::~CopyEngine() {
  if (getpid() != process_) {
    // A forked child has neither that thread, which would be waited for, nor the driver.
    static_cast<void>(watchdog_.release());
    return;
  }
  watchdog_->stop();
  forget_products();
  // While the process ends the driver may be gone: there is nobody left to tell.
  driver_.stream_destroy(copies_);
  for (const EventHandle event : {begun_, ready_, copied_, done_}) driver_.event_destroy(event);
  driver_.host_unregister(tables_);
}

std::vector<uint64_t> CopyEngine::directory(const std::vector<uint64_t>& landings, uint64_t stride,
                                            uint32_t buffers) const {
  std::vector<uint64_t> addresses;
  for (uint32_t place = 0; place < buffers; ++place) {
    for (const uint64_t landing : landings) addresses.push_back(landing + place * stride);
    for (const FlagTable* table : {&device_, &host_}) {
      for (uint32_t peer = 0; peer < table->world(); ++peer) addresses.push_back(table->flag(peer, rank_, shift(place)));
    }
  }
  return addresses;
}

void CopyEngine::use_landings(std::vector<uint64_t> landings, uint64_t stride, uint64_t directory, uint32_t buffers) {
  if (flight_) throw std::logic_error("landing buffers change while an operation is open");
  if (landings.size() != host_.world()) throw std::invalid_argument("every rank needs a landing buffer");
  if (buffers < 2 || (captured_ && buffers != 2)) throw std::invalid_argument("there are too few or too many landing buffers");
  landings_ = std::move(landings);
  stride_ = stride;
  directory_ = directory;
  buffers_ = buffers;
  // Nothing moves anywhere, so any may be the next. Ranks count from here, and not by epochs, which begin again at 2^32.
  place_ = 0;
}

// `later` goes on only when what `earlier` now holds is done. The event may be recorded again at once: a wait
// is for the recording that it found.
void CopyEngine::order(StreamHandle later, EventHandle event, StreamHandle earlier) {
  driver_.check(driver_.event_record(event, earlier), "cuEventRecord");
  driver_.check(driver_.stream_wait_event(later, event, 0), "cuStreamWaitEvent");
}

uint32_t CopyEngine::open(std::shared_ptr<const Program> program, const std::string& site, uint64_t stream,
                          bool device_flags) {
  check();
  if (flight_) throw std::logic_error("an operation is open; give operations that overlap a group of their own");
  if (landings_.empty()) throw std::logic_error("there are no landing buffers yet");
  for (const auto* messages : {&program->sends, &program->arrivals}) {
    for (const Message& message : *messages) {
      if (message.peer >= host_.world() || message.peer == rank_ ||
          message.column >= (captured_ ? FlagTable::kSetColumns : FlagTable::kColumns) ||
          message.offset + message.bytes > stride_) {
        throw std::invalid_argument("a message of " + program->op + " has no place in this transport");
      }
    }
  }
  if (program->sends.empty()) throw std::invalid_argument(program->op + " sends nothing: it needs no transport");
  // Backward passes run on another thread, where no context may be current yet.
  driver_.check(driver_.context_set_current(context_), "cuCtxSetCurrent");
  follows_ = follows(handle(stream));
  if (follows_ && handle(stream) != stream_) {
    driver_.check(driver_.stream_wait_event(handle(stream), done_, 0), "cuStreamWaitEvent");
  }
  stream_ = handle(stream);
  if (captured_) {
    if (!follows_) meet(site);
    const uint32_t number = epoch_ + 1;
    const auto flight = watchdog_->enroll(number, site, std::move(program), shift(number));
    together(stream_, {{kWriteWord, host_.under_way(rank_), flight->ticket, kWriteAfterEarlierWrites}});
    driver_.check(driver_.event_record(begun_, stream_), "cuEventRecord");
    flight_ = flight;
  } else {
    driver_.check(driver_.event_record(begun_, stream_), "cuEventRecord");
    flight_ = watchdog_->add(epoch_ + 1, site, std::move(program));
  }
  epoch_ = flight_->epoch;
  place_ = captured_ ? epoch_ % 2 : next_place();
  device_flags_ = device_flags;
  first_ = behind_opening_ = signalled_ = carried_ = kept_ = ended_ = false;
  pushed_.assign(flight_->program->sends.size(), false);
  awaited_.assign(flight_->program->arrivals.size(), false);
  if (!captured_ && epoch_ % kRefresh == 0) refresh_flags();
  return epoch_;
}

std::vector<uint32_t> CopyEngine::all_sends() const {
  std::vector<uint32_t> all(flight_->program->sends.size());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

uint32_t CopyEngine::open_early(std::shared_ptr<const Program> program, const std::string& site, uint64_t stream,
                                const std::vector<uint64_t>& sources) {
  open(std::move(program), site, stream, false);
  try {
    push_early(all_sends(), sources);
  } catch (...) {
    abort("an exception broke it off");
    throw;
  }
  return epoch_;
}

void CopyEngine::refresh_flags() {
  come_after_opening();
  // Everything of the epoch before has been pushed, so its number is true of every column. The own row is
  // for signals of kernels, which come behind the opening on their stream.
  for (const FlagTable* table : {&host_, &device_}) {
    for (uint32_t at = 0; at < table->world(); ++at) {
      driver_.check(driver_.fill_words(table->flag(at, rank_, 0), epoch_ - 1, FlagTable::kColumns,
                                       at == rank_ ? stream_ : copies_),
                    "cuMemsetD32Async");
    }
  }
}

void CopyEngine::push(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources) {
  push(which, sources, After::kStream);
}

void CopyEngine::push_early(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources,
                            const CopyEngine* settled) {
  if (settled != nullptr) come_after_the_last(*settled);
  push(which, sources, After::kOpening);
}

void CopyEngine::push_signalled(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources) {
  push(which, sources, After::kSignal);
}

void CopyEngine::push(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources, After after) {
  check();
  if (!flight_) throw std::logic_error("no operation is open");
  if (which.size() != sources.size()) throw std::invalid_argument("every send needs a source");
  if (after == After::kStream) {
    order(copies_, ready_, stream_);
    behind_opening_ = true;
  } else {
    come_after_opening();
  }
  const uint64_t buffer = place_ * stride_;
  std::vector<WordOperation> told;
  for (size_t number = 0; number < which.size(); ++number) {
    const Message& message = flight_->program->sends.at(which[number]);
    if (pushed_[which[number]]) throw std::logic_error("a chunk is pushed twice");
    pushed_[which[number]] = true;
    if (after == After::kSignal) {
      signalled_ = true;
      driver_.check(driver_.stream_wait_value(copies_, signal(which[number]), flight_->up, kWaitUntilReached),
                    "cuStreamWaitValue32");
    }
    const Turn& turn = flight_->program->turns[which[number]];
    if (turn.awaited != Turn::kNone) wait_on(copies_, turn.awaited);
    if (message.bytes != 0) {
      const DeviceAddress to = landings_[message.peer] + buffer + message.offset;
      driver_.check(driver_.copy_on_device(to, sources[number], message.bytes, copies_), "cuMemcpyDtoDAsync");
    }
    const uint32_t column = message.column + flight_->shift;
    const uint64_t seen = host_.flag(message.peer, rank_, column);
    // A write to the host table takes 3 us of the stream. Where a kernel waits for the device's, the watchdog can be
    // told when all copies are under way.
    if (device_flags_) told.push_back({kWriteWord, seen, flight_->up, kWriteAfterEarlierWrites});
    const uint64_t flag = device_flags_ ? device_.flag(message.peer, rank_, column) : seen;
    driver_.check(driver_.stream_write_value(copies_, flag, flight_->up, kWriteAfterEarlierWrites),
                  "cuStreamWriteValue32");
    if (turn.peer != Turn::kNone) {
      driver_.check(driver_.stream_write_value(copies_, host_.flag(turn.peer, rank_, turn.column + flight_->shift),
                                               flight_->up, kWriteAfterEarlierWrites),
                    "cuStreamWriteValue32");
    }
  }
  // The end of the operation need not wait for that, but a capture needs every end of it.
  if (!captured_ && !told.empty()) copies_end_here();
  together(copies_, std::move(told));
}

void CopyEngine::copies_end_here() {
  driver_.check(driver_.event_record(copied_, copies_), "cuEventRecord");
  ended_ = true;
}

void CopyEngine::wait_for_copies() {
  if (!ended_) copies_end_here();
  driver_.check(driver_.stream_wait_event(stream_, copied_, 0), "cuStreamWaitEvent");
}

void CopyEngine::come_after_opening() {
  if (behind_opening_) return;
  driver_.check(driver_.stream_wait_event(copies_, begun_, 0), "cuStreamWaitEvent");
  behind_opening_ = true;
}

// Two landing buffers suffice all the same: what the argument in the header needs of a push is that it comes after the
// end of the epoch before.
void CopyEngine::come_after_the_last(const CopyEngine& other) {
  if (behind_opening_ || captured_ || !follows_ || other.first_ || other.flight_) return;
  for (const EventHandle end : {done_, other.done_}) {
    driver_.check(driver_.stream_wait_event(copies_, end, 0), "cuStreamWaitEvent");
  }
  behind_opening_ = true;
}

void CopyEngine::let_follow(uint64_t stream) {
  check();
  if (flight_) throw std::logic_error("an operation is open: it has no end yet");
  if (first_) return;
  driver_.check(driver_.context_set_current(context_), "cuCtxSetCurrent");  // as in open()
  driver_.check(driver_.stream_wait_event(handle(stream), done_, 0), "cuStreamWaitEvent");
}

void CopyEngine::keep(uint64_t source, uint64_t offset, uint64_t bytes) {
  check();
  if (!flight_) throw std::logic_error("no operation is open");
  if (offset > stride_ || bytes > stride_ - offset) throw std::invalid_argument("what is kept has no place in the landing buffer");
  if (bytes == 0) return;
  come_after_opening();
  const DeviceAddress to = landings_[rank_] + place_ * stride_ + offset;
  driver_.check(driver_.copy_on_device(to, source, bytes, copies_), "cuMemcpyDtoDAsync");
  kept_ = true;
  ended_ = false;
}

void CopyEngine::wait(uint32_t which) { wait_on(stream_, which); }

void CopyEngine::wait_on(StreamHandle stream, uint32_t which) {
  check();
  if (!flight_) throw std::logic_error("no operation is open");
  if (awaited_.at(which)) return;
  awaited_[which] = true;
  const Message& message = flight_->program->arrivals[which];
  const uint64_t flag = host_.flag(rank_, message.peer, message.column + flight_->shift);
  driver_.check(driver_.stream_wait_value(stream, flag, flight_->up, wait_flags_), "cuStreamWaitValue32");
}

uint64_t CopyEngine::wait_beside() {
  if (std::find(pushed_.begin(), pushed_.end(), false) != pushed_.end()) {
    throw std::logic_error("a wait before the pushes would hold them up");
  }
  for (uint32_t arrival = 0; arrival < awaited_.size(); ++arrival) wait_on(copies_, arrival);
  ended_ = false;
  return reinterpret_cast<uintptr_t>(copies_);
}

void CopyEngine::wait_for_all() {
  for (uint32_t arrival = 0; arrival < awaited_.size(); ++arrival) wait(arrival);
  if (kept_) wait_for_copies();
  kept_ = false;
}

void CopyEngine::close() {
  check();
  if (!flight_) throw std::logic_error("no operation is open");
  if (std::find(pushed_.begin(), pushed_.end(), false) != pushed_.end()) {
    throw std::logic_error("an operation ends before all its chunks were pushed");
  }
  if (!captured_) {
    for (uint32_t arrival = 0; arrival < awaited_.size(); ++arrival) wait(arrival);
  }
  if (behind_opening_) wait_for_copies();
  if (captured_) wait_and_lower();
  driver_.check(driver_.event_record(done_, stream_), "cuEventRecord");
  flight_.reset();
}

void CopyEngine::abort(const std::string& why) {
  if (!flight_) return;
  if (captured_) {
    // Nothing has run. The capture is lost, and the next operation begins another.
    flight_.reset();
    capture_ = 0;
    return;
  }
  // Whatever this says, what is under way must come to its end before the memory is used otherwise.
  driver_.event_record(copied_, copies_);
  driver_.stream_wait_event(stream_, copied_, 0);
  driver_.event_record(done_, stream_);
  watchdog_->give_up(*flight_, why);
  flight_.reset();
}

uint64_t CopyEngine::signal(uint32_t send) const {
  if (send >= FlagTable::kColumns) throw std::out_of_range("there are not so many sends");
  return signals() + sizeof(uint32_t) * send;
}

}  // namespace flashtrain
