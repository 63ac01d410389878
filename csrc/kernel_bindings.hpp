// Part of the Python module flashtrain._core: compiled kernels.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernel.hpp"

namespace flashtrain {

inline void bind_kernel(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<Kernel, std::shared_ptr<Kernel>>(module, "Kernel")
      .def(py::init([](const std::string& library, const py::bytes& cubin, const std::string& name, uint32_t shared_memory,
                       uint32_t threads) {
             return std::make_shared<Kernel>(library, std::string(cubin), name, shared_memory, threads);
           }),
           py::arg("library"), py::arg("cubin"), py::arg("name"), py::arg("shared_memory"), py::arg("threads"))
      .def("blocks_per_multiprocessor", &Kernel::blocks_per_multiprocessor);

  py::class_<Parameter>(module, "Parameter")
      .def_static("number", [](std::string name) { return Parameter{std::move(name)}; })
      .def_static("pointer", [](std::string name, bool aligned) {
        return Parameter{std::move(name), Parameter::Kind::kPointer, aligned};
      }, py::arg("name"), py::arg("aligned"))
      .def_static("matrix", [](std::string name, uint64_t rows, uint64_t columns, uint64_t pitch, uint32_t element_bytes,
                               int type, int swizzle, std::array<uint32_t, 2> box) {
        return Parameter{std::move(name), Parameter::Kind::kMatrix, true, rows, columns, pitch, element_bytes, type,
                         swizzle, box};
      }, py::arg("name"), py::arg("rows"), py::arg("columns"), py::arg("pitch"), py::arg("element_bytes"),
         py::arg("type"), py::arg("swizzle"), py::arg("box"));

  // A launch blocks while the queue is full, and what would empty it may be another thread's to enqueue.
  py::class_<Launch, std::shared_ptr<Launch>>(module, "Launch")
      .def(py::init<std::shared_ptr<const Kernel>, std::vector<Parameter>>(), py::arg("kernel"), py::arg("parameters"))
      .def("start", [](Launch& launch, uint32_t blocks, uint64_t stream, const std::vector<uint64_t>& values) {
        launch.start(blocks, reinterpret_cast<StreamHandle>(static_cast<uintptr_t>(stream)), values);
      }, py::arg("blocks"), py::arg("stream"), py::arg("values"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace flashtrain
