#include "kernel.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace flashtrain {
namespace {

constexpr uint32_t kSharedMemoryOfAnyKernel = 48 << 10;
constexpr uint64_t kAlignment = 16;
// A matrix is a tensor map, two extents and two strides.
constexpr std::array<size_t, 5> kMatrixParts = {128, 4, 4, 8, 8};

void* pointer(uint64_t address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

std::string listed(const std::vector<size_t>& values) {
  std::string text;
  for (const size_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return text;
}

}  // namespace

Kernel::Kernel(const std::string& library, const std::string& cubin, const std::string& name, uint32_t shared_memory,
               uint32_t threads)
    : driver_(Driver::load(library)), name_(name), shared_memory_(shared_memory), threads_(threads) {
  ModuleHandle module = nullptr;
  driver_.check(driver_.context_get_current(&context_), "cuCtxGetCurrent");
  driver_.check(driver_.module_load(&module, cubin.data()), "cuModuleLoadData");
  driver_.check(driver_.module_get_function(&function_, module, name.c_str()), "cuModuleGetFunction");
  if (shared_memory > kSharedMemoryOfAnyKernel) {
    driver_.check(
        driver_.function_set_attribute(function_, kMostDynamicSharedMemory, static_cast<int>(shared_memory)),
        "cuFuncSetAttribute");
  }
}

Kernel::Kernel(const std::string& library, FunctionHandle function, const std::string& name, uint32_t shared_memory,
               uint32_t threads)
    : driver_(Driver::load(library)), name_(name), shared_memory_(shared_memory), threads_(threads), function_(function) {
  driver_.check(driver_.context_get_current(&context_), "cuCtxGetCurrent");
}

void Kernel::check_layout(std::vector<size_t> sizes) const {
  sizes.insert(sizes.end(), kScratchPointers, 8);
  std::vector<size_t> found;
  size_t offset = 0, size = 0;
  while (driver_.function_get_parameter(function_, found.size(), &offset, &size) == kDriverSuccess) found.push_back(size);
  if (found != sizes) {
    throw std::runtime_error("kernel " + name_ + " has parameters of " + listed(found) + " bytes where " + listed(sizes) +
                             " were expected; use a version of triton that flashtrain was tested with");
  }
}

void Kernel::start(const std::array<uint32_t, 3>& grid, StreamHandle stream, void** places) const {
  driver_.check(driver_.launch(function_, grid[0], grid[1], grid[2], threads_, 1, 1, shared_memory_, stream, places, nullptr),
                "cuLaunchKernel");
}

int Kernel::blocks_per_multiprocessor() const {
  int blocks = 0;
  driver_.check(
      driver_.blocks_per_multiprocessor(&blocks, function_, static_cast<int>(threads_), shared_memory_),
      "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

Launch::Launch(std::shared_ptr<const Kernel> kernel, std::vector<Parameter> parameters)
    : kernel_(std::move(kernel)), parameters_(std::move(parameters)) {
  for (size_t index = 0; index < parameters_.size(); ++index) {
    if (parameters_[index].kind == Parameter::Kind::kMatrix) matrices_.push_back(index);
  }
  maps_.resize(matrices_.size());
  bound_.assign(matrices_.size(), 0);
  words_.assign(parameters_.size(), 0);
  constants_.assign(4 * matrices_.size() + kScratchPointers, 0);
  std::vector<size_t> sizes;
  uint64_t* constant = constants_.data();
  TensorMap* map = maps_.data();
  for (size_t index = 0; index < parameters_.size(); ++index) {
    const Parameter& parameter = parameters_[index];
    if (parameter.kind != Parameter::Kind::kMatrix) {
      places_.push_back(&words_[index]);
      sizes.push_back(parameter.kind == Parameter::Kind::kNumber ? 4 : 8);
      continue;
    }
    sizes.insert(sizes.end(), kMatrixParts.begin(), kMatrixParts.end());
    places_.push_back(map++);
    for (const uint64_t value : {parameter.rows, parameter.columns, parameter.pitch, uint64_t{1}}) {
      *constant = value;
      places_.push_back(constant++);
    }
  }
  for (size_t scratch = 0; scratch < kScratchPointers; ++scratch) places_.push_back(constant++);
  kernel_->check_layout(std::move(sizes));
}

void Launch::bind(size_t number, uint64_t address) {
  if (bound_[number] == address) return;
  const Driver& driver = kernel_->driver_;
  void* const map = &maps_[number];
  if (bound_[number] != 0) {
    driver.check(driver.tensor_map_replace_address(map, pointer(address)), "cuTensorMapReplaceAddress");
  } else {
    const Parameter& matrix = parameters_[matrices_[number]];
    const std::array<uint64_t, 2> dimensions = {matrix.columns, matrix.rows};
    const uint64_t pitch = matrix.pitch * matrix.element_bytes;
    const std::array<uint32_t, 2> ones = {1, 1};
    driver.check(driver.tensor_map_encode(map, matrix.type, 2, pointer(address), dimensions.data(), &pitch,
                                          matrix.box.data(), ones.data(), 0, matrix.swizzle, kPromoteTo128Bytes, 0),
                 "cuTensorMapEncodeTiled");
  }
  bound_[number] = address;
}

void Launch::start(uint32_t blocks, StreamHandle stream, const std::vector<uint64_t>& values) {
  if (values.size() != parameters_.size()) throw std::invalid_argument("a launch needs one value a parameter");
  for (size_t index = 0; index < values.size(); ++index) {
    const Parameter& parameter = parameters_[index];
    if ((parameter.aligned || parameter.kind == Parameter::Kind::kMatrix) && values[index] % kAlignment != 0) {
      throw std::invalid_argument(parameter.name + " starts at an address that is no multiple of 16 bytes; align it");
    }
  }
  const std::lock_guard lock(mutex_);
  kernel_->enter();
  for (size_t number = 0; number < matrices_.size(); ++number) bind(number, values[matrices_[number]]);
  // Numbers are the low half of their word: every CUDA host is little-endian.
  std::copy(values.begin(), values.end(), words_.begin());
  kernel_->start({blocks, 1, 1}, stream, places_.data());
}

}  // namespace flashtrain
