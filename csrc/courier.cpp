#include "courier.hpp"

#include <algorithm>
#include <csignal>
#include <cstdio>

#include <pthread.h>

#include "clock.hpp"

namespace flashtrain {
namespace {

// How often a waiting caller looks whether its peer still lives.
constexpr int64_t kProbe = 100'000'000;

std::string lasting(int64_t nanoseconds) {
  char text[32];
  std::snprintf(text, sizeof text, " for %.1f s", seconds(nanoseconds));
  return text;
}

timespec at(int64_t time) { return {time / 1'000'000'000, time % 1'000'000'000}; }

// Blocks all signals in this thread, and in those that it starts, for as long as it lives.
class NoSignals {
 public:
  NoSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  NoSignals(const NoSignals&) = delete;
  NoSignals& operator=(const NoSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

Link* Courier::link(uint32_t peer) const {
  for (const auto& link : links_) {
    if (link->peer == peer) return link.get();
  }
  return nullptr;
}

void Courier::post(const RequestPointer& request) {
  request->courier = this;
  request->turn = turns_++;
  const bool look = request->link->post(request);
  if (!worker_.joinable() && (look || request->pending())) {
    // Signals belong to the interpreter's threads. Where no thread can be had this throws.
    const NoSignals blocked;
    worker_ = std::thread(&Courier::work, this);
    pthread_setname_np(worker_.native_handle(), name_.c_str());
  }
  if (look) bell_.ring();
}

bool Courier::move_one(Link* preferred, uint32_t callers) {
  if (preferred != nullptr && preferred->advance(UINT64_MAX, callers) == Outcome::kMoved) return true;
  // Links without requests come last: they may hold pieces of an aborted operation to throw away.
  std::vector<std::pair<uint64_t, Link*>> order;
  order.reserve(links_.size());
  for (const auto& link : links_) {
    if (link.get() != preferred) order.emplace_back(link->first_turn(), link.get());
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return std::any_of(order.begin(), order.end(), [&](const auto& entry) {
    return entry.second->advance(UINT64_MAX, callers) == Outcome::kMoved;
  });
}

void Courier::work() {
  while (true) {
    // Read before looking, at `stopping_` too: a ring after the look changes the count, and the sleep
    // returns at once.
    const uint32_t heard = bell_.heard();
    if (stopping_.load(std::memory_order_acquire)) return;
    if (move_one(nullptr, 0)) continue;
    bell_.worker_asleep.store(1, std::memory_order_relaxed);
    // Pairs with the fence in Bell::ring, see there.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!move_one(nullptr, 0)) bell_.sleep(heard, kWorker, nullptr);
    bell_.worker_asleep.store(0, std::memory_order_relaxed);
  }
}

// Announces a caller on the bell for as long as it lives.
class Courier::Caller {
 public:
  explicit Caller(Courier& courier) : courier_(courier) {
    courier_.bell_.callers.fetch_add(1, std::memory_order_relaxed);
    // Pairs with the fence in Link::finish, see there.
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }

  ~Caller() {
    courier_.bell_.callers.fetch_sub(1, std::memory_order_relaxed);
    // Rings that this caller answered until now are the worker's again. Either a peer's ring sees no
    // caller and wakes the worker, or the look below sees what the peer published. The caller may also
    // have left a ring as soon as it had what it wanted, without asking to be rung for the next message:
    // ready() does.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    bool ready = false;
    for (const auto& link : courier_.links_) ready |= link->ready();
    if (ready) courier_.bell_.ring();
  }

  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

 private:
  Courier& courier_;
};

std::string Courier::wait(const RequestPointer& request, int64_t timeout, const std::function<std::string()>& probe) {
  if (!request->pending()) return request->failure;
  const Caller caller(*this);
  return wait_as_caller(request, timeout, probe);
}

std::string Courier::wait_as_caller(const RequestPointer& request, int64_t timeout,
                                    const std::function<std::string()>& probe) {
  const int64_t start = now();
  int64_t next_probe = start + kProbe;
  while (true) {
    const uint32_t heard = bell_.heard();
    if (!request->pending()) return request->failure;
    if (stopping_.load(std::memory_order_acquire)) return "the transport was shut down";
    if (move_one(request->link, 1)) continue;
    const int64_t time = now();
    const int64_t quiet = time - std::max(start, request->link->progress());
    if (quiet >= timeout) return silence_ + lasting(quiet);
    if (time >= next_probe) {
      next_probe = time + kProbe;
      if (const std::string end = probe(); !end.empty()) {
        // What the peer wrote before its end counts, and only a look that began after it is the last. Another
        // thread at work here may be taking it in.
        for (Outcome look = Outcome::kMoved; request->pending() && look != Outcome::kNothing;) {
          look = request->link->advance(UINT64_MAX, 1);
          if (look == Outcome::kBusy) std::this_thread::yield();
        }
        return request->pending() ? end : request->failure;
      }
    }
    const timespec deadline = at(std::min(next_probe, time + timeout - quiet));
    bell_.sleep(heard, kCaller, &deadline);
  }
}

void Courier::abort(const Operation& operation) {
  for (const auto& link : links_) link->abort(operation);
  bell_.ring_all();
}

void Courier::stop() {
  if (stopping_.exchange(true, std::memory_order_release)) return;
  bell_.ring_all();
  if (worker_.joinable()) worker_.join();
}

void Courier::disown() {
  if (worker_.joinable()) worker_.detach();
}

int64_t Courier::worker_time() {
  clockid_t clock;
  if (!worker_.joinable() || pthread_getcpuclockid(worker_.native_handle(), &clock) != 0) return 0;
  return read_clock(clock);
}

}  // namespace flashtrain
