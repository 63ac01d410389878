// The part of the copy engine that is for products in one kernel.
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "copy_engine.hpp"

namespace flashtrain {
namespace {

// Which engine ran the last product of a context. Never destroyed: engines may end after main().
std::mutex& products_mutex() {
  static auto& mutex = *new std::mutex;
  return mutex;
}
std::map<ContextHandle, CopyEngine*>& last_products() {
  static auto& last = *new std::map<ContextHandle, CopyEngine*>;
  return last;
}

}  // namespace

// A kernel that waits for peers keeps its multiprocessors. Of two at once, in another order on another rank, each could
// wait for what the other keeps from running.
void CopyEngine::come_after_other_products() {
  const std::lock_guard lock(products_mutex());
  CopyEngine*& last = last_products()[context_];
  if (last != nullptr && last != this) driver_.check(driver_.stream_wait_event(stream_, last->done_, 0), "cuStreamWaitEvent");
  last = this;
}

void CopyEngine::forget_products() {
  const std::lock_guard lock(products_mutex());
  const auto last = last_products().find(context_);
  if (last != last_products().end() && last->second == this) last_products().erase(last);
}

void CopyEngine::launch(const KernelCall& call, StreamHandle stream, const std::vector<uint64_t>& given) {
  std::vector<uint64_t> values = call.values;
  const auto fill = [&values](const std::vector<uint32_t>& places, uint64_t value) {
    for (const uint32_t place : places) values.at(place) = value;
  };
  for (size_t number = 0; number < given.size(); ++number) fill(call.places[number], given[number]);
  fill(call.landing, landings_[rank_] + place_ * stride_);
  fill(call.flags, device_.flag(rank_, 0, flight_->shift));
  fill(call.epoch, flight_->up);
  fill(call.directory, directory_ + place_ * (sizeof(uint64_t) * 3 * host_.world()));
  fill(call.signals, device_.flag(rank_, rank_, 0));
  call.launch->start(call.blocks, stream, values);
}

uint32_t CopyEngine::start(const FusedProduct& product, const std::string& site, uint64_t stream,
                           const std::vector<uint64_t>& given) {
  if (given.size() != product.product.places.size()) throw std::invalid_argument("a product is given too few addresses");
  open(product.program, site, stream, true);
  try {
    if (!captured_) come_after_other_products();
    if (product.carrier) {
      // In this order where streams share a hardware queue: what stands behind another there need not wait for it.
      come_after_opening();
      if (product.early) launch(*product.carrier, copies_, given);
      launch(product.product, stream_, given);
      if (!product.early) launch(*product.carrier, copies_, given);
      carried_ = !product.early;
      pushed_.assign(pushed_.size(), true);
    } else {
      const std::vector<uint32_t> all = all_sends();
      std::vector<uint64_t> sources = product.offsets;
      for (uint64_t& source : sources) source += given.at(product.source);
      // Where streams share a hardware queue, the kernel would stand behind a wait for a turn.
      const bool first = product.early && !product.program->takes_turns;
      if (first) push_early(all, sources);
      launch(product.product, stream_, given);
      if (!first) product.early ? push_early(all, sources) : push_signalled(all, sources);
    }
    // The kernel waits for rows alone, but what an empty chunk says must have been heard as well. A captured
    // operation waits for the flags in the host table, which are raised last: one that was lowered too early would
    // stay up.
    for (uint32_t arrival = 0; arrival < awaited_.size() && !captured_; ++arrival) {
      if (product.program->arrivals[arrival].bytes != 0) awaited_[arrival] = true;
    }
  } catch (...) {
    abort("an exception broke it off");
    throw;
  }
  return epoch_;
}

}  // namespace flashtrain
