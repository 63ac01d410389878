// A CUDA driver made of threads, to run the copy engine without a GPU. Device memory is host memory; a stream
// is a thread that works off a queue. As on a device, only streams, events and flags order anything, and
// fake_delay() makes every entry of a queue late by a random time, longer on streams that the driver was asked for
// (those of the copy engine), and kernels as long between what they wait for and what they read. What a stream in capture is given becomes part
// of a graph instead, to be run by fake_replay().
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kInvalidValue = 1, kNotFound = 500, kOtherCapture = 907;
std::atomic<uint32_t> longest_delay{0}, slowness{1};

void be_late(std::mt19937& random, uint32_t times) {
  const uint32_t limit = longest_delay * times;
  if (limit != 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % limit));
}

using Reached = std::vector<std::atomic<bool>>;  // of one replay: what its streams have come to

// What streams were given in one capture; an entry is run with the marks of its replay.
struct Graph {
  uint64_t number;
  std::map<void*, std::vector<std::function<void(Reached&)>>> entries;  // by stream
  std::map<void*, size_t> joined;  // how many entries of each another stream waits for
  std::map<void*, void*> streams;  // that run the entries of those that joined the capture
  size_t marks = 0;
};

struct Event {
  std::atomic<uint64_t> recorded{0}, reached{0};
  Graph* graph = nullptr;  // of the last recording: its capture, stream, place there and mark
  void* stream = nullptr;
  size_t place = 0, mark = 0;
};

class Stream {
 public:
  explicit Stream(bool slow = false) : copies(slow) { std::thread([this] { work(); }).detach(); }
  Graph* graph = nullptr;  // of the capture in which this is
  const bool copies;
  void add(std::function<void()> entry) {
    if (graph != nullptr) {
      graph->entries[this].push_back([entry = std::move(entry)](Reached&) { entry(); });
      return;
    }
    const std::lock_guard lock(mutex_);
    entries_.push_back(std::move(entry));
    ++added_;
    wake_.notify_all();
  }
  bool idle() const { return done_ == added_; }

 private:
  void work() {
    std::mt19937 random(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(this) >> 4));
    for (;;) {
      std::function<void()> entry;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !entries_.empty(); });
        entry = std::move(entries_.front());
        entries_.pop_front();
      }
      be_late(random, copies ? slowness.load() : 1);
      entry();
      ++done_;
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> entries_;
  std::atomic<uint64_t> added_{0}, done_{0};
};

Stream& stream_of(void* handle) {
  static auto& standard = *new Stream;   // like all streams: never destroyed
  return handle == nullptr ? standard : *static_cast<Stream*>(handle);
}

void pause() { std::this_thread::sleep_for(std::chrono::microseconds(5)); }

uint32_t load(uint64_t address) { return __atomic_load_n(reinterpret_cast<uint32_t*>(address), __ATOMIC_ACQUIRE); }
void store(uint64_t address, uint32_t value) {
  __atomic_store_n(reinterpret_cast<uint32_t*>(address), value, __ATOMIC_RELEASE);
}

// A thread is a GPU until it takes another's context.
thread_local char own_context;
thread_local void* context = &own_context;

int get_error_name(int, const char** name) {
  *name = "CUDA_ERROR_OF_THE_TEST";
  return 0;
}
int device_get_attribute(int* value, int, int) {
  *value = 0;
  return 0;
}
int context_get_current(void** current) {
  *current = context;
  return 0;
}
int context_set_current(void* current) {
  context = current;
  return 0;
}
int context_get_device(int* device) {
  *device = 0;
  return 0;
}
int context_get_priorities(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
int stream_create(void** stream, unsigned, int) {
  *stream = new Stream(true);
  return 0;
}
int stream_destroy(void*) { return 0; }  // its queue is still worked off
int stream_get_capture_info(void* stream, int* status, uint64_t* capture, void**, void**, size_t*) {
  const Graph* graph = stream_of(stream).graph;
  *status = graph != nullptr ? 1 : 0;
  *capture = graph != nullptr ? graph->number : 0;
  return 0;
}
int stream_wait_event(void* stream, void* handle, unsigned) {
  auto* event = static_cast<Event*>(handle);
  Stream& waiting = stream_of(stream);
  if (event->graph != nullptr && waiting.graph == nullptr) waiting.graph = event->graph;  // joins the capture
  if (event->graph != waiting.graph) return kOtherCapture;
  if (waiting.graph != nullptr) {
    waiting.graph->entries[stream].push_back([mark = event->mark](Reached& reached) {
      while (!reached[mark]) pause();
    });
    waiting.graph->joined[event->stream] = event->place;
    return 0;
  }
  const uint64_t wanted = event->recorded;
  stream_of(stream).add([event, wanted] {
    while (event->reached < wanted) pause();
  });
  return 0;
}
int stream_wait_value(void* stream, uint64_t address, uint32_t value, unsigned flags) {
  if (flags != 0) return kInvalidValue;
  stream_of(stream).add([address, value] {
    while (static_cast<int32_t>(load(address) - value) < 0) pause();
  });
  return 0;
}
int stream_write_value(void* stream, uint64_t address, uint32_t value, unsigned) {
  stream_of(stream).add([address, value] { store(address, value); });
  return 0;
}
struct WordOperation {  // CUstreamBatchMemOpParams
  uint32_t kind;
  uint64_t address, value;
  uint32_t flags;
  uint64_t others[2];
};
int stream_batch(void* stream, unsigned count, WordOperation* operations, unsigned) {
  if (count > 255) return kInvalidValue;
  for (unsigned at = 0; at < count; ++at) {
    const WordOperation& one = operations[at];
    if (one.kind != 1 && one.kind != 2) return kInvalidValue;
    const auto call = one.kind == 1 ? stream_wait_value : stream_write_value;
    if (const int result = call(stream, one.address, static_cast<uint32_t>(one.value), one.flags)) return result;
  }
  return 0;
}
int event_create(void** event, unsigned) {
  *event = new Event;
  return 0;
}
int event_record(void* handle, void* stream) {
  auto* event = static_cast<Event*>(handle);
  event->graph = stream_of(stream).graph;
  if (event->graph != nullptr) {
    event->stream = stream;
    event->mark = event->graph->marks++;
    auto& entries = event->graph->entries[stream];
    entries.push_back([mark = event->mark](Reached& reached) { reached[mark] = true; });
    event->place = entries.size();
    return 0;
  }
  const uint64_t number = ++event->recorded;
  stream_of(stream).add([event, number] { event->reached = number; });
  return 0;
}
int event_destroy(void*) { return 0; }   // queues may still hold it
// Word by word and atomically, as a device would let a flag beside it be read.
void copy_words(uint64_t to, uint64_t from, size_t bytes) {
  if ((to | from | bytes) % sizeof(uint32_t) != 0) {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return;
  }
  for (size_t at = 0; at < bytes; at += sizeof(uint32_t)) store(to + at, load(from + at));
}
int copy_on_device(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  stream_of(stream).add([=] { copy_words(to, from, bytes); });
  return 0;
}
int fill_words(uint64_t to, unsigned value, size_t words, void* stream) {
  stream_of(stream).add([=] {
    for (size_t word = 0; word < words; ++word) store(to + word * sizeof(uint32_t), value);
  });
  return 0;
}
// Kernels, in miniature: a launch runs one of these functions with a copy of its parameters.
struct FakeKernel {
  std::vector<size_t> sizes;  // of the parameters, in bytes
  std::function<void(const std::vector<uint64_t>&)> run;
};

// What a fused product does to memory: copies its source to where chunks leave from and signals each, or stores each
// of its deliveries (peer, column, bytes into the source, into the peer's landing buffer, in all) by its directory, waits for
// one chunk (or `subchunks`) of every peer that is not in the bits of `silent`, and copies what has landed.
void relay(const std::vector<uint64_t>& parameters) {
  enum { kLanding, kSource = 5, kLeaving, kSeen, kSignals, kFlags, kStop, kEpoch, kRank, kWorld, kSubchunks, kSends,
         kLeavingBytes, kLandingBytes, kColumns, kSilent };
  const auto& p = parameters;
  const auto number = [&](size_t index) { return static_cast<uint32_t>(p[index]); };
  copy_words(p[kLeaving], p[kSource], number(kLeavingBytes));
  for (uint32_t send = 0; send < number(kSends); ++send) store(p[kSignals] + 4 * send, number(kEpoch));
  for (uint32_t peer = 0; peer < number(kWorld); ++peer) {
    if ((number(kSilent) >> peer & 1) != 0) continue;
    for (uint32_t sub = 0; sub < number(kSubchunks); ++sub) {
      const uint64_t flag = p[kFlags] + 4 * (uint64_t{peer} * number(kColumns) + sub);
      while (peer != number(kRank) && static_cast<int32_t>(load(flag) - number(kEpoch)) < 0 && load(p[kStop]) == 0) pause();
    }
  }
  thread_local std::mt19937 random(number(kRank));
  if (random() % 4 == 0) be_late(random, slowness);
  copy_words(p[kSeen], p[kLanding], number(kLandingBytes));
}

// Pushes, each send when it is signalled if the numbers say that it waits.
void carry(const std::vector<uint64_t>& p) {
  enum { kSource, kSignals, kStop, kDirectory, kDeliveries, kEpoch, kWorld, kSends, kWaits };
  const auto* const pages = reinterpret_cast<const uint64_t*>(p[kDirectory]);
  const auto* delivery = reinterpret_cast<const uint64_t*>(p[kDeliveries]);
  const auto epoch = static_cast<uint32_t>(p[kEpoch]);
  const uint64_t world = static_cast<uint32_t>(p[kWorld]);
  for (uint32_t send = 0; send < static_cast<uint32_t>(p[kSends]); ++send, delivery += 5) {
    const auto signalled = [&] { return static_cast<int32_t>(load(p[kSignals] + 4 * send) - epoch) >= 0; };
    while (static_cast<uint32_t>(p[kWaits]) != 0 && !signalled() && load(p[kStop]) == 0) pause();
    copy_words(pages[delivery[0]] + delivery[3], p[kSource] + delivery[2], delivery[4]);
    for (const uint64_t table : {world, 2 * world}) store(pages[table + delivery[0]] + 4 * delivery[1], epoch);
  }
}

// Writes down its other parameters where the first one points to.
void note(const std::vector<uint64_t>& p) {
  for (size_t index = 1; index + 2 < p.size(); ++index) reinterpret_cast<uint64_t*>(p[0])[index - 1] = p[index];
}

int module_load(void** module, const void*) {
  *module = reinterpret_cast<void*>(1);
  return 0;
}
int module_get_function(void** function, void*, const char* name) {
  static auto& relaying = *new FakeKernel{{128, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8, 8}, relay};
  static auto& carrying = *new FakeKernel{{8, 8, 8, 8, 8, 4, 4, 4, 4, 8, 8}, carry};
  static auto& noting = *new FakeKernel{{8, 8, 4, 4, 8, 8, 8}, note};
  const std::map<std::string, FakeKernel*> kernels = {{"relay", &relaying}, {"carry", &carrying}, {"note", &noting}};
  const auto found = kernels.find(name);
  *function = found == kernels.end() ? nullptr : found->second;
  return found == kernels.end() ? kNotFound : 0;
}
int function_set_attribute(void*, int, int) { return 0; }
int function_get_parameter(void* function, size_t index, size_t* offset, size_t* size) {
  const auto& sizes = static_cast<FakeKernel*>(function)->sizes;
  if (index >= sizes.size()) return kInvalidValue;
  *offset = 0;
  *size = sizes[index];
  return 0;
}
int blocks_per_multiprocessor(int* blocks, void*, int, size_t) {
  *blocks = 1;
  return 0;
}
int tensor_map_encode(void* map, int, uint32_t, void* address, const uint64_t*, const uint64_t*, const uint32_t*,
                      const uint32_t*, int, int, int, int) {
  std::memcpy(map, &address, sizeof(address));
  return 0;
}
int tensor_map_replace_address(void* map, void* address) {
  std::memcpy(map, &address, sizeof(address));
  return 0;
}
int launch(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream,
           void** parameters, void**) {
  const auto* kernel = static_cast<FakeKernel*>(function);
  std::vector<uint64_t> values;
  for (size_t index = 0; index < kernel->sizes.size(); ++index) {
    uint64_t value = 0;
    std::memcpy(&value, parameters[index], kernel->sizes[index] == 4 ? 4 : 8);
    values.push_back(value);
  }
  stream_of(stream).add([kernel, values] { kernel->run(values); });
  return 0;
}

int host_register(void*, size_t, unsigned) { return 0; }
int host_unregister(void*) { return 0; }
int host_get_device_pointer(uint64_t* address, void* memory, unsigned) {
  *address = reinterpret_cast<uint64_t>(memory);
  return 0;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* name, void** address, int, uint64_t,
                                                               int* found) {
  static const std::map<std::string, void*> functions = {
      {"cuGetErrorName", reinterpret_cast<void*>(&get_error_name)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(&device_get_attribute)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&context_get_current)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&context_set_current)},
      {"cuCtxGetDevice", reinterpret_cast<void*>(&context_get_device)},
      {"cuCtxGetStreamPriorityRange", reinterpret_cast<void*>(&context_get_priorities)},
      {"cuStreamCreateWithPriority", reinterpret_cast<void*>(&stream_create)},
      {"cuStreamDestroy", reinterpret_cast<void*>(&stream_destroy)},
      {"cuStreamGetCaptureInfo", reinterpret_cast<void*>(&stream_get_capture_info)},
      {"cuStreamBatchMemOp", reinterpret_cast<void*>(&stream_batch)},
      {"cuStreamWaitEvent", reinterpret_cast<void*>(&stream_wait_event)},
      {"cuStreamWaitValue32", reinterpret_cast<void*>(&stream_wait_value)},
      {"cuStreamWriteValue32", reinterpret_cast<void*>(&stream_write_value)},
      {"cuEventCreate", reinterpret_cast<void*>(&event_create)},
      {"cuEventRecord", reinterpret_cast<void*>(&event_record)},
      {"cuEventDestroy", reinterpret_cast<void*>(&event_destroy)},
      {"cuMemcpyDtoDAsync", reinterpret_cast<void*>(&copy_on_device)},
      {"cuMemsetD32Async", reinterpret_cast<void*>(&fill_words)},
      {"cuModuleLoadData", reinterpret_cast<void*>(&module_load)},
      {"cuModuleGetFunction", reinterpret_cast<void*>(&module_get_function)},
      {"cuFuncSetAttribute", reinterpret_cast<void*>(&function_set_attribute)},
      {"cuFuncGetParamInfo", reinterpret_cast<void*>(&function_get_parameter)},
      {"cuOccupancyMaxActiveBlocksPerMultiprocessor", reinterpret_cast<void*>(&blocks_per_multiprocessor)},
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&tensor_map_encode)},
      {"cuTensorMapReplaceAddress", reinterpret_cast<void*>(&tensor_map_replace_address)},
      {"cuLaunchKernel", reinterpret_cast<void*>(&launch)},
      {"cuMemHostRegister", reinterpret_cast<void*>(&host_register)},
      {"cuMemHostUnregister", reinterpret_cast<void*>(&host_unregister)},
      {"cuMemHostGetDevicePointer", reinterpret_cast<void*>(&host_get_device_pointer)},
  };
  const auto function = functions.find(name);
  const bool known = function != functions.end();
  *address = known ? function->second : nullptr;
  *found = known ? 0 : 1;
  return known ? 0 : kNotFound;
}

// What a program does on a device, for tests.
__attribute__((visibility("default"))) void* fake_function(const char* name) {
  void* function = nullptr;
  module_get_function(&function, nullptr, name);
  return function;
}
__attribute__((visibility("default"))) void* fake_stream() { return new Stream; }
__attribute__((visibility("default"))) void fake_copy(void* stream, uint64_t to, uint64_t from, uint64_t bytes) {
  copy_on_device(to, from, bytes, stream);
}
__attribute__((visibility("default"))) void fake_write(void* stream, uint64_t address, uint32_t value) {
  stream_write_value(stream, address, value, 0);
}
__attribute__((visibility("default"))) void fake_await(void* stream, uint64_t address, uint32_t value) {
  stream_wait_value(stream, address, value, 0);
}
__attribute__((visibility("default"))) void fake_sleep(void* stream, uint32_t microseconds) {
  stream_of(stream).add([=] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); });
}
__attribute__((visibility("default"))) void fake_follow(void* stream, void* earlier) {
  void* event = nullptr;
  event_create(&event, 0);
  event_record(event, earlier);
  stream_wait_event(stream, event, 0);
}
__attribute__((visibility("default"))) void fake_synchronize(void* stream) {
  while (!stream_of(stream).idle()) pause();
}
__attribute__((visibility("default"))) void fake_begin_capture(void* stream) {
  static std::atomic<uint64_t> captures{0};
  stream_of(stream).graph = new Graph{++captures, {}, {}, {}, 0};
}
// The graph, or nothing if a stream has more to do than others wait for.
__attribute__((visibility("default"))) void* fake_end_capture(void* stream) {
  Graph* graph = stream_of(stream).graph;
  bool whole = true;
  for (const auto& [one, entries] : graph->entries) {
    stream_of(one).graph = nullptr;
    if (one == stream) continue;
    graph->streams[one] = new Stream(stream_of(one).copies);
    whole = whole && graph->joined[one] == entries.size();
  }
  stream_of(stream).graph = nullptr;
  graph->streams[stream] = nullptr;  // where it is replayed
  return whole ? graph : nullptr;
}
__attribute__((visibility("default"))) void fake_replay(void* handle, void* stream) {
  const auto* graph = static_cast<const Graph*>(handle);
  const auto reached = std::make_shared<Reached>(graph->marks);
  for (const auto& [one, entries] : graph->entries) {
    void* runs = graph->streams.at(one);
    for (const auto& entry : entries) {
      stream_of(runs != nullptr ? runs : stream).add([&entry, reached] { entry(*reached); });
    }
  }
}
__attribute__((visibility("default"))) void fake_delay(uint32_t microseconds, uint32_t times) {
  longest_delay = microseconds;
  slowness = times;
}
}
