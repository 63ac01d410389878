// The CUDA driver, loaded at run time: building needs no toolkit, and importing needs no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flashtrain {

// The few types of cuda.h that are needed here. CUstream, CUevent and CUcontext are opaque pointers there;
// CUdeviceptr is 64 bits wide, and every function returns an enumeration, zero for success.
using DeviceAddress = unsigned long long;
using StreamHandle = void*;
using EventHandle = void*;
using ContextHandle = void*;
using ModuleHandle = void*;
using FunctionHandle = void*;
using DriverResult = int;

constexpr DriverResult kDriverSuccess = 0;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventWithoutTiming = 2;
constexpr unsigned kWaitUntilReached = 0;               // CU_STREAM_WAIT_VALUE_GEQ: signed difference >= 0
constexpr unsigned kWaitThenFlush = 1u << 30;           // CU_STREAM_WAIT_VALUE_FLUSH
constexpr unsigned kWriteAfterEarlierWrites = 0;        // CU_STREAM_WRITE_VALUE_DEFAULT: with a memory barrier
constexpr unsigned kRegisterForAllDevices = 1 | 2;      // CU_MEMHOSTREGISTER_PORTABLE, _DEVICEMAP
constexpr uint32_t kWaitForWord = 1, kWriteWord = 2;    // CU_STREAM_MEM_OP_WAIT_VALUE_32, _WRITE_VALUE_32
constexpr int kCanFlushRemoteWrites = 98;               // CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
constexpr int kMostDynamicSharedMemory = 8;             // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kPromoteTo128Bytes = 2;                   // CU_TENSOR_MAP_L2_PROMOTION_L2_128B

// CUstreamBatchMemOpParams: a word that a stream waits for, or writes.
struct WordOperation {
  uint32_t kind;
  DeviceAddress address;
  uint64_t value;
  uint32_t flags;
  DeviceAddress alias = 0;  // set by the driver
  uint64_t unused = 0;
};
static_assert(sizeof(WordOperation) == 48);

struct Driver {
  DriverResult (*get_error_name)(DriverResult, const char**);
  DriverResult (*device_get_attribute)(int*, int attribute, int device);
  DriverResult (*context_get_current)(ContextHandle*);
  DriverResult (*context_set_current)(ContextHandle);
  DriverResult (*context_get_device)(int*);
  DriverResult (*context_get_priorities)(int* least, int* greatest);
  DriverResult (*stream_create)(StreamHandle*, unsigned flags, int priority);
  DriverResult (*stream_destroy)(StreamHandle);
  DriverResult (*stream_get_capture_info)(StreamHandle, int* status, uint64_t* capture, void** graph, void** nodes,
                                          size_t* count);
  DriverResult (*stream_wait_event)(StreamHandle, EventHandle, unsigned flags);
  DriverResult (*stream_wait_value)(StreamHandle, DeviceAddress, uint32_t value, unsigned flags);
  DriverResult (*stream_write_value)(StreamHandle, DeviceAddress, uint32_t value, unsigned flags);
  DriverResult (*stream_batch)(StreamHandle, unsigned count, WordOperation*, unsigned flags);
  DriverResult (*event_create)(EventHandle*, unsigned flags);
  DriverResult (*event_record)(EventHandle, StreamHandle);
  DriverResult (*event_destroy)(EventHandle);
  DriverResult (*copy_on_device)(DeviceAddress to, DeviceAddress from, size_t bytes, StreamHandle);
  DriverResult (*fill_words)(DeviceAddress, unsigned value, size_t words, StreamHandle);
  DriverResult (*host_register)(void*, size_t bytes, unsigned flags);
  DriverResult (*host_unregister)(void*);
  DriverResult (*host_get_device_pointer)(DeviceAddress*, void*, unsigned flags);
  DriverResult (*module_load)(ModuleHandle*, const void* image);
  DriverResult (*module_get_function)(FunctionHandle*, ModuleHandle, const char* name);
  DriverResult (*function_set_attribute)(FunctionHandle, int attribute, int value);
  DriverResult (*function_get_parameter)(FunctionHandle, size_t index, size_t* offset, size_t* size);
  DriverResult (*blocks_per_multiprocessor)(int*, FunctionHandle, int threads, size_t shared_memory);
  DriverResult (*tensor_map_encode)(void* map, int type, uint32_t rank, void* address, const uint64_t* dimensions,
                                    const uint64_t* pitches, const uint32_t* box, const uint32_t* strides,
                                    int interleave, int swizzle, int promotion, int fill);
  DriverResult (*tensor_map_replace_address)(void* map, void* address);
  DriverResult (*launch)(FunctionHandle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_memory, StreamHandle,
                         void** parameters, void** extra);

  // The driver in the shared object `library`, loaded once and never unloaded. Throws std::runtime_error
  // that says what is missing.
  static const Driver& load(const std::string& library);

  // Throws std::runtime_error naming `call` unless the result is success.
  void check(DriverResult result, const char* call) const {
    if (result != kDriverSuccess) fail(result, call);
  }

 private:
  [[noreturn]] void fail(DriverResult result, const char* call) const;
};

}  // namespace flashtrain
