// The kernels as functions of Python: addresses and numbers, as kernels/launch_cuda.py takes them from tensors. They allocate nothing and wait for
// nothing, so that a CUDA graph captures them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

using namespace fusedmoe::cuda;

// An address of whatever type stands in its place.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

template <size_t N>
using Tensors = std::array<uintptr_t, N>;
template <size_t N>
using Numbers = std::array<int64_t, N>;

// The addresses of the parameters, and whether all are multiples of 16. `table`: the address of an array of them all on the device, or 0 where they
// are at most `Addresses::count`.
struct Parameters {
  Addresses all{};
  bool even = true;

  Parameters(const std::vector<uintptr_t>& addresses, uintptr_t table) {
    for (size_t i = 0; i < addresses.size(); i++) {
      if (i < Addresses::count) all.at[i] = Address{addresses[i]};
      even = even && addresses[i] % 16 == 0;
    }
    if (addresses.size() <= Addresses::count) return;
    if (!table) throw py::value_error("cuda: expected a table of " + std::to_string(addresses.size()) + " addresses on the device, got none");
    all.more = static_cast<const void* const*>(Address{table}) + Addresses::count;
  }
};

// Launch on PyTorch's current stream of the device.
template <class F>
void on_stream(int device, F&& launch) {
  use_device(device);
  launch(current_stream(device));
}

// Tensors: x, buffers, out, p, weights, plan, floats. Numbers: place, programs, rows, x_row, x_slot, mixing.
void launch_forward(const Tiles& tiles, int device, const Parameters& parameters, const Tensors<7>& t, const Numbers<6>& n) {
  const auto at = [&](size_t i) { return Address{t[i]}; };
  const Places places{at(0), at(1), at(2), n[3], n[4]};
  const Network network{places, at(3), at(4), at(5), at(6), n[2], n[5], parameters.all};
  on_stream(device, [&](Stream stream) { forward(network, tiles, int(n[0]), int(n[1]), stream); });
}

// Tensors: those of the forward, d_x, d_buffers, d_out, dw, dz, arrived. Numbers: those of the forward, d_row, d_slot, dz_row, tasks.
void launch_backward_rows(const Tiles& tiles, int device, const Parameters& parameters, const Tensors<13>& t, const Numbers<10>& n) {
  const auto at = [&](size_t i) { return Address{t[i]}; };
  const Places places{at(0), at(1), at(2), n[3], n[4]}, below{at(7), at(8), at(9), n[6], n[7]};
  const Network network{places, at(3), at(4), at(5), at(6), n[2], n[5], parameters.all};
  const Backward backward{network, below, at(10), at(11), at(12), int(n[8]), int(n[9])};
  on_stream(device, [&](Stream stream) { backward_rows(backward, tiles, int(n[0]), int(n[1]), stream); });
}

// Tensors: x, buffers, out, weights, plan, dw, dz, arrived, parts, grads. Numbers: place, rows, x_row, x_slot, dz_row, mixing, total, tasks, chunk.
void launch_gradients(const Tiles& tiles, int device, const Tensors<10>& t, const Numbers<9>& n) {
  const auto at = [&](size_t i) { return Address{t[i]}; };
  const Network network{{at(0), at(1), at(2), n[2], n[3]}, nullptr, at(3), at(4), nullptr, n[1], n[5], {}};
  const Backward backward{network, {}, at(5), at(6), at(7), int(n[4]), int(n[7])};
  const Gradients of{at(8), at(9), n[6], n[8]};
  on_stream(device, [&](Stream stream) { gradients(backward, of, tiles, int(n[0]), stream); });
}

void bind_tiles(py::module_& m) {
  py::enum_<Number>(m, "Number").value("float32", Number::float32).value("bfloat16", Number::bfloat16).value("float16", Number::float16);
  py::class_<Tiles>(m, "Tiles", "How a launch runs.")
      .def(py::init<>())
      .def_readwrite("number", &Tiles::number)
      .def_readwrite("rows", &Tiles::rows)
      .def_readwrite("columns", &Tiles::columns)
      .def_readwrite("units", &Tiles::units)
      .def_readwrite("keep", &Tiles::keep)
      .def_readwrite("aligned", &Tiles::aligned)
      .def_readwrite("stored", &Tiles::stored)
      .def_readwrite("inner", &Tiles::inner)
      .def_readwrite("once", &Tiles::once);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fusedmoe, launched on PyTorch's current stream of a device.";
  bind_tiles(m);
  py::class_<Parameters>(m, "Parameters", py::dynamic_attr(), "The addresses of the parameters, as launches take them; whose table Python keeps here.")
      .def(py::init<const std::vector<uintptr_t>&, uintptr_t>(), py::arg("addresses"), py::arg("table") = 0)
      .def_readonly("even", &Parameters::even);
  m.attr("MOST_PARAMETERS") = int(Addresses::count);
  m.def("missing", &missing, "CUDA's name for what is missing on this machine, and its words; nothing where a device can be used.");
  m.def("forward", &launch_forward, py::arg("tiles"), py::arg("device"), py::arg("parameters"), py::arg("tensors"), py::arg("numbers"));
  m.def("backward_rows", &launch_backward_rows, py::arg("tiles"), py::arg("device"), py::arg("parameters"), py::arg("tensors"), py::arg("numbers"));
  m.def("gradients", &launch_gradients, py::arg("tiles"), py::arg("device"), py::arg("tensors"), py::arg("numbers"));
}
