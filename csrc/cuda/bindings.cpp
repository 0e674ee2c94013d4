// The kernels as functions of Python: addresses and numbers, as kernels/launch_cuda.py takes them from tensors. They allocate nothing and wait for
// nothing, so that a CUDA graph captures them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "kernels.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

using namespace fusedmoe::cuda;

template <size_t N>
using Addresses = std::array<uintptr_t, N>;
template <size_t N>
using Numbers = std::array<int64_t, N>;
using Grid = std::pair<unsigned, unsigned>;

// An address of whatever type stands in its place.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// A struct of the kernels', whose pointers come first, in the order of kernels/*.py.
template <class Of, size_t N, size_t M, size_t... I, size_t... J>
Of filled(const Addresses<N>& a, const Numbers<M>& n, std::index_sequence<I...>, std::index_sequence<J...>) {
  return Of{Address{a[I]}..., int32_t(n[0]), n[J + 1]...};
}

// launch(form, device, grid, addresses, numbers): on PyTorch's current stream of the device.
template <class Of, size_t N, size_t M>
void bind(py::module_& m, const char* name, void (*launch)(const Of&, const Form&, Blocks, Stream)) {
  m.def(name, [launch](const Form& form, int device, const Grid& grid, const Addresses<N>& addresses, const Numbers<M>& numbers) {
    const Of of = filled<Of>(addresses, numbers, std::make_index_sequence<N>(), std::make_index_sequence<M - 1>());
    use_device(device);
    launch(of, form, {grid.first, grid.second}, current_stream(device));
  }, py::arg("form"), py::arg("device"), py::arg("grid"), py::arg("addresses"), py::arg("numbers"));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fusedmoe, launched on PyTorch's current stream.";
  py::enum_<Number>(m, "Number").value("float32", Number::float32).value("bfloat16", Number::bfloat16).value("float16", Number::float16);
  py::class_<Form>(m, "Form", "What the code that a launch runs is chosen by.")
      .def(py::init<>())
      .def_readwrite("number", &Form::number)
      .def_readwrite("tf32", &Form::tf32)
      .def_readwrite("align", &Form::align)
      .def_readwrite("store", &Form::store)
      .def_readwrite("rows", &Form::rows)
      .def_readwrite("columns", &Form::columns)
      .def_readwrite("reduction", &Form::reduction)
      .def_readwrite("outputs", &Form::outputs)
      .def_readwrite("warps", &Form::warps)
      .def_readwrite("stages", &Form::stages)
      .def_readwrite("units", &Form::units)
      .def_readwrite("reads", &Form::reads)
      .def_readwrite("keep", &Form::keep)
      .def_readwrite("weights", &Form::weights)
      .def_readwrite("inner", &Form::inner)
      .def_readwrite("copies", &Form::copies);
  m.def("missing", &missing, "CUDA's name for what is missing on this machine, and its words; nothing where a device can be used.");
  bind<Forward, 8, 5>(m, "forward", &forward);
  bind<BackwardRows, 13, 8>(m, "backward_rows", &backward_rows);
  bind<Gradients, 10, 7>(m, "gradients", &gradients);
}
