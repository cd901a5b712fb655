// SPDX-License-Identifier: Apache-2.0
// Bindings of the layer formats.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array.h"
#include "bindings/registers.h"
#include "formats/hf_packed.h"
#include "formats/onebit.h"
#include "formats/packed_tensor.h"
#include "formats/t16.h"
#include "formats/t20.h"
#include "formats/t8.h"
#include "formats/two_plane.h"

namespace tf {
namespace {

namespace py = pybind11;

ScaleKind ScaleKindFromName(const std::string& name) {
  if (name == "none") return ScaleKind::kNone;
  if (name == "tensor") return ScaleKind::kTensor;
  if (name == "row") return ScaleKind::kRow;
  Check(name == "group", "[packed_tensor] scale_kind is none, tensor, row or group, got '", name,
        "'");
  return ScaleKind::kGroup;
}

const char* ScaleKindName(ScaleKind kind) {
  constexpr const char* kNames[] = {"none", "tensor", "row", "group"};
  return kNames[static_cast<size_t>(kind)];
}

ScaleConvention ConventionFromName(const std::string& name) {
  if (name == "multiply") return ScaleConvention::kMultiply;
  Check(name == "divide", "[packed_tensor] convention is multiply or divide, got '", name, "'");
  return ScaleConvention::kDivide;
}

// A buffer view that is given back under the GIL, from whichever thread drops it.
std::shared_ptr<const void> KeepAlive(py::buffer_info info) {
  return {new py::buffer_info(std::move(info)), [](const void* view) {
            const py::gil_scoped_acquire gil;
            delete static_cast<const py::buffer_info*>(view);
          }};
}

PackedTensor FromBuffer(const std::string& layout, size_t rows, size_t cols, const py::buffer& data,
                        const std::string& scale_kind, size_t group_size,
                        const std::string& convention, const py::object& scales) {
  py::buffer_info info = data.request();
  const std::span<const uint8_t> bytes = BytesOf(info, "packed_tensor");
  std::vector<float> stored;
  if (!scales.is_none()) {
    const auto flat = py::array::ensure(scales).reshape({-1});
    const std::span<const float> values = TakeArray<float>(flat, 1, "packed_tensor", "scales");
    stored.assign(values.begin(), values.end());
  }
  Scales all = MakeScales(ScaleKindFromName(scale_kind), group_size, ConventionFromName(convention),
                          std::move(stored), rows, cols);
  return PackedTensor(LayoutFromName(layout), rows, cols, bytes, KeepAlive(std::move(info)),
                      std::move(all));
}

// Trits, or two planes of them, without scales.
bool IsCodes(Layout layout) {
  const Alphabet alphabet = AlphabetOf(layout);
  return (alphabet == Alphabet::kTrit || alphabet == Alphabet::kNineLevels) && !HoldsScales(layout);
}

py::array_t<uint8_t> Pack(const py::array& trits, const std::string& layout_name,
                          size_t group_size) {
  const std::span<const int8_t> values = TakeArray<int8_t>(trits, 2, "pack", "trits");
  const size_t rows = ShapeOf(trits)[0], cols = ShapeOf(trits)[1];
  const Layout layout = LayoutFromName(layout_name);
  Check(IsCodes(layout), "[pack] a ternary layout without scales is needed, got ", layout_name,
        ": see encode_ternary and decode_ternary");
  py::array_t<uint8_t> packed(std::vector<size_t>{LayoutBytes(layout, rows, cols, group_size)});
  const std::span<uint8_t> out = SpanOf(packed);
  const py::gil_scoped_release release;
  switch (layout) {
    case Layout::kT16:
      T16Pack(values, rows, cols, out);
      break;
    case Layout::kT20:
      T20Pack(values, rows, cols, group_size, out);
      break;
    case Layout::kTwoPlane:
      TwoPlanePack(values, rows, cols, out);
      break;
    case Layout::kT8:
      T8Pack(values, rows, cols, out);
      break;
    case Layout::kOnebit:
      OnebitTernaryPack(values, rows, cols, out);
      break;
    case Layout::kOnebitBinary:
      OnebitBinaryPack(values, rows, cols, out);
      break;
    default:
      HfPack(values, rows, cols, out);
  }
  return packed;
}

py::array_t<int8_t> Unpack(const py::array& data, const std::string& layout_name, size_t rows,
                           size_t cols, size_t group_size) {
  const std::span<const uint8_t> bytes = TakeArray<uint8_t>(data, 1, "unpack", "data");
  const Layout layout = LayoutFromName(layout_name);
  Check(IsCodes(layout), "[unpack] a ternary layout without scales is needed, got ", layout_name,
        ": see encode_ternary and decode_ternary");
  const size_t expected = LayoutBytes(layout, rows, cols, group_size);
  Check(bytes.size() == expected, "[unpack] ", layout_name, " of ", rows, " x ", cols, " takes ",
        expected, " bytes, got ", bytes.size());
  auto trits = py::array_t<int8_t>({rows, cols});
  const std::span<int8_t> out = SpanOf(trits);
  const py::gil_scoped_release release;
  switch (layout) {
    case Layout::kT16:
      T16Unpack(bytes, rows, cols, out);
      break;
    case Layout::kT20:
      T20Unpack(bytes, rows, cols, group_size, out);
      break;
    case Layout::kTwoPlane:
      TwoPlaneUnpack(bytes, rows, cols, out);
      break;
    case Layout::kT8:
      T8Unpack(bytes, rows, cols, out);
      break;
    case Layout::kOnebit:
      OnebitTernaryUnpack(bytes, rows, cols, out);
      break;
    case Layout::kOnebitBinary:
      OnebitBinaryUnpack(bytes, rows, cols, out);
      break;
    default:
      HfUnpack(bytes, rows, cols, out);
  }
  return trits;
}

py::array_t<float> EffectiveScales(const PackedTensor& tensor) {
  const Scales& scales = tensor.scales();
  if (scales.kind != ScaleKind::kGroup) {
    return py::array_t<float>(static_cast<py::ssize_t>(scales.effective.size()),
                              scales.effective.data());
  }
  const size_t groups = scales.PerRow(tensor.cols());
  auto table = py::array_t<float>({tensor.rows(), groups});
  const std::span<float> out = SpanOf(table);
  for (size_t i = 0; i < out.size(); ++i) out[i] = tensor.ScaleAt(i / groups, i % groups);
  return table;
}

// Read-only, and keeps the tensor alive.
py::array BytesView(const py::object& self) {
  const auto& tensor = self.cast<const PackedTensor&>();
  py::array view(py::dtype::of<uint8_t>(), {static_cast<py::ssize_t>(tensor.bytes().size())}, {},
                 tensor.bytes().data(), self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

}  // namespace

void register_formats(py::module_& formats) {
  py::class_<PackedTensor>(formats, "PackedTensor",
                           "One weight matrix [rows, cols] and its scales.")
      .def(py::init(&FromBuffer), py::arg("layout"), py::arg("rows"), py::arg("cols"),
           py::arg("data"), py::kw_only(), py::arg("scale_kind") = "none",
           py::arg("group_size") = 0, py::arg("convention") = "multiply",
           py::arg("scales") = py::none())
      .def_property_readonly(
          "layout", [](const PackedTensor& t) { return std::string(LayoutName(t.layout())); })
      .def_property_readonly("rows", &PackedTensor::rows)
      .def_property_readonly("cols", &PackedTensor::cols)
      .def_property_readonly("scale_kind",
                             [](const PackedTensor& t) { return ScaleKindName(t.scales().kind); })
      .def_property_readonly("group_size",
                             [](const PackedTensor& t) { return t.scales().group_size; })
      .def_property_readonly("data", &BytesView)
      .def_property_readonly("effective_scales", &EffectiveScales);
  formats.def("pack", &Pack, py::arg("trits"), py::arg("layout"), py::kw_only(),
              py::arg("group_size") = 0,
              "Trits, or levels -4 .. 4 of two planes, [rows, cols] to the bytes of a layout.");
  formats.def("unpack", &Unpack, py::arg("data"), py::arg("layout"), py::arg("rows"),
              py::arg("cols"), py::kw_only(), py::arg("group_size") = 0, "The inverse of pack.");
  formats.def(
      "layout_bytes",
      [](const std::string& layout, size_t rows, size_t cols, size_t group_size) {
        return LayoutBytes(LayoutFromName(layout), rows, cols, group_size);
      },
      py::arg("layout"), py::arg("rows"), py::arg("cols"), py::kw_only(), py::arg("group_size") = 0,
      "Bytes that a matrix takes.");
  formats.def(
      "hf_packed_is_valid",
      [](const py::array& data) {
        const std::span<const uint8_t> bytes = TakeArray<uint8_t>(data, 1, "hf_packed", "data");
        const py::gil_scoped_release release;
        return HfPackedIsValid(bytes);
      },
      py::arg("data"), "Whether every code stands for a trit.");
}

}  // namespace tf
