// What Python fills in for calls.cpp: what a call is bound to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "calls.h"
#include "gpu/bind.h"

namespace py = pybind11;

using namespace fusedmoe::cuda;

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of fusedmoe, "
      "launched on PyTorch's current stream of a device; the operators are in torch.ops.fusedmoe.";
  py::enum_<Number>(m, "Number")
      .value("float32", Number::float32)
      .value("bfloat16", Number::bfloat16)
      .value("float16", Number::float16);
  py::class_<Tiles>(m, "Tiles", "How a launch runs.")
      .def(py::init<>())
      .def_readwrite("number", &Tiles::number)
      .def_readwrite("rows", &Tiles::rows)
      .def_readwrite("columns", &Tiles::columns)
      .def_readwrite("units", &Tiles::units)
      .def_readwrite("resident", &Tiles::resident)
      .def_readwrite("hidden", &Tiles::hidden)
      .def_readwrite("allow_tf32", &Tiles::allow_tf32);
  fusedmoe::gpu::bind_bound<Bound>(m).def_readwrite("tiles", &Bound::tiles);
  m.attr("MOST_PARAMETERS") = int(Addresses::count);
  m.def("missing", &missing,
        "CUDA's name for what is missing on this machine, and its words; nothing where a device can be used.");
}
