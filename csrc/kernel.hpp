// Compiled kernels, launched for the cost of a driver call.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.hpp"

namespace flashtrain {

constexpr size_t kScratchPointers = 2;  // end a parameter block; zero where a kernel needs no scratch memory

// One function of a cubin, loaded into the context of the calling thread and never unloaded.
class Kernel {
 public:
  // `shared_memory` in bytes and `threads` of each block. Throws std::runtime_error if the driver refuses.
  Kernel(const std::string& library, const std::string& cubin, const std::string& name, uint32_t shared_memory,
         uint32_t threads);

  // The same of a `function` that somebody else has loaded and keeps.
  Kernel(const std::string& library, FunctionHandle function, const std::string& name, uint32_t shared_memory,
         uint32_t threads);

  // Throws std::runtime_error unless the driver says that parameters of `sizes` bytes, and the pointers to scratch
  // memory with which Triton ends, are what the kernel takes.
  void check_layout(std::vector<size_t> sizes) const;

  // Makes the kernel's context current: a thread that has not used CUDA before has none.
  void enter() const { driver_.check(driver_.context_set_current(context_), "cuCtxSetCurrent"); }

  // Enqueue a launch whose parameters lie at `places`, in the kernel's context.
  void start(const std::array<uint32_t, 3>& grid, StreamHandle stream, void** places) const;

  // Blocks that one multiprocessor holds at a time.
  int blocks_per_multiprocessor() const;

 private:
  friend class Launch;
  const Driver& driver_;
  const std::string name_;
  const uint32_t shared_memory_, threads_;
  ContextHandle context_ = nullptr;
  FunctionHandle function_ = nullptr;
};

// What one parameter of a kernel is, as Triton lays it out.
struct Parameter {
  enum class Kind { kNumber, kPointer, kMatrix };

  std::string name;
  Kind kind = Kind::kNumber;
  bool aligned = false;  // a pointer that the kernel takes to be a multiple of 16 bytes
  // A matrix is read by TMA: a tensor map in the parameter block, then its shape and its pitch.
  uint64_t rows = 0, columns = 0, pitch = 0;  // pitch in elements
  uint32_t element_bytes = 0;
  int type = 0, swizzle = 0;                  // CUtensorMapDataType, CUtensorMapSwizzle
  std::array<uint32_t, 2> box{};              // columns, rows
};

// A kernel with its parameter block for fixed shapes. One launch writes a few addresses and calls the driver.
class Launch {
 public:
  // Throws std::runtime_error if the kernel's own layout of parameters is not the expected one.
  Launch(std::shared_ptr<const Kernel> kernel, std::vector<Parameter> parameters);
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  size_t size() const { return parameters_.size(); }

  // Enqueue `blocks` blocks. One value a parameter: an address, or a number, of which 32 bits count. Threads
  // may share a launch. Throws std::invalid_argument for an address that is not aligned as promised.
  void start(uint32_t blocks, StreamHandle stream, const std::vector<uint64_t>& values);

 private:
  struct alignas(128) TensorMap {
    std::array<unsigned char, 128> bytes;
  };
  void bind(size_t number, uint64_t address);

  const std::shared_ptr<const Kernel> kernel_;
  const std::vector<Parameter> parameters_;
  std::mutex mutex_;
  std::vector<size_t> matrices_;     // indices of parameters
  std::vector<TensorMap> maps_;      // one a matrix
  std::vector<uint64_t> bound_;      // the address in each map; 0 before the first
  std::vector<uint64_t> words_, constants_;
  std::vector<void*> places_;        // where the driver finds each part of the block
};

}  // namespace flashtrain
