#include "launcher.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace flashtrain {
namespace {

constexpr uint64_t kAlignment = 16;

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

uint64_t mixed(uint64_t hash, uint64_t value) { return (hash ^ value) * 0x9E3779B97F4A7C15u + (hash >> 29); }

// Constants are compared by type as well: 1 is True in Python, and compiles to something else.
bool is_plain(PyObject* constant) {
  return constant == Py_None || PyBool_Check(constant) || PyLong_CheckExact(constant) || PyUnicode_CheckExact(constant);
}
bool same(PyObject* one, PyObject* other) {
  return one == other || (Py_TYPE(one) == Py_TYPE(other) && PyObject_RichCompareBool(one, other, Py_EQ) == 1);
}

std::optional<std::array<uint32_t, 3>> read_grid(PyObject* grid) {
  if (!PyTuple_CheckExact(grid) || PyTuple_GET_SIZE(grid) < 1 || PyTuple_GET_SIZE(grid) > 3) return std::nullopt;
  std::array<uint32_t, 3> sizes{1, 1, 1};
  for (Py_ssize_t axis = 0; axis < PyTuple_GET_SIZE(grid); ++axis) {
    PyObject* const size = PyTuple_GET_ITEM(grid, axis);
    if (!PyLong_CheckExact(size)) return std::nullopt;
    int overflow = 0;
    const long value = PyLong_AsLongAndOverflow(size, &overflow);
    if (overflow != 0 || value < 0 || value > INT32_MAX) return std::nullopt;
    sizes[axis] = static_cast<uint32_t>(value);
  }
  return sizes;
}

}  // namespace

Launcher::Launcher(const std::string& library, py::object compile, py::object device, py::object stream,
                   const py::tuple& tensor_types)
    : library_(library), compile_(std::move(compile)), device_(std::move(device)), stream_(std::move(stream)) {
  Driver::load(library);
  for (const py::handle type : tensor_types) tensor_types_.push_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()));
}

bool Launcher::read_one(PyObject* argument, Form& form, uint64_t& word) const {
  if (argument == Py_None) {
    form = kNone;
    return true;
  }
  if (PyLong_CheckExact(argument)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    if (overflow < 0) return false;
    word = overflow > 0 ? PyLong_AsUnsignedLongLong(argument) : static_cast<uint64_t>(value);
    if (PyErr_Occurred() != nullptr) return false;
    const bool narrow = overflow == 0 && value >= INT32_MIN && value <= INT32_MAX;
    form = overflow > 0 ? kUint64 : narrow ? kInt32 : kInt64;
    if (word % kAlignment == 0) form += 1;
    if (narrow && value == 1) form = kOne;
    return true;
  }
  if (PyFloat_CheckExact(argument)) {
    const auto value = static_cast<float>(PyFloat_AS_DOUBLE(argument));
    word = 0;
    std::memcpy(&word, &value, sizeof(value));
    form = kFloat;
    return true;
  }
  if (std::find(tensor_types_.begin(), tensor_types_.end(), Py_TYPE(argument)) == tensor_types_.end()) return false;
  static PyObject *const is_cuda = interned("is_cuda"), *const dtype = interned("dtype"), *const data_ptr = interned("data_ptr");
  PyObject* const on_device = PyObject_GetAttr(argument, is_cuda);
  Py_XDECREF(on_device);
  if (on_device != Py_True) return false;
  PyObject* const type = PyObject_GetAttr(argument, dtype);
  Py_XDECREF(type);  // dtypes live for ever
  PyObject* const address = type == nullptr ? nullptr : PyObject_CallMethodNoArgs(argument, data_ptr);
  if (address == nullptr) return false;
  word = PyLong_AsUnsignedLongLong(address);
  Py_DECREF(address);
  form = reinterpret_cast<Form>(type) | (word % kAlignment == 0);
  return PyErr_Occurred() == nullptr;
}

bool Launcher::read(Arguments& found, PyObject* const* arguments, size_t count, PyObject* const* constants,
                    PyObject* names) const {
  if (count > kMostArguments - kScratchPointers) return false;
  PyObject* const device = PyObject_CallNoArgs(device_.ptr());
  if (device == nullptr) return false;
  found.device = PyLong_AsLong(device);
  Py_DECREF(device);
  found.count = count;
  uint64_t hash = mixed(count, static_cast<uint64_t>(found.device));
  for (size_t index = 0; index < count; ++index) {
    if (!read_one(arguments[index], found.forms[index], found.words[index])) return false;
    hash = mixed(hash, found.forms[index]);
  }
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  for (Py_ssize_t index = 0; index < named; ++index) {
    if (!is_plain(constants[index])) return false;
    hash = mixed(hash, static_cast<uint64_t>(PyObject_Hash(constants[index])));
  }
  found.hash = hash;
  return PyErr_Occurred() == nullptr;
}

const Launcher::Variant* Launcher::find(const Arguments& call, PyObject* const* constants, PyObject* names) const {
  const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
  const auto fits = [&](const std::unique_ptr<const Variant>& variant) {
    const Arguments& own = variant->arguments;
    if (own.hash != call.hash || own.device != call.device || own.count != call.count) return false;
    if (!std::equal(own.forms.begin(), own.forms.begin() + own.count, call.forms.begin())) return false;
    if (PyTuple_GET_SIZE(variant->names.ptr()) != named) return false;
    for (Py_ssize_t index = 0; index < named; ++index) {
      if (!same(PyTuple_GET_ITEM(variant->names.ptr(), index), PyTuple_GET_ITEM(names, index))) return false;
      if (!same(PyTuple_GET_ITEM(variant->constants.ptr(), index), constants[index])) return false;
    }
    return true;
  };
  const auto found = std::find_if(variants_.begin(), variants_.end(), fits);
  return found == variants_.end() ? nullptr : found->get();
}

PyObject* Launcher::call(PyObject* const* given, Py_ssize_t count, PyObject* names) {
  if (count < 1) throw std::invalid_argument("a launch needs a grid");
  const auto grid = read_grid(given[0]);
  Arguments arguments;
  const bool readable = grid && read(arguments, given + 1, static_cast<size_t>(count - 1), given + count, names);
  const Variant* const variant = readable ? find(arguments, given + count, names) : nullptr;
  if (variant == nullptr) {
    PyErr_Clear();  // of an argument that is not what it looks like: Triton says it better
    return PyObject_Vectorcall(compile_.ptr(), given, static_cast<size_t>(count), names);
  }
  if ((*grid)[0] != 0 && (*grid)[1] != 0 && (*grid)[2] != 0) {
    PyObject* const handle = PyObject_CallOneArg(stream_.ptr(), py::int_(arguments.device).ptr());
    if (handle == nullptr) throw py::error_already_set();
    void* const stream = PyLong_AsVoidPtr(handle);
    Py_DECREF(handle);
    uint64_t nothing = 0;
    std::array<void*, kMostArguments + kScratchPointers> places;
    size_t place = 0;
    for (size_t index = 0; index < arguments.count; ++index) {
      if (variant->passed[index]) places[place++] = &arguments.words[index];
    }
    for (size_t scratch = 0; scratch < kScratchPointers; ++scratch) places[place++] = &nothing;
    // A launch blocks while the queue is full, and what would empty it may be another thread's to enqueue.
    const py::gil_scoped_release release;
    variant->kernel.enter();
    variant->kernel.start(*grid, stream, places.data());
  }
  return variant->compiled.inc_ref().ptr();
}

void Launcher::add(FunctionHandle function, const std::string& name, uint32_t shared_memory, uint32_t threads,
                   const std::vector<size_t>& sizes, py::object compiled, const py::tuple& arguments,
                   const py::dict& constants) {
  py::list names;
  py::list values;
  for (const auto& [key, value] : constants) {
    names.append(key);
    values.append(value);
  }
  Variant variant{{}, py::tuple(names), py::tuple(values), Kernel(library_, function, name, shared_memory, threads), {},
                  std::move(compiled)};
  const auto items = [](const py::tuple& tuple) { return PySequence_Fast_ITEMS(tuple.ptr()); };
  if (!read(variant.arguments, items(arguments), arguments.size(), items(variant.constants), variant.names.ptr())) {
    PyErr_Clear();
    return;
  }
  std::vector<size_t> passed;
  for (size_t index = 0; index < sizes.size(); ++index) {
    variant.passed.at(index) = sizes[index] != 0;
    if (sizes[index] != 0) passed.push_back(sizes[index]);
  }
  variant.kernel.check_layout(std::move(passed));
  variants_.push_back(std::make_unique<const Variant>(std::move(variant)));
}

namespace {

// A plain function of C rather than pybind11's: that would make a tuple and a dictionary of each call.
PyObject* call_launcher(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  try {
    return (*static_cast<std::shared_ptr<Launcher>*>(PyCapsule_GetPointer(self, nullptr)))->call(arguments, count, names);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef launch_method = {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_launcher)),
                             METH_FASTCALL | METH_KEYWORDS, "launch(grid, *arguments, **constants)"};

}  // namespace

void bind_launcher(py::module_& module) {
  py::class_<Launcher, std::shared_ptr<Launcher>>(module, "Launcher")
      .def(py::init<const std::string&, py::object, py::object, py::object, const py::tuple&>(), py::arg("library"),
           py::arg("compile"), py::arg("device"), py::arg("stream"), py::arg("tensor_types"))
      .def("add", [](Launcher& launcher, uint64_t function, const std::string& name, uint32_t shared_memory, uint32_t threads,
                     const std::vector<size_t>& sizes, py::object compiled, const py::tuple& arguments,
                     const py::dict& constants) {
        launcher.add(reinterpret_cast<FunctionHandle>(static_cast<uintptr_t>(function)), name, shared_memory, threads, sizes,
                     std::move(compiled), arguments, constants);
      }, py::arg("function"), py::arg("name"), py::arg("shared_memory"), py::arg("threads"), py::arg("sizes"),
         py::arg("compiled"), py::arg("arguments"), py::arg("constants"))
      .def_property_readonly("launch", [](const std::shared_ptr<Launcher>& launcher) {
        const auto release = [](void* owner) { delete static_cast<std::shared_ptr<Launcher>*>(owner); };
        const py::capsule self(new std::shared_ptr<Launcher>(launcher), release);
        return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&launch_method, self.ptr(), nullptr));
      });
}

}  // namespace flashtrain
