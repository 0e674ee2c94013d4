// The guards of fusedmoe/nn/guards.py and frozen.py, at a price that every call can pay: a few
// nanoseconds for each dict or tensor.
#include <pybind11/pybind11.h>

#include <cstring>

namespace py = pybind11;

namespace {

// The tuples hold the dicts of live modules, so they belong to Python objects, whose cycles the
// collector can free; nothing is kept here.

bool any_filled(const py::tuple& dicts) {
  for (const py::handle& dict : dicts)
    if (PyObject_Length(dict.ptr()) != 0) return true;
  return false;
}

bool any_contains(const py::tuple& dicts, const py::str& name) {
  for (const py::handle& dict : dicts)
    if (PyDict_Contains(dict.ptr(), name.ptr()) != 0) return true;
  return false;
}

// Whether two dicts hold other objects; equal ones count as other.
bool differ(PyObject* dict, PyObject* expected) {
  if (PyDict_Size(dict) != PyDict_Size(expected)) return true;
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(expected, &position, &key, &value);)
    if (PyDict_GetItem(dict, key) != value) return true;
  return false;
}

bool any_differ(const py::tuple& dicts, const py::tuple& expected) {
  if (dicts.size() != expected.size()) return true;
  for (size_t i = 0; i < dicts.size(); i++)
    if (differ(PyTuple_GET_ITEM(dicts.ptr(), i), PyTuple_GET_ITEM(expected.ptr(), i))) return true;
  return false;
}

// What shows that a tensor was written to or given other memory: its version, its address, and the
// bytes of its middle element at an offset. PyTorch does not count every write (through `.data`, by
// the fused optimizers); those that reach all elements reach that one.
py::tuple stamp(const py::handle& tensor) {
  const auto sizes = py::cast<py::tuple>(tensor.attr("shape")), strides = py::cast<py::tuple>(tensor.attr("stride")());
  const auto element = py::cast<int64_t>(tensor.attr("element_size")());
  int64_t offset = 0, count = 1;
  for (size_t i = 0; i < sizes.size(); i++) {
    offset += py::cast<int64_t>(sizes[i]) / 2 * py::cast<int64_t>(strides[i]) * element;
    count *= py::cast<int64_t>(sizes[i]);
  }
  const py::object address = tensor.attr("data_ptr")();
  const char* memory = static_cast<const char*>(PyLong_AsVoidPtr(address.ptr()));
  // Where the storage was freed there is nothing to read.
  const auto held = py::cast<int64_t>(tensor.attr("untyped_storage")().attr("nbytes")());
  const auto first = py::cast<int64_t>(tensor.attr("storage_offset")()) * element;
  const bool readable = count && memory && first + offset + element <= held;
  return py::make_tuple(tensor.attr("_version"), address, offset,
                        py::bytes(readable ? memory + offset : "", readable ? element : 0));
}

// Whether a new reference to a number, or null after an error, is another number than `expected`.
bool other(PyObject* number, PyObject* expected) {
  if (!number) throw py::error_already_set();
  const int same = PyObject_RichCompareBool(number, expected, Py_EQ);
  Py_DECREF(number);
  if (same < 0) throw py::error_already_set();
  return !same;
}

bool any_written(const py::tuple& tensors, const py::tuple& stamps) {
  // Looked up once: to find an attribute by name takes longer than to read it. Never freed, as a
  // module is not either.
  static PyObject* const type = py::object(py::module_::import("torch").attr("_C").attr("TensorBase")).release().ptr();
  static PyObject* const version = PyObject_GetAttrString(type, "_version");
  static PyObject* const pointer = PyObject_GetAttrString(type, "data_ptr");
  const descrgetfunc read = Py_TYPE(version)->tp_descr_get;
  for (size_t i = 0; i < tensors.size(); i++) {
    PyObject *tensor = PyTuple_GET_ITEM(tensors.ptr(), i), *bound = PyTuple_GET_ITEM(stamps.ptr(), i);
    if (other(read(version, tensor, type), PyTuple_GET_ITEM(bound, 0))) return true;
    if (other(PyObject_Vectorcall(pointer, &tensor, 1, nullptr), PyTuple_GET_ITEM(bound, 1))) return true;
    const char* memory = static_cast<const char*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(bound, 1)));
    PyObject* sample = PyTuple_GET_ITEM(bound, 3);
    const long long offset = PyLong_AsLongLong(PyTuple_GET_ITEM(bound, 2));
    if (std::memcmp(memory + offset, PyBytes_AS_STRING(sample), PyBytes_GET_SIZE(sample)) != 0) return true;
  }
  return false;
}

}  // namespace

void bind_guards(py::module_& m) {
  m.def("any_filled", &any_filled, "Whether any of the dicts holds something.");
  m.def("any_contains", &any_contains, "Whether any of the dicts has the key.");
  m.def("any_differ", &any_differ, "Whether any of the dicts holds other objects than the expected dict beside it.");
  m.def("stamp", &stamp, "(version, address, offset, bytes there) of a CPU tensor.");
  m.def("any_written", &any_written, "Whether the stamp of any tensor is another than the one beside it.");
}
