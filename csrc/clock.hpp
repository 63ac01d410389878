// Clocks. Times are nanoseconds of CLOCK_MONOTONIC, which Python's time.perf_counter reads too.
#pragma once

#include <ctime>

#include <cstdint>

namespace flashtrain {

inline int64_t read_clock(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

inline int64_t now() { return read_clock(CLOCK_MONOTONIC); }

constexpr double seconds(int64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

}  // namespace flashtrain
