#include "segment.hpp"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

namespace flashtrain {
namespace {

std::runtime_error system_failure(const std::string& what) {
  return std::runtime_error(what + ": " + std::strerror(errno));
}

constexpr size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

constexpr size_t kPage = 4096;

size_t rings_offset(uint32_t world) { return round_up(sizeof(SegmentHeader) + world * sizeof(RingControl), kPage); }

}  // namespace

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(header_, other.header_);
  std::swap(bytes_, other.bytes_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

Segment Segment::create(uint32_t rank, uint32_t world, uint64_t ring_bytes) {
  Segment segment;
  segment.descriptor_ = memfd_create("flashtrain", MFD_CLOEXEC);
  if (segment.descriptor_ < 0) throw system_failure("cannot create shared memory");
  const size_t rounded = round_up(ring_bytes, kPage);
  // The own ring is never used: its pages are never touched and cost no memory.
  const size_t bytes = rings_offset(world) + world * rounded;
  if (ftruncate(segment.descriptor_, static_cast<off_t>(bytes)) != 0) {
    throw system_failure("cannot size " + std::to_string(bytes) + " bytes of shared memory");
  }
  segment.map(bytes);
  // Fresh pages read as zeros, which is the initial state of every bell and ring.
  SegmentHeader* header = new (segment.header_) SegmentHeader{};
  for (uint32_t source = 0; source < world; ++source) new (segment.control(source)) RingControl{};
  if (getrandom(&header->token, sizeof header->token, 0) != sizeof header->token) {
    throw system_failure("cannot draw a random number");
  }
  header->pid = getpid();
  header->start_time = process_start_time(header->pid);
  header->ring_bytes = rounded;
  header->rank = rank;
  header->world = world;
  header->layout = kLayout;
  return segment;
}

Segment Segment::open(const Address& address, uint32_t rank, uint32_t world) {
  const std::string path = "/proc/" + std::to_string(address.pid) + "/fd/" + std::to_string(address.descriptor);
  Segment segment;
  segment.descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (segment.descriptor_ < 0) throw system_failure("cannot open " + path);
  struct stat status {};
  if (fstat(segment.descriptor_, &status) != 0) throw system_failure("cannot examine " + path);
  const auto bytes = static_cast<size_t>(status.st_size);
  if (!S_ISREG(status.st_mode) || bytes < rings_offset(world)) throw std::runtime_error(path + " is another file");
  segment.map(bytes);
  const SegmentHeader& header = *segment.header_;
  if (header.token != address.token || header.rank != rank || header.world != world ||
      header.layout != kLayout || bytes != rings_offset(world) + world * header.ring_bytes) {
    throw std::runtime_error(path + " is not the segment that was announced");
  }
  segment.close_descriptor();
  return segment;
}

Address Segment::address() const { return {header_->pid, descriptor_, header_->start_time, header_->token}; }

RingControl* Segment::control(uint32_t source) const {
  return reinterpret_cast<RingControl*>(reinterpret_cast<std::byte*>(header_) + sizeof(SegmentHeader)) + source;
}

std::byte* Segment::ring(uint32_t source) const {
  return reinterpret_cast<std::byte*>(header_) + rings_offset(header_->world) + source * header_->ring_bytes;
}

void Segment::map(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
  if (start == MAP_FAILED) throw system_failure("cannot map " + std::to_string(bytes) + " bytes of shared memory");
  // A forked child (a data loader) must not keep the rings alive, nor write into them.
  madvise(start, bytes, MADV_DONTFORK);
  header_ = static_cast<SegmentHeader*>(start);
  bytes_ = bytes;
}

void Segment::close_descriptor() {
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
}

void Segment::unmap() {
  close_descriptor();
  if (header_ != nullptr) munmap(std::exchange(header_, nullptr), bytes_);
}

uint64_t process_start_time(int pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/stat";
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0 && errno == ENOENT) return 0;
  if (descriptor < 0) throw system_failure("cannot open " + path);
  char text[1024];
  const ssize_t length = ::read(descriptor, text, sizeof text - 1);
  ::close(descriptor);
  if (length <= 0) return 0;
  text[length] = '\0';
  // The second field, the name in brackets, may itself hold spaces and brackets: fields count from its end.
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] == '\0' || field[2] == 'Z' || field[2] == 'X') return 0;
  for (int number = 2; number < 22 && field != nullptr; ++number) field = std::strchr(field + 1, ' ');
  return field == nullptr ? 0 : std::strtoull(field, nullptr, 10);
}

}  // namespace flashtrain
