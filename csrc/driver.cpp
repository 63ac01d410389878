#include "driver.hpp"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include <dlfcn.h>

namespace flashtrain {
namespace {

// The version of the interface that the declarations above follow; newer drivers still serve it.
constexpr int kInterface = 12040;

using GetProcAddress = DriverResult (*)(const char*, void**, int version, uint64_t flags, int* found);

class Symbols {
 public:
  explicit Symbols(const std::string& library) : library_(library) {
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error("there is no CUDA driver: " + std::string(dlerror()));
    get_ = reinterpret_cast<GetProcAddress>(dlsym(handle, "cuGetProcAddress_v2"));
    if (get_ == nullptr) throw std::runtime_error(library + " is older than CUDA 12.4; install a newer driver");
  }

  template <typename Function>
  void find(Function& function, const char* name, int interface = kInterface) const {
    void* address = nullptr;
    int found = 0;
    if (get_(name, &address, interface, 0, &found) != kDriverSuccess || address == nullptr) {
      throw std::runtime_error(library_ + " has no " + name + "; install a newer driver");
    }
    function = reinterpret_cast<Function>(address);
  }

 private:
  const std::string library_;
  GetProcAddress get_ = nullptr;
};

std::unique_ptr<Driver> resolve(const std::string& library) {
  const Symbols symbols(library);
  auto driver = std::make_unique<Driver>();
  symbols.find(driver->get_error_name, "cuGetErrorName");
  symbols.find(driver->device_get_attribute, "cuDeviceGetAttribute");
  symbols.find(driver->context_get_current, "cuCtxGetCurrent");
  symbols.find(driver->context_set_current, "cuCtxSetCurrent");
  symbols.find(driver->context_get_device, "cuCtxGetDevice");
  symbols.find(driver->context_get_priorities, "cuCtxGetStreamPriorityRange");
  symbols.find(driver->stream_create, "cuStreamCreateWithPriority");
  symbols.find(driver->stream_destroy, "cuStreamDestroy");
  // Later interfaces take one parameter more.
  symbols.find(driver->stream_get_capture_info, "cuStreamGetCaptureInfo", 11030);
  symbols.find(driver->stream_wait_event, "cuStreamWaitEvent");
  symbols.find(driver->stream_wait_value, "cuStreamWaitValue32");
  symbols.find(driver->stream_write_value, "cuStreamWriteValue32");
  symbols.find(driver->stream_batch, "cuStreamBatchMemOp");
  symbols.find(driver->event_create, "cuEventCreate");
  symbols.find(driver->event_record, "cuEventRecord");
  symbols.find(driver->event_destroy, "cuEventDestroy");
  symbols.find(driver->copy_on_device, "cuMemcpyDtoDAsync");
  symbols.find(driver->fill_words, "cuMemsetD32Async");
  symbols.find(driver->host_register, "cuMemHostRegister");
  symbols.find(driver->host_unregister, "cuMemHostUnregister");
  symbols.find(driver->host_get_device_pointer, "cuMemHostGetDevicePointer");
  symbols.find(driver->module_load, "cuModuleLoadData");
  symbols.find(driver->module_get_function, "cuModuleGetFunction");
  symbols.find(driver->function_set_attribute, "cuFuncSetAttribute");
  symbols.find(driver->function_get_parameter, "cuFuncGetParamInfo");
  symbols.find(driver->blocks_per_multiprocessor, "cuOccupancyMaxActiveBlocksPerMultiprocessor");
  symbols.find(driver->tensor_map_encode, "cuTensorMapEncodeTiled");
  symbols.find(driver->tensor_map_replace_address, "cuTensorMapReplaceAddress");
  symbols.find(driver->launch, "cuLaunchKernel");
  return driver;
}

}  // namespace

const Driver& Driver::load(const std::string& library) {
  static std::mutex mutex;
  // Never destroyed: threads may still call the driver while the process ends.
  static auto& loaded = *new std::map<std::string, std::unique_ptr<Driver>>;
  const std::lock_guard lock(mutex);
  auto& driver = loaded[library];
  if (!driver) driver = resolve(library);
  return *driver;
}

void Driver::fail(DriverResult result, const char* call) const {
  const char* name = nullptr;
  get_error_name(result, &name);
  throw std::runtime_error(std::string(call) + " failed: " + (name != nullptr ? name : "unknown error"));
}

}  // namespace flashtrain
