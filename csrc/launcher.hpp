// Launches of kernels that Triton has compiled, for the cost of a look at the arguments and a driver call.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernel.hpp"

namespace flashtrain {

// The compiled variants of one JIT function.
//
// Triton compiles in: constants and options; of a tensor its dtype, and whether it starts at a multiple of 16 bytes;
// of an integer whether it is 1, a multiple of 16, and how wide. Calls that agree in these, on one device, are one
// variant. What else a call may hold (descriptors, booleans, tuples, tensors of the host) is left to Triton.
class Launcher {
 public:
  // `compile(grid, *arguments, **constants)` is called where no variant fits; it launches by itself, and may `add`
  // what it has found. `device()` is the number of the current device, `stream(device)` the handle of its current
  // stream. Only objects whose type is one of `tensor_types` are taken for tensors.
  Launcher(const std::string& library, pybind11::object compile, pybind11::object device, pybind11::object stream,
           const pybind11::tuple& tensor_types);

  // Launch the variant of these arguments, grid first, or else `compile` one: as Python's vector call has it. The
  // result is what `compile` gave `add`.
  PyObject* call(PyObject* const* arguments, Py_ssize_t count, PyObject* names);

  // Keep `function`, which stands for calls such as this one, and whose parameters have `sizes` bytes; 0: the argument
  // is compiled in. Throws std::runtime_error if the driver says otherwise.
  void add(FunctionHandle function, const std::string& name, uint32_t shared_memory, uint32_t threads,
           const std::vector<size_t>& sizes, pybind11::object compiled, const pybind11::tuple& arguments,
           const pybind11::dict& constants);

 private:
  static constexpr size_t kMostArguments = 48;

  // What is compiled in of one argument: a small number, or a dtype's address with the last bit for alignment.
  using Form = uintptr_t;
  enum SmallForm : Form { kNone = 1, kOne, kInt32, kInt32By16, kInt64, kInt64By16, kUint64, kUint64By16, kFloat };

  // The arguments of one call; words are what the driver reads from, the low half where it reads 32 bits.
  struct Arguments {
    size_t count = 0;
    long device = 0;
    uint64_t hash = 0;
    std::array<Form, kMostArguments> forms;
    std::array<uint64_t, kMostArguments> words;
  };

  struct Variant {
    Arguments arguments;
    pybind11::tuple names, constants;
    Kernel kernel;
    std::array<bool, kMostArguments> passed;
    pybind11::object compiled;
  };

  bool read(Arguments& found, PyObject* const* arguments, size_t count, PyObject* const* constants, PyObject* names) const;
  bool read_one(PyObject* argument, Form& form, uint64_t& word) const;
  const Variant* find(const Arguments& arguments, PyObject* const* constants, PyObject* names) const;

  const std::string library_;
  const pybind11::object compile_, device_, stream_;
  std::vector<PyTypeObject*> tensor_types_;
  std::vector<std::unique_ptr<const Variant>> variants_;  // kept for ever
};

void bind_launcher(pybind11::module_& module);

}  // namespace flashtrain
