// SPDX-License-Identifier: Apache-2.0
// Bindings of the layer io: GGUF files.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "base/check.h"
#include "bindings/array.h"
#include "bindings/registers.h"
#include "io/gguf_reader.h"
#include "io/gguf_writer.h"

namespace tf {
namespace {

namespace py = pybind11;

template <typename T>
py::object NumberAt(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return py::cast(value);
}

// One value, and steps over it.
py::object TakeObject(GgufValueType type, const uint8_t*& bytes) {
  const uint8_t* at = bytes;
  bytes += GgufValueBytes(type);
  switch (type) {
    case GgufValueType::kUint8:
      return NumberAt<uint8_t>(at);
    case GgufValueType::kInt8:
      return py::int_(static_cast<int>(static_cast<int8_t>(*at)));
    case GgufValueType::kUint16:
      return NumberAt<uint16_t>(at);
    case GgufValueType::kInt16:
      return NumberAt<int16_t>(at);
    case GgufValueType::kUint32:
      return NumberAt<uint32_t>(at);
    case GgufValueType::kInt32:
      return NumberAt<int32_t>(at);
    case GgufValueType::kUint64:
      return NumberAt<uint64_t>(at);
    case GgufValueType::kInt64:
      return NumberAt<int64_t>(at);
    case GgufValueType::kFloat32:
      return NumberAt<float>(at);
    case GgufValueType::kFloat64:
      return NumberAt<double>(at);
    case GgufValueType::kBool:
      return py::bool_(*at != 0);
    default: {  // a string
      uint64_t size;
      std::memcpy(&size, at, sizeof(size));
      bytes = at + sizeof(size) + size;
      return py::str(reinterpret_cast<const char*>(at + sizeof(size)), static_cast<size_t>(size));
    }
  }
}

py::object ValueObject(const GgufValue& value) {
  const uint8_t* bytes = value.bytes.data();
  if (value.type != GgufValueType::kArray) return TakeObject(value.type, bytes);
  py::list list(static_cast<size_t>(value.count));
  for (size_t i = 0; i < value.count; ++i) list[i] = TakeObject(value.element, bytes);
  return list;
}

std::string ValueTypeName(const GgufValue& value) {
  std::string name(GgufValueTypeName(value.element));
  return value.type == GgufValueType::kArray ? "array[" + name + "]" : name;
}

// A file with its Python views, made once.
struct OpenGguf {
  GgufFile file;
  py::dict metadata, metadata_types, tensors;

  OpenGguf(const std::filesystem::path& path, const std::string& type_42)
      : file([&] {
          const py::gil_scoped_release release;
          return GgufFile(path, type_42);
        }()) {
    for (const GgufValue& value : file.metadata()) {
      metadata[py::str(value.key)] = ValueObject(value);
      metadata_types[py::str(value.key)] = ValueTypeName(value);
    }
    for (const GgufTensor& tensor : file.tensors())
      tensors[py::str(tensor.name)] = py::cast(tensor);
  }
};

py::tuple Shape(const GgufTensor& tensor) {
  py::tuple shape(tensor.shape.size());
  for (size_t i = 0; i < tensor.shape.size(); ++i) shape[i] = tensor.shape[i];
  return shape;
}

// Read-only, and keeps the file mapped.
py::array Data(const py::object& self) {
  const auto& tensor = self.cast<const GgufTensor&>();
  py::array view(py::dtype::of<uint8_t>(), {static_cast<py::ssize_t>(tensor.data.size())}, {},
                 tensor.data.data(), self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

// The bytes of Python values, in the types of the file.
class ValueWriter {
 public:
  ValueWriter(const std::string& key, const std::string& type_name)
      : key_(key), type_name_(type_name) {
    const bool array = type_name.starts_with("array[") && type_name.ends_with("]");
    const std::string element = array ? type_name.substr(6, type_name.size() - 7) : type_name;
    for (uint32_t i = 0; i < kGgufValueTypes; ++i) {
      const auto type = static_cast<GgufValueType>(i);
      if (type == GgufValueType::kArray || GgufValueTypeName(type) != element) continue;
      element_ = type;
      type_ = array ? GgufValueType::kArray : type;
      return;
    }
    throw std::invalid_argument(
        StrCat("[gguf] a value type is uint8, ..., float64, bool, string or array[one of them], "
               "got '",
               type_name, "'"));
  }

  void Add(GgufWriter& writer, const py::object& value) {
    uint64_t count = 1;
    if (type_ == GgufValueType::kArray) {
      if (!py::isinstance<py::sequence>(value) || py::isinstance<py::str>(value)) FailType(value);
      count = 0;
      for (const py::handle item : value) {
        Append(item);
        ++count;
      }
    } else {
      Append(value);
    }
    writer.AddValue(key_, type_, element_, count,
                    {reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size()});
  }

 private:
  [[noreturn]] void FailType(py::handle value) const {
    throw py::type_error(StrCat("[gguf] the key '", key_, "' is ", type_name_, ", got ",
                                Py_TYPE(value.ptr())->tp_name));
  }
  [[noreturn]] void FailRange(py::handle value) const {
    throw py::value_error(StrCat("[gguf] the key '", key_, "' is ", type_name_, ", got ",
                                 std::string(py::str(value))));
  }

  template <typename T>
  void Put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }

  template <typename T>
  void PutInteger(py::handle value) {
    if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) FailType(value);
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) throw py::error_already_set();
    using Wide = std::conditional_t<std::is_signed_v<T>, long long, unsigned long long>;
    Wide wide;
    if constexpr (std::is_signed_v<T>) {
      wide = PyLong_AsLongLong(number.ptr());
    } else {
      wide = PyLong_AsUnsignedLongLong(number.ptr());
    }
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      FailRange(value);
    }
    if (wide < std::numeric_limits<T>::min() || wide > std::numeric_limits<T>::max())
      FailRange(value);
    Put(static_cast<T>(wide));
  }

  template <typename T>
  void PutFloat(py::handle value) {
    if (PyBool_Check(value.ptr()) || !PyNumber_Check(value.ptr())) FailType(value);
    const double number = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (std::isfinite(number) && std::fabs(number) > std::numeric_limits<T>::max())
      FailRange(value);
    Put(static_cast<T>(number));
  }

  void Append(py::handle value) {
    switch (element_) {
      case GgufValueType::kUint8:
        return PutInteger<uint8_t>(value);
      case GgufValueType::kInt8:
        return PutInteger<int8_t>(value);
      case GgufValueType::kUint16:
        return PutInteger<uint16_t>(value);
      case GgufValueType::kInt16:
        return PutInteger<int16_t>(value);
      case GgufValueType::kUint32:
        return PutInteger<uint32_t>(value);
      case GgufValueType::kInt32:
        return PutInteger<int32_t>(value);
      case GgufValueType::kUint64:
        return PutInteger<uint64_t>(value);
      case GgufValueType::kInt64:
        return PutInteger<int64_t>(value);
      case GgufValueType::kFloat32:
        return PutFloat<float>(value);
      case GgufValueType::kFloat64:
        return PutFloat<double>(value);
      case GgufValueType::kBool:
        if (!PyBool_Check(value.ptr())) FailType(value);
        return Put<uint8_t>(value.ptr() == Py_True ? 1 : 0);
      default: {
        if (!PyUnicode_Check(value.ptr())) FailType(value);
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
        if (text == nullptr) throw py::error_already_set();
        Put(static_cast<uint64_t>(size));
        bytes_.append(text, static_cast<size_t>(size));
      }
    }
  }

  const std::string& key_;
  const std::string& type_name_;
  GgufValueType type_{}, element_{};
  std::string bytes_;
};

void WriteBytes(GgufWriter& writer, const std::string& name, const py::buffer& data) {
  const py::buffer_info info = data.request();
  const std::span<const uint8_t> bytes = BytesOf(info, "gguf");
  const py::gil_scoped_release release;
  writer.Write(name, bytes);
}

}  // namespace

void register_io(py::module_& io) {
  py::class_<GgufTensor>(io, "GgufTensor", "One tensor of a GGUF file.")
      .def_readonly("name", &GgufTensor::name)
      .def_property_readonly("type_id", [](const GgufTensor& t) { return t.type->id; })
      .def_property_readonly("type_name",
                             [](const GgufTensor& t) { return std::string(t.type->name); })
      .def_property_readonly("type_owner",
                             [](const GgufTensor& t) { return std::string(t.type->owner); })
      .def_property_readonly("shape", &Shape)
      .def_readonly("offset", &GgufTensor::offset)
      .def_readonly("path", &GgufTensor::path)
      .def_property_readonly("data", &Data);
  py::class_<OpenGguf>(io, "GgufFile", "A GGUF file, mapped; the first part of a split one.")
      .def(py::init<const std::filesystem::path&, const std::string&>(), py::arg("path"),
           py::kw_only(), py::arg("type_42") = "")
      .def_property_readonly("version", [](const OpenGguf& f) { return f.file.version(); })
      .def_property_readonly("alignment", [](const OpenGguf& f) { return f.file.alignment(); })
      .def_property_readonly("paths", [](const OpenGguf& f) { return f.file.paths(); })
      .def_readonly("metadata", &OpenGguf::metadata)
      .def_readonly("metadata_types", &OpenGguf::metadata_types)
      .def_readonly("tensors", &OpenGguf::tensors);
  py::class_<GgufWriter>(io, "GgufWriter", "Writes a GGUF file; it takes its name in finish().")
      .def(py::init<const std::filesystem::path&, uint64_t>(), py::arg("path"),
           py::arg("alignment") = 32)
      .def(
          "add_metadata",
          [](GgufWriter& writer, const std::string& key, const py::object& value,
             const std::string& value_type) { ValueWriter(key, value_type).Add(writer, value); },
          py::arg("key"), py::arg("value"), py::arg("value_type"))
      .def(
          "add_tensor",
          [](GgufWriter& writer, const std::string& name, const std::vector<uint64_t>& shape,
             const std::string& type_name) { writer.AddTensor(name, shape, type_name); },
          py::arg("name"), py::arg("shape"), py::arg("type_name"))
      .def("write", &WriteBytes, py::arg("name"), py::arg("data"),
           "The next bytes of the next tensor.")
      .def("finish", &GgufWriter::Finish, py::call_guard<py::gil_scoped_release>(),
           "Completes the file and gives it its name.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](GgufWriter& writer, const py::args&) { writer.Discard(); });
}

}  // namespace tf
