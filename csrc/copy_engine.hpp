// Pushes chunks into the memory of peer GPUs with copy engines, ordered by streams and flags alone.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "driver.hpp"
#include "kernel.hpp"
#include "program.hpp"
#include "watchdog.hpp"

namespace flashtrain {

// A kernel of an operation, and what of it changes from call to call.
struct KernelCall {
  std::shared_ptr<Launch> launch;
  uint32_t blocks;
  // Parameters that are the same in every call; the others are filled in from what the caller gives.
  std::vector<uint64_t> values;
  std::vector<std::vector<uint32_t>> places;  // of each address that the caller gives: the parameters that take it
  // Parameters that take this rank's landing buffer, its flags, what they hold when they are up, this rank's directory,
  // and the words in which kernels of this rank tell each other that a payload is ready, one a send.
  std::vector<uint32_t> landing, flags, epoch, directory, signals;
};

// A product in one kernel whose operand arrives, or whose result leaves, chunk by chunk while it runs.
struct FusedProduct {
  std::shared_ptr<const Program> program;
  KernelCall product;
  // A kernel that pushes, and raises the peers' flags: it runs beside the product, on multiprocessors of its own. Without
  // one copy engines push.
  std::optional<KernelCall> carrier;
  // Copy engines read sends from this one of the given addresses, each so many bytes from it.
  uint32_t source;
  std::vector<uint64_t> offsets;
  bool early;  // sends are complete when the operation begins; else the kernel signals each
};

// Operations run one after the other, in the same order on every rank; each is an epoch. Nothing here blocks
// the host but open(), when it is too far ahead of the device. Addresses and streams are the raw values that
// the CUDA run time and PyTorch hand out. One thread at a time may call; which one may change.
//
// Why two landing buffers, used in turn, need no acknowledgement. Let rank r push epoch k+2 into the buffer of
// rank p that epoch k used. On r the push comes after the end of epoch k+1 (open() and push() order the copy
// stream behind the stream that computes, and that behind the end of the epoch before), hence after r saw every
// message that it expected in k+1. In each schedule these include one that p pushed in k+1, or that some rank
// pushed after a chain of such messages began at p: a direct schedule has a message, if an empty one, for every
// ordered pair of ranks, and what arrives last around a ring began at every other rank. On p, pushes of k+1
// come after the end of epoch k, in which all reading of the buffer happened. So r's push comes after p's reads.
// One buffer would not do: r may push k+1 while p still reads k.
//
// With B buffers in turn, the same holds for reads of epoch k that come only before the opening of epoch k+B-1: of what is
// lent to readers who outlive their operation (transport/loans.py). r pushes k+B after it heard p's message of k+B-1, and
// p pushes that one after it was opened. Such an engine never pushes with `settled`, which does not wait for the opening.
//
// Why what was pushed may be freed or written once close() was called. A push reads memory of the caller on the
// copy stream, unknown to PyTorch's allocator. close() makes the stream that computes wait for the copy
// stream; later work of the caller, and whoever gets the memory from the allocator of that stream, comes after.
//
// An engine for captured operations records them into the CUDA graph that is being captured. A replay does what was
// recorded, so nothing in it can count epochs: flags go up to 1, and each rank lowers its own at the end of the
// operation. Landing buffers and sets of flags take turns with the number of the operation in its capture, and the
// first of a capture begins with a meeting, in which every rank raises a flag at all others and waits for theirs.
// So between two epochs that use the same buffer there is always one in which each rank hears from all others: the
// operation between them in their graph, or a meeting. That is all that the argument above needs, whatever graph
// follows which. It holds for flags as well: a peer raises one again, for epoch k+2 at the earliest, after it heard
// from this rank in k+1, hence after this rank lowered it. The meeting has a flag of its own, and an operation
// between it and the next. Replays must follow one another on the device, in the same order on every rank.
class CopyEngine {
 public:
  // `host_tables`: the ranks' host tables, one after the other, page-aligned memory that all ranks map;
  // `device_tables`: addresses of their device tables. Their flags hold `epoch`, their notices zero. The calling
  // thread's context is used. `captured`: for captured operations, and `epoch` is 0. Throws std::runtime_error if
  // the driver lacks something.
  CopyEngine(const std::string& library, uint32_t rank, double timeout, uint32_t epoch, uint64_t host_tables,
             const std::vector<uint64_t>& device_tables, bool captured);
  ~CopyEngine();
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  // Where kernels of this rank find the peers: [buffers][3][world] addresses, for each place, of each rank's landing
  // buffer and of the first flag that this rank raises there, in the device table and in the host table.
  std::vector<uint64_t> directory(const std::vector<uint64_t>& landings, uint64_t stride, uint32_t buffers) const;
  // From here on each rank has `buffers` landing buffers (two, or for what is not captured more), from `landings` on
  // `stride` bytes apart, that operations use in turn; `directory` is memory of the device that holds what is said above.
  // No operation may be under way on any rank.
  void use_landings(std::vector<uint64_t> landings, uint64_t stride, uint64_t directory, uint32_t buffers);
  // Which of them the open operation uses, or the last; and which the next will.
  uint32_t place() const { return place_; }
  uint32_t next_place() const { return (place_ + 1) % buffers_; }

  // Start an operation on `stream`; returns its epoch, or its number in the capture. With `device_flags` every rank
  // must have them: its pushes then also raise flags that kernels of the receiver may wait for. Throws
  // std::logic_error if one is open.
  uint32_t open(std::shared_ptr<const Program> program, const std::string& site, uint64_t stream, bool device_flags);
  // The same, and push all sends early, each from its source.
  uint32_t open_early(std::shared_ptr<const Program> program, const std::string& site, uint64_t stream,
                      const std::vector<uint64_t>& sources);
  // Push sends number `which`, each from its source, once the stream has done what it now holds.
  void push(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources);
  // The same at once, for payloads that were complete when the operation was opened; with `settled`, for those that were
  // when the last operation of that engine ended. They then leave as soon as the operation before this one has ended,
  // whatever the stream has to do until it comes to this one.
  void push_early(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources,
                  const CopyEngine* settled = nullptr);
  // Open an operation for `product`, behind those of other engines of this context, push, and launch its kernels, which
  // wait for arrivals themselves; returns the epoch. It stays open, so that more can be done with what has landed, until
  // close().
  uint32_t start(const FusedProduct& product, const std::string& site, uint64_t stream,
                 const std::vector<uint64_t>& given);
  // Put what is this rank's own beside what lands: `bytes` from `source`, complete when the operation was opened, to
  // `offset` in the landing buffer. It goes behind what was pushed before.
  void keep(uint64_t source, uint64_t offset, uint64_t bytes);
  // What `stream` is given from here on comes after the operations that were closed.
  void let_follow(uint64_t stream);
  // Let the stream wait for arrival number `which`.
  void wait(uint32_t which);
  // Let the stream wait for all arrivals, and for what is kept.
  void wait_for_all();
  // Let the copy stream wait for all arrivals instead, behind the pushes; returns it. What is enqueued there runs
  // beside the stream that computes, until close().
  uint64_t wait_beside();
  // End the operation: the stream waits for arrivals that nobody waited for, and for the pushes.
  void close();
  // The open operation will not be finished: from here on everything throws, on the peers too.
  void abort(const std::string& why);
  void check() const { watchdog_->check(); }

  // Words of the host table for kernels: to signal payloads, one a send, and to learn, where it is not zero, that
  // a wait is in vain.
  uint64_t signals() const { return host_.flag(rank_, rank_, 0); }
  uint64_t stop_word() const { return host_.notice(rank_, rank_); }

 private:
  enum class After { kStream, kOpening, kSignal };
  // Push, each when a kernel of this rank has set word signal(send) to the epoch. Launch that kernel first:
  // where streams share a hardware queue, it would stand behind the wait.
  void push_signalled(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources);
  void launch(const KernelCall& call, StreamHandle stream, const std::vector<uint64_t>& given);
  uint64_t signal(uint32_t send) const;
  void push(const std::vector<uint32_t>& which, const std::vector<uint64_t>& sources, After after);
  std::vector<uint32_t> all_sends() const;
  void come_after_opening();
  void come_after_the_last(const CopyEngine& other);
  void come_after_other_products();
  void forget_products();
  void copies_end_here();
  void wait_for_copies();
  void wait_on(StreamHandle stream, uint32_t which);
  bool follows(StreamHandle stream);
  void meet(const std::string& site);
  void wait_and_lower();
  void together(StreamHandle stream, std::vector<WordOperation> operations);
  uint32_t shift(uint32_t number) const { return captured_ ? number % 2 * FlagTable::kSetColumns : 0; }
  void refresh_flags();
  void order(StreamHandle later, EventHandle event, StreamHandle earlier);

  uint64_t map(uint64_t tables, uint32_t world);

  const Driver& driver_;
  const uint32_t rank_;
  const bool captured_;
  void* const tables_;                   // as the processor sees them
  const FlagTable host_, device_;        // as the device sees them
  const int process_;
  std::unique_ptr<Watchdog> watchdog_;
  ContextHandle context_ = nullptr;
  unsigned wait_flags_ = kWaitUntilReached;
  StreamHandle copies_ = nullptr;
  EventHandle begun_ = nullptr, ready_ = nullptr, copied_ = nullptr, done_ = nullptr;
  std::vector<uint64_t> landings_;
  uint64_t stride_ = 0, directory_ = 0;
  uint32_t buffers_ = 2, place_ = 0;

  uint32_t epoch_;
  uint64_t capture_ = 0;                 // the driver's number of the capture
  std::shared_ptr<const Flight> flight_; // the open operation
  StreamHandle stream_ = nullptr;        // that computes, of the open operation or the last
  bool first_ = true;                    // there was no operation before
  bool follows_ = false;                 // the open one had another before it
  bool device_flags_ = false, signalled_ = false;
  bool carried_ = false;                 // by a kernel, whom the product tells in device memory
  bool behind_opening_ = false;          // the copy stream comes after the opening
  bool kept_ = false;                    // something is kept that the stream has not waited for
  bool ended_ = false;                   // copied_ was recorded behind all copies
  std::vector<bool> pushed_, awaited_;
};

}  // namespace flashtrain
