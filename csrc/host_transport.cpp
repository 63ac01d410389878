#include "host_transport.hpp"

#include <cmath>
#include <stdexcept>
#include <utility>

#include <unistd.h>

#include "clock.hpp"

namespace flashtrain {
namespace {

constexpr uint64_t kSmallestRing = 4096;

}  // namespace

HostTransport::HostTransport(uint32_t rank, uint32_t world, uint64_t ring_bytes)
    : rank_(rank), world_(world), process_(getpid()), peers_(world) {
  if (rank >= world) throw std::invalid_argument("rank " + std::to_string(rank) + " is not one of " + std::to_string(world));
  if (ring_bytes < kSmallestRing) throw std::invalid_argument("a ring needs " + std::to_string(kSmallestRing) + " bytes");
  own_ = Segment::create(rank, world, ring_bytes);
  sending_ = std::make_unique<Courier>(own_->send_bell, "flashtrain-send", "the peer has taken no data");
  receiving_ = std::make_unique<Courier>(own_->receive_bell, "flashtrain-recv", "no data");
}

void HostTransport::connect(uint32_t peer, const Address& address) {
  check_usable();
  if (peer >= world_ || peer == rank_) throw std::invalid_argument("there is no peer " + std::to_string(peer));
  peers_[peer] = Segment::open(address, peer, world_);
}

void HostTransport::start() {
  check_usable();
  for (uint32_t peer = 0; peer < world_; ++peer) {
    if (peer == rank_) continue;
    Segment& segment = peers_[peer];
    if (!segment) throw std::logic_error("peer " + std::to_string(peer) + " is not connected");
    sending_->add(std::make_unique<Outbox>(peer, own_->send_bell, segment, rank_));
    receiving_->add(std::make_unique<Inbox>(peer, own_->receive_bell, own_, segment->send_bell));
  }
  own_.close_descriptor();
}

std::shared_ptr<const Operation> HostTransport::open(std::string label) {
  check_usable();
  return std::make_shared<const Operation>(epochs_++, std::move(label));
}

RequestPointer HostTransport::send(std::shared_ptr<const Operation> operation, uint32_t step, uint32_t peer,
                                   uint32_t chunk, uint32_t slot, uintptr_t data, uint64_t bytes) {
  return post(*sending_, peer, std::make_shared<Request>(std::move(operation), step, chunk, slot, data, bytes));
}

RequestPointer HostTransport::receive(std::shared_ptr<const Operation> operation, uint32_t step, uint32_t peer,
                                      uint32_t chunk, uint32_t slot, uintptr_t data, uint64_t bytes) {
  return post(*receiving_, peer, std::make_shared<Request>(std::move(operation), step, chunk, slot, data, bytes));
}

RequestPointer HostTransport::post(Courier& courier, uint32_t peer, RequestPointer request) {
  check_usable();
  request->link = courier.link(peer);
  if (request->link == nullptr) throw std::invalid_argument("there is no peer " + std::to_string(peer));
  courier.post(request);
  return request;
}

double HostTransport::wait(const RequestPointer& request, double timeout, const std::function<void()>& breathe) {
  if (!request->pending() && request->failure.empty()) return seconds(request->landed);
  const std::shared_lock lock(waiting_);
  check_usable();
  const uint32_t peer = request->link->peer;
  // Bounded, so that adding it to a clock does not overflow.
  const auto nanoseconds = static_cast<int64_t>(std::fmin(timeout, 1e9) * 1e9);
  std::string problem = request->courier->wait(request, nanoseconds, [&] {
    breathe();
    return gone(peer);
  });
  if (problem.empty()) return seconds(request->landed);
  // The awaited rank may itself be waiting in vain: name the one at the root.
  for (uint32_t other = 0; other < world_; ++other) {
    if (other != rank_ && other != peer && died(other)) problem += "; rank " + std::to_string(other) + " has died";
  }
  throw TransportFailure(problem);
}

bool HostTransport::died(uint32_t peer) const {
  const Segment& segment = peers_[peer];
  try {
    return process_start_time(segment->pid) != segment->start_time;
  } catch (const std::runtime_error&) {
    return false;  // nobody knows; its silence has a time-out
  }
}

std::string HostTransport::gone(uint32_t peer) const {
  const Segment& segment = peers_[peer];
  const std::string name = "rank " + std::to_string(peer);
  if (segment->closed.load(std::memory_order_acquire) != 0) return name + " has shut its transport down";
  if (died(peer)) return name + " has died (process " + std::to_string(segment->pid) + ")";
  return {};
}

void HostTransport::abort(const Operation& operation) {
  // In a forked child, and when join() has come to its end, no thread touches any tensor. Until then one may, closed
  // or not.
  if (forked()) return;
  const std::shared_lock lock(waiting_);
  if (!own_) return;
  sending_->abort(operation);
  receiving_->abort(operation);
}

bool HostTransport::forked() const { return getpid() != process_; }

void HostTransport::check_usable() const {
  if (closed_) throw TransportFailure("the transport was shut down");
  if (forked()) throw TransportFailure("a transport cannot be used in a forked child process");
}

bool HostTransport::close() {
  if (closed_) return false;
  worker_time_ = worker_time();
  closed_ = true;
  return true;
}

void HostTransport::join() {
  if (forked()) {
    sending_->disown();
    receiving_->disown();
    // Their destructors would look at bells that are not mapped here.
    static_cast<void>(sending_.release());
    static_cast<void>(receiving_.release());
    for (Segment& peer : peers_) peer.disown();
    own_.disown();
    return;
  }
  own_->closed.store(1, std::memory_order_release);
  for (const Segment& peer : peers_) {
    if (!peer) continue;
    peer->send_bell.ring_all();
    peer->receive_bell.ring_all();
  }
  sending_->stop();
  receiving_->stop();
  const std::unique_lock lock(waiting_);
  for (Segment& peer : peers_) peer.unmap();
  own_.unmap();
}

double HostTransport::worker_time() const {
  if (closed_ || forked()) return worker_time_;
  return seconds(sending_->worker_time() + receiving_->worker_time());
}

}  // namespace flashtrain
