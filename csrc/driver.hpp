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
using DriverResult = int;

constexpr DriverResult kDriverSuccess = 0;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventWithoutTiming = 2;
constexpr unsigned kWaitUntilReached = 0;               // CU_STREAM_WAIT_VALUE_GEQ: signed difference >= 0
constexpr unsigned kWaitThenFlush = 1u << 30;           // CU_STREAM_WAIT_VALUE_FLUSH
constexpr unsigned kWriteAfterEarlierWrites = 0;        // CU_STREAM_WRITE_VALUE_DEFAULT: with a memory barrier
constexpr unsigned kRegisterForAllDevices = 1 | 2;      // CU_MEMHOSTREGISTER_PORTABLE, _DEVICEMAP
constexpr int kCanFlushRemoteWrites = 98;               // CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES

struct Driver {
  DriverResult (*get_error_name)(DriverResult, const char**);
  DriverResult (*device_get_attribute)(int*, int attribute, int device);
  DriverResult (*context_get_current)(ContextHandle*);
  DriverResult (*context_set_current)(ContextHandle);
  DriverResult (*context_get_device)(int*);
  DriverResult (*context_get_priorities)(int* least, int* greatest);
  DriverResult (*stream_create)(StreamHandle*, unsigned flags, int priority);
  DriverResult (*stream_destroy)(StreamHandle);
  DriverResult (*stream_is_capturing)(StreamHandle, int* status);
  DriverResult (*stream_wait_event)(StreamHandle, EventHandle, unsigned flags);
  DriverResult (*stream_wait_value)(StreamHandle, DeviceAddress, uint32_t value, unsigned flags);
  DriverResult (*stream_write_value)(StreamHandle, DeviceAddress, uint32_t value, unsigned flags);
  DriverResult (*event_create)(EventHandle*, unsigned flags);
  DriverResult (*event_record)(EventHandle, StreamHandle);
  DriverResult (*event_destroy)(EventHandle);
  DriverResult (*copy_on_device)(DeviceAddress to, DeviceAddress from, size_t bytes, StreamHandle);
  DriverResult (*fill_words)(DeviceAddress, unsigned value, size_t words, StreamHandle);
  DriverResult (*host_register)(void*, size_t bytes, unsigned flags);
  DriverResult (*host_unregister)(void*);
  DriverResult (*host_get_device_pointer)(DeviceAddress*, void*, unsigned flags);

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
