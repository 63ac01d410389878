// The Python module flashtrain._core: a table of contents.
#include <pybind11/pybind11.h>

#include "copy_engine_bindings.hpp"
#include "host_transport.hpp"
#include "interpreter_lock.hpp"
#include "kernel_bindings.hpp"
#include "launcher.hpp"

namespace py = pybind11;
using namespace flashtrain;

PYBIND11_MODULE(_core, module) {
  module.doc() = "Host code of the transports; see flashtrain.comm.transport.host and flashtrain.comm.transport.nvlink.";
  module.attr("layout") = kLayout;
  bind_kernel(module);
  bind_launcher(module);
  bind_copy_engine(module);
  module.def("process_start_time", &process_start_time, py::arg("pid"));

  py::register_exception<TransportFailure>(module, "TransportFailure", PyExc_RuntimeError);
  py::class_<Operation, std::shared_ptr<Operation>>(module, "Operation");
  py::class_<Request, RequestPointer>(module, "Request").def_property_readonly("pending", &Request::pending);

  py::class_<Address>(module, "Address")
      .def(py::init<int, int, uint64_t, uint64_t>(), py::arg("pid"), py::arg("descriptor"), py::arg("start_time"),
           py::arg("token"))
      .def_readonly("pid", &Address::pid)
      .def_readonly("descriptor", &Address::descriptor)
      .def_readonly("start_time", &Address::start_time)
      .def_readonly("token", &Address::token);

  // wait and join block, so they let go of the interpreter lock; the other calls rely on it.
  py::class_<HostTransport>(module, "HostTransport")
      .def(py::init<uint32_t, uint32_t, uint64_t>(), py::arg("rank"), py::arg("world"), py::arg("ring_bytes"))
      .def_property_readonly("address", &HostTransport::address)
      .def_property_readonly("worker_time", &HostTransport::worker_time)
      .def("connect", &HostTransport::connect, py::arg("peer"), py::arg("address"))
      .def("start", &HostTransport::start)
      .def("open", &HostTransport::open, py::arg("label"))
      .def("send", &HostTransport::send)
      .def("receive", &HostTransport::receive)
      .def("wait",
           [](HostTransport& transport, const RequestPointer& request, double timeout) {
             return without_interpreter_lock([&] {
               return transport.wait(request, timeout, [] {
                 const py::gil_scoped_acquire acquire;
                 if (PyErr_CheckSignals() != 0) throw py::error_already_set();
               });
             });
           })
      .def("abort", &HostTransport::abort)
      .def("shutdown", [](HostTransport& transport) {
        if (!transport.close()) return;
        const py::gil_scoped_release release;
        transport.join();
      });
}
