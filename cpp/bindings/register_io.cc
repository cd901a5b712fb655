// SPDX-License-Identifier: Apache-2.0
// Bindings of the layer io: GGUF files.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cstring>
#include <memory>
#include <string>

#include "bindings/registers.h"
#include "io/gguf_reader.h"

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
}

}  // namespace tf
