// What a call is bound to, as Python fills it in.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bound.h"

namespace fusedmoe::gpu {

template <class Of>
pybind11::class_<Of> bind_bound(pybind11::module_& m) {
  namespace py = pybind11;
  // Each library has its own.
  py::class_<Step>(m, "Step", "One launch.", py::module_local())
      .def(py::init<>())
      .def_readwrite("place", &Step::place)
      .def_readwrite("programs", &Step::programs)
      .def_readwrite("stores", &Step::stores)
      .def_readwrite("rowwise", &Step::rowwise)
      .def_readwrite("function", &Step::function)
      .def_readwrite("threads", &Step::threads)
      .def_readwrite("shared_bytes", &Step::shared_bytes);
  py::class_<Of> bound(m, "Bound", "What a call is bound to.", py::module_local());
  bound.def(py::init<>())
      .def_property_readonly(
          "address", [](const Of& self) { return reinterpret_cast<uintptr_t>(&self); }, "What the operators take.")
      .def_readwrite("shapes", &Of::shapes)
      .def_readwrite("output", &Of::output)
      .def_readwrite("slots", &Of::slots)
      .def_readwrite("width", &Of::width)
      .def_readwrite("mixing", &Of::mixing)
      .def_readwrite("size", &Of::size)
      .def_readwrite("lanes", &Of::lanes)
      .def_readwrite("vectorizable", &Of::vectorizable)
      .def_readwrite("ints", &Of::ints)
      .def_readwrite("floats", &Of::floats)
      .def_readwrite("plan_bytes", &Of::plan_bytes)
      .def_readwrite("floats_bytes", &Of::floats_bytes)
      .def_readwrite("softmax", &Of::softmax)
      .def_readwrite("buffer_width", &Of::buffer_width)
      .def_readwrite("tile", &Of::tile)
      .def_readwrite("rowwise_tile", &Of::rowwise_tile)
      .def_readwrite("steps", &Of::steps)
      .def_readwrite("aligned", &Of::aligned)
      .def_readwrite("weights", &Of::weights)
      .def_readwrite("seeded", &Of::seeded)
      .def_readwrite("columns", &Of::columns)
      .def_readwrite("sums", &Of::sums)
      .def_readwrite("total", &Of::total)
      .def_readwrite("grads", &Of::grads)
      .def_readwrite("shared", &Of::shared)
      .def_readwrite("gradients", &Of::gradients)
      .def_readwrite("add", &Of::add)
      .def_readwrite("times", &Of::times);
  return bound;
}

}  // namespace fusedmoe::gpu
