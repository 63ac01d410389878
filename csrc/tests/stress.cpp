// Stress for the sanitizers: rings and whole transports between the threads of one process.
//
// usage: stress SEED. Prints one line for each part; exits with 1 at the first wrong byte.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../host_transport.hpp"

using namespace flashtrain;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress: %s\n", what);
  std::exit(1);
}

std::byte expected_byte(uint64_t message, uint64_t index) { return std::byte(message * 131 + index * 7 + index / 251); }

void fill(std::vector<std::byte>& bytes, uint64_t message) {
  for (uint64_t index = 0; index < bytes.size(); ++index) bytes[index] = expected_byte(message, index);
}

bool holds(const std::vector<std::byte>& bytes, uint64_t message) {
  for (uint64_t index = 0; index < bytes.size(); ++index) {
    if (bytes[index] != expected_byte(message, index)) return false;
  }
  return true;
}

// Producer and consumer on one mapping, where a thread sanitizer sees both sides of every byte.
void stress_ring(uint64_t seed) {
  constexpr uint64_t kCapacity = 4096, kRecords = 20000;
  RingControl control{};
  std::vector<std::byte> data(kCapacity);
  std::thread consumer([&] {
    Consumer ring(&control, data.data(), kCapacity);
    std::vector<std::byte> into;
    for (uint64_t record = 0; record < kRecords; ++record) {
      Header header;
      while (!ring.peek(header, true)) std::this_thread::yield();
      require(ring.sound(header) && header.epoch == record, "a header came through damaged");
      into.assign(header.piece, std::byte{0});
      ring.read(header, into.data());
      require(holds(into, record), "a payload came through damaged");
      ring.pop(header);
    }
  });
  Producer ring(&control, data.data(), kCapacity);
  std::mt19937_64 random(seed);
  for (uint64_t record = 0; record < kRecords; ++record) {
    std::vector<std::byte> payload(random() % 900);
    fill(payload, record);
    Header header{};
    header.epoch = record;
    header.bytes = payload.size();
    header.piece = static_cast<uint32_t>(payload.size());
    while (!ring.reserve(record_bytes(header.piece), record_bytes(header.piece))) std::this_thread::yield();
    ring.publish(header, payload.data());
  }
  consumer.join();
  std::printf("ring: %lu records\n", static_cast<unsigned long>(kRecords));
}

std::vector<std::unique_ptr<HostTransport>> connect(uint32_t world, uint64_t ring_bytes) {
  std::vector<std::unique_ptr<HostTransport>> ranks;
  for (uint32_t rank = 0; rank < world; ++rank) {
    ranks.push_back(std::make_unique<HostTransport>(rank, world, ring_bytes));
  }
  for (uint32_t rank = 0; rank < world; ++rank) {
    for (uint32_t peer = 0; peer < world; ++peer) {
      if (peer != rank) ranks[rank]->connect(peer, ranks[peer]->address());
    }
  }
  for (auto& rank : ranks) rank->start();
  return ranks;
}

struct Posted {
  RequestPointer request;
  std::vector<std::byte> bytes;
  uint64_t message;
};

// Every rank sends every peer one message in each operation, waits with two threads, and now and then
// gives an operation up; the peers then still get what it had sent, or are told.
void stress_transport(uint64_t seed, uint32_t world, uint64_t ring_bytes, uint64_t operations) {
  auto ranks = connect(world, ring_bytes);
  auto size_of = [&](uint64_t operation, uint32_t from, uint32_t to) -> uint64_t {
    std::mt19937_64 random(seed * 7919 + operation * 64 + from * 8 + to);
    const uint64_t kind = random() % 8;
    return kind == 0 ? 0 : random() % (kind == 7 ? 6 * ring_bytes : kind > 4 ? 5000 : 200);
  };
  auto run = [&](uint32_t rank) {
    HostTransport& transport = *ranks[rank];
    std::mt19937_64 random(seed + rank);
    for (uint64_t number = 0; number < operations; ++number) {
      const auto operation = transport.open("stress");
      std::vector<Posted> received, sent;
      for (uint32_t turn = 1; turn < world; ++turn) {
        const uint32_t to = (rank + turn) % world, from = (rank + world - turn) % world;
        Posted in{nullptr, std::vector<std::byte>(size_of(number, from, rank)), number * 64 + from * 8 + rank};
        in.request = transport.receive(operation, turn, from, from, from,
                                       reinterpret_cast<uintptr_t>(in.bytes.data()), in.bytes.size());
        received.push_back(std::move(in));
        Posted out{nullptr, std::vector<std::byte>(size_of(number, rank, to)), number * 64 + rank * 8 + to};
        fill(out.bytes, out.message);
        out.request = transport.send(operation, turn, to, rank, rank,
                                     reinterpret_cast<uintptr_t>(out.bytes.data()), out.bytes.size());
        sent.push_back(std::move(out));
      }
      if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
      auto finish = [&](std::vector<Posted>& messages) {
        for (Posted& posted : messages) transport.wait(posted.request, 60, [] {});
      };
      std::thread other([&] { finish(sent); });
      finish(received);
      other.join();
      for (const Posted& posted : received) require(holds(posted.bytes, posted.message), "a message was damaged");
    }
    // The last operation is given up with everything under way, and its memory freed at once.
    const auto operation = transport.open("given up");
    std::vector<std::vector<std::byte>> memory;
    for (uint32_t peer = 0; peer < world; ++peer) {
      if (peer == rank) continue;
      for (const bool sends : {true, false}) {
        memory.emplace_back(8 * ring_bytes);
        const auto data = reinterpret_cast<uintptr_t>(memory.back().data());
        if (sends) transport.send(operation, 0, peer, 0, 0, data, 8 * ring_bytes);
        else transport.receive(operation, 0, peer, 0, 0, data, 8 * ring_bytes);
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    transport.abort(*operation);
    memory.clear();
  };
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < world; ++rank) threads.emplace_back(run, rank);
  for (auto& thread : threads) thread.join();
  std::printf("transport: %u ranks, rings of %lu bytes, %lu operations\n", world,
              static_cast<unsigned long>(ring_bytes), static_cast<unsigned long>(operations));
}

// Couriers that stop while a peer rings: a worker that sleeps through the news would never be joined.
void stress_stop(uint64_t rounds) {
  Segment own = Segment::create(0, 2, 4096), peer = Segment::create(1, 2, 4096);
  std::atomic<bool> rings{false}, done{false};
  std::thread ringing([&] {
    while (!done) {
      if (rings) own->receive_bell.ring_all();
    }
  });
  std::byte landing{};
  for (uint64_t round = 0; round < rounds; ++round) {
    Courier courier(own->receive_bell, "stop", "no data");
    courier.add(std::make_unique<Inbox>(1, own->receive_bell, own, peer->send_bell));
    const auto request = std::make_shared<Request>(std::make_shared<const Operation>(round, "stop"), 0, 0, 0,
                                                   reinterpret_cast<uintptr_t>(&landing), 1);
    request->link = courier.link(1);
    rings = true;
    courier.post(request);
    std::this_thread::sleep_for(std::chrono::microseconds(round % 50));
    rings = false;
    courier.stop();
  }
  done = true;
  ringing.join();
  std::printf("stop: %lu rounds\n", static_cast<unsigned long>(rounds));
}

void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// A link on which messages arrive when the test says so, and whose looks the test can hold up.
class SlowLink : public Link {
 public:
  SlowLink(Bell& bell, Bell& peer_bell) : Link(1, bell, peer_bell) {}
  std::atomic<bool> arrived{false}, hold_last_look{false}, hold_step{false}, held{false};

 protected:
  bool step(uint64_t, uint32_t callers) override {
    const RequestPointer request = first();
    if (!arrived || !request) return false;
    hold_up(hold_step);
    finish(request, callers);
    return true;
  }
  bool can_move() override {
    const bool can = arrived && first();
    hold_up(hold_last_look);
    return can;
  }

 private:
  void hold_up(const std::atomic<bool>& wish) {
    if (wish) held = true;
    while (wish) pause();
  }
};

struct SlowCourier {
  Segment own = Segment::create(0, 2, 4096), peer = Segment::create(1, 2, 4096);
  Bell& bell = own->receive_bell;
  Courier courier{bell, "slow", "no data"};
  SlowLink* link;
  std::byte landing{};

  SlowCourier() {
    auto made = std::make_unique<SlowLink>(bell, peer->send_bell);
    link = made.get();
    courier.add(std::move(made));
  }
  RequestPointer post(uint64_t epoch) {
    const auto request = std::make_shared<Request>(std::make_shared<const Operation>(epoch, "slow"), 0, 0, 0,
                                                   reinterpret_cast<uintptr_t>(&landing), 1);
    request->link = link;
    courier.post(request);
    return request;
  }
  void until_the_worker_sleeps() const {
    while (bell.worker_asleep.load() == 0) pause();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
};

// Something arrives while a thread looks at the link for the last time: the worker, woken, finds that thread at work.
void stress_last_look() {
  SlowCourier slow;
  const RequestPointer first = slow.post(0);
  slow.until_the_worker_sleeps();
  slow.link->hold_last_look = true;
  RequestPointer second;
  std::thread posting([&] { second = slow.post(1); });
  while (!slow.link->held) pause();
  slow.link->arrived = true;
  slow.bell.ring();
  slow.until_the_worker_sleeps();
  slow.link->hold_last_look = false;
  posting.join();
  for (int look = 0; look < 1000 && second->pending(); ++look) pause();
  require(!first->pending() && !second->pending(), "what arrived during a last look was left lying");
  std::printf("last look: moved\n");
}

// A peer writes a message and ends while another thread is still taking it in.
void stress_last_words() {
  SlowCourier slow;
  const RequestPointer request = slow.post(0);
  slow.until_the_worker_sleeps();
  slow.link->hold_step = slow.link->arrived = true;
  slow.bell.ring();
  while (!slow.link->held) pause();
  std::thread going_on([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(250));
    slow.link->hold_step = false;
  });
  const std::string problem = slow.courier.wait(request, 60'000'000'000, [] { return "the peer has died"; });
  going_on.join();
  require(problem.empty(), "a message of a peer that has ended was there, and not taken");
  std::printf("last words: taken\n");
}

// An operation is given up in one thread while another shuts the transport down: its memory is then the caller's.
void stress_abort_at_the_end(uint64_t rounds) {
  for (uint64_t round = 0; round < rounds; ++round) {
    std::vector<std::byte> incoming(8 << 20), outgoing(8 << 20);
    auto ranks = connect(2, 1 << 20);
    const auto theirs = ranks[1]->open("end");
    ranks[1]->send(theirs, 0, 0, 1, 1, reinterpret_cast<uintptr_t>(outgoing.data()), outgoing.size());
    std::mutex lock;  // as the interpreter's
    std::atomic<bool> posted{false};
    std::thread operation([&] {
      std::unique_lock locked(lock);
      const auto own = ranks[0]->open("end");
      ranks[0]->receive(own, 0, 1, 1, 1, reinterpret_cast<uintptr_t>(incoming.data()), incoming.size());
      const auto sent = ranks[0]->send(own, 0, 1, 0, 0, reinterpret_cast<uintptr_t>(outgoing.data()), outgoing.size());
      posted = true;
      locked.unlock();
      try {
        ranks[0]->wait(sent, 60, [] {});  // nobody receives it
        require(false, "a message arrived nowhere");
      } catch (const std::runtime_error&) {
      }
      locked.lock();
      ranks[0]->abort(*own);
      incoming.assign(incoming.size(), std::byte{1});
    });
    while (!posted) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    {
      const std::lock_guard locked(lock);
      ranks[0]->close();
    }
    ranks[0]->join();
    operation.join();
  }
  std::printf("abort at the end: %lu rounds\n", static_cast<unsigned long>(rounds));
}

}  // namespace

int main(int count, char** values) {
  const uint64_t seed = count > 1 ? std::strtoull(values[1], nullptr, 10) : 1;
  stress_ring(seed);
  stress_transport(seed, 2, 4096, 300);
  stress_transport(seed, 3, 65536, 150);
  stress_transport(seed, 4, 8192, 100);
  stress_stop(2000);
  stress_last_look();
  stress_last_words();
  stress_abort_at_the_end(5);
  return 0;
}
