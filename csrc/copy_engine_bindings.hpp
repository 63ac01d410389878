// Part of the Python module flashtrain._core: the copy engine.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "copy_engine.hpp"

namespace flashtrain {

inline void bind_copy_engine(pybind11::module_& module) {
  namespace py = pybind11;
  module.attr("flag_columns") = FlagTable::kColumns;
  module.def("flag_words", &FlagTable::flag_words, py::arg("world"));
  module.def("flag_table_words", &FlagTable::words, py::arg("world"));
  module.def("load_driver", [](const std::string& library) { Driver::load(library); }, py::arg("library"));

  using Messages = std::vector<Program::Fields>;
  py::class_<Program, std::shared_ptr<Program>>(module, "Program")
      .def(py::init<std::string, uint32_t, const Messages&, const Messages&, const std::vector<Program::TurnFields>&>(),
           py::arg("op"), py::arg("steps"), py::arg("sends"), py::arg("arrivals"), py::arg("turns"));
  module.attr("no_turn") = Turn::kNone;

  using Places = std::vector<uint32_t>;
  py::class_<KernelCall>(module, "KernelCall")
      .def(py::init([](std::shared_ptr<Launch> launch, uint32_t blocks, std::vector<uint64_t> values,
                       std::vector<Places> places, Places landing, Places flags, Places epoch, Places directory,
                       Places signals) {
             return KernelCall{std::move(launch), blocks, std::move(values), std::move(places), std::move(landing),
                               std::move(flags), std::move(epoch), std::move(directory), std::move(signals)};
           }),
           py::arg("launch"), py::arg("blocks"), py::arg("values"), py::arg("places"), py::arg("landing") = Places{},
           py::arg("flags") = Places{}, py::arg("epoch") = Places{}, py::arg("directory") = Places{},
           py::arg("signals") = Places{});
  py::class_<FusedProduct>(module, "FusedProduct")
      .def(py::init([](std::shared_ptr<Program> program, const KernelCall& product,
                       const std::optional<KernelCall>& carrier, uint32_t source, std::vector<uint64_t> offsets,
                       bool early) {
             return FusedProduct{std::move(program), product, carrier, source, std::move(offsets), early};
           }),
           py::arg("program"), py::arg("product"), py::arg("carrier"), py::arg("source"), py::arg("offsets"),
           py::arg("early"));

  using Which = std::vector<uint32_t>;
  using Sources = std::vector<uint64_t>;
  py::class_<CopyEngine>(module, "CopyEngine")
      // `keeps` lives as long as the engine: the memory of the tables, which its watchdog reads and writes.
      .def(py::init([](const std::string& library, uint32_t rank, double timeout, uint32_t epoch, uint64_t host_tables,
                       const Sources& device_tables, bool captured, const py::object&) {
             return std::make_unique<CopyEngine>(library, rank, timeout, epoch, host_tables, device_tables, captured);
           }),
           py::arg("library"), py::arg("rank"), py::arg("timeout"), py::arg("epoch"), py::arg("host_tables"),
           py::arg("device_tables"), py::arg("captured"), py::arg("keeps"), py::keep_alive<1, 9>())
      .def("use_landings", &CopyEngine::use_landings, py::arg("landings"), py::arg("stride"), py::arg("directory"),
           py::arg("buffers"))
      .def("directory", &CopyEngine::directory, py::arg("landings"), py::arg("stride"), py::arg("buffers"))
      .def_property_readonly("place", &CopyEngine::place)
      .def_property_readonly("next_place", &CopyEngine::next_place)
      .def("let_follow", &CopyEngine::let_follow)
      // May wait for the device.
      .def("open", &CopyEngine::open, py::arg("program"), py::arg("site"), py::arg("stream"),
           py::arg("device_flags"), py::call_guard<py::gil_scoped_release>())
      .def("open_early", &CopyEngine::open_early, py::arg("program"), py::arg("site"), py::arg("stream"),
           py::arg("sources"), py::call_guard<py::gil_scoped_release>())
      .def("push", py::overload_cast<const Which&, const Sources&>(&CopyEngine::push))
      .def("push_early", &CopyEngine::push_early, py::arg("which"), py::arg("sources"), py::arg("settled") = nullptr)
      .def("start", &CopyEngine::start, py::arg("product"), py::arg("site"), py::arg("stream"), py::arg("given"),
           py::call_guard<py::gil_scoped_release>())
      .def("keep", &CopyEngine::keep, py::arg("source"), py::arg("offset"), py::arg("bytes"))
      .def("wait", &CopyEngine::wait)
      .def("wait_for_all", &CopyEngine::wait_for_all)
      .def("wait_beside", &CopyEngine::wait_beside)
      .def("close", &CopyEngine::close)
      .def("abort", &CopyEngine::abort)
      .def("check", &CopyEngine::check)
      .def_property_readonly("stop_word", &CopyEngine::stop_word)
      .def_property_readonly("signals", &CopyEngine::signals);
}

}  // namespace flashtrain
