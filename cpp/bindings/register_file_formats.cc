// SPDX-License-Identifier: Apache-2.0
// Bindings of the codecs for other engines' files.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "bindings/array.h"
#include "bindings/registers.h"
#include "formats/dense_codec.h"
#include "formats/mlx.h"
#include "formats/ternary_codec.h"

namespace tf {
namespace {

namespace py = pybind11;

const TernaryCodec& CodecFromName(const std::string& layout) {
  const TernaryCodec* codec = FindTernaryCodec(LayoutFromName(layout));
  Check(codec != nullptr, "[formats] ", layout,
        " is not ternary or keeps its scales elsewhere: use pack and unpack, or dequantize");
  return *codec;
}

const DenseCodec& DenseFromName(const std::string& type) {
  const DenseCodec* codec = FindDenseCodec(type);
  Check(codec != nullptr,
        "[formats] a dense type is F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q2_K, not '", type, "'");
  return *codec;
}

// [1, 1], [rows, 1] or [rows, blocks].
py::tuple PyDecodeTernary(const std::string& layout, const py::array& data, size_t rows,
                          size_t cols, size_t threads) {
  const TernaryCodec& codec = CodecFromName(layout);
  const std::span<const uint8_t> bytes = TakeArray<uint8_t>(data, 1, "decode_ternary", "data");
  const size_t expected = LayoutBytes(codec.layout, rows, cols);
  Check(bytes.size() == expected, "[decode_ternary] ", layout, " of ", rows, " x ", cols, " takes ",
        expected, " bytes, got ", bytes.size());
  const Team team(threads);
  py::array_t<int8_t> trits({rows, cols});
  py::array_t<float> scales(
      {codec.scale_kind == ScaleKind::kTensor ? 1 : rows, codec.ScalesPerRow(cols)});
  const std::span<int8_t> trit_span = SpanOf(trits);
  const std::span<float> scale_span = SpanOf(scales);
  {
    const py::gil_scoped_release release;
    DecodeTernary(codec, bytes, rows, cols, team, trit_span, scale_span);
  }
  return py::make_tuple(trits, scales);
}

// Scales [1] or [1, 1], [rows] or [rows, 1], [rows, groups].
Scales ScalesOfMatrix(const py::array& scales, size_t rows, size_t cols, size_t group_size) {
  const std::span<const float> values =
      TakeArray<float>(scales, kAnyRank, "encode_ternary", "scales");
  Scales result;
  result.effective.assign(values.begin(), values.end());
  for (const float value : values)
    Check(value >= 0 && value < INFINITY,
          "[encode_ternary] a scale is finite and not negative, got ", value);
  const size_t groups = values.size() / rows;
  if (values.size() == 1) {
    result.kind = ScaleKind::kTensor;
  } else if (values.size() == rows) {
    result.kind = ScaleKind::kRow;
  } else {
    Check(scales.ndim() == 2 && groups > 0 && values.size() == rows * groups,
          "[encode_ternary] scales are [1], [rows] or [rows, groups], got ", values.size(), " for ",
          rows, " rows");
    result.kind = ScaleKind::kGroup;
    result.group_size = group_size != 0 ? group_size : cols / groups;
    Check(group_size != 0 || cols % groups == 0, "[encode_ternary] ", groups,
          " groups do not "
          "divide ",
          cols, " columns: say group_size");
    Check(result.PerRow(cols) == groups, "[encode_ternary] ", cols, " columns are ",
          result.PerRow(cols), " groups of ", result.group_size, ", got ", groups, " scales a row");
  }
  return result;
}

py::array_t<uint8_t> PyEncodeTernary(const std::string& layout, const py::array& trits,
                                     const py::array& scales, size_t group_size, size_t threads) {
  const TernaryCodec& codec = CodecFromName(layout);
  const std::span<const int8_t> values = TakeArray<int8_t>(trits, 2, "encode_ternary", "trits");
  const size_t rows = ShapeOf(trits)[0], cols = ShapeOf(trits)[1];
  py::array_t<uint8_t> data(std::vector<size_t>{LayoutBytes(codec.layout, rows, cols)});
  const Scales all = ScalesOfMatrix(scales, rows, cols, group_size);
  const Team team(threads);
  const std::span<uint8_t> out = SpanOf(data);
  const py::gil_scoped_release release;
  EncodeTernary(codec, values, rows, cols, all, team, out);
  return data;
}

py::tuple PyCollapseScales(const py::array& scales, size_t cols, size_t block_cols) {
  const std::span<const float> values = TakeArray<float>(scales, 2, "collapse_scales", "scales");
  const size_t rows = ShapeOf(scales)[0];
  const CollapsedScales collapsed = CollapseScales(values, rows, cols, block_cols);
  const char* kind = collapsed.kind == ScaleKind::kTensor ? "tensor"
                     : collapsed.kind == ScaleKind::kRow  ? "row"
                                                          : "group";
  std::vector<size_t> shape{collapsed.values.size()};
  if (collapsed.kind == ScaleKind::kGroup) shape = {rows, collapsed.values.size() / rows};
  py::array_t<float> result(shape);
  std::copy(collapsed.values.begin(), collapsed.values.end(), result.mutable_data());
  return py::make_tuple(kind, collapsed.group_size, result);
}

py::tuple PyDecodeMlx(const py::array& codes, const py::array& scales, const py::array& biases,
                      size_t bits, size_t group_size, size_t threads) {
  const std::span<const uint8_t> bytes = TakeArray<uint8_t>(codes, 1, "decode_mlx", "codes");
  const std::span<const float> scale_span = TakeArray<float>(scales, 2, "decode_mlx", "scales");
  const std::span<const float> bias_span = TakeArray<float>(biases, 2, "decode_mlx", "biases");
  const size_t rows = ShapeOf(scales)[0], groups = ShapeOf(scales)[1];
  const size_t cols = groups * group_size;
  const Team team(threads);
  py::array_t<int8_t> trits({rows, cols});
  py::array_t<float> trit_scales({rows, groups});
  const std::span<int8_t> trit_span = SpanOf(trits);
  const std::span<float> out_span = SpanOf(trit_scales);
  {
    const py::gil_scoped_release release;
    DecodeMlx(bytes, scale_span, bias_span, bits, group_size, rows, cols, team, trit_span,
              out_span);
  }
  return py::make_tuple(trits, trit_scales);
}

py::array_t<float> PyDequantize(const std::string& type, const py::array& data, size_t rows,
                                size_t cols, size_t threads) {
  const DenseCodec& codec = DenseFromName(type);
  const std::span<const uint8_t> bytes = TakeArray<uint8_t>(data, 1, "dequantize", "data");
  const size_t expected = DenseBytes(codec, rows, cols);
  Check(bytes.size() == expected, "[dequantize] ", type, " of ", rows, " x ", cols, " takes ",
        expected, " bytes, got ", bytes.size());
  const Team team(threads);
  py::array_t<float> values({rows, cols});
  const std::span<float> out = SpanOf(values);
  const py::gil_scoped_release release;
  Dequantize(codec, bytes, rows, cols, team, out);
  return values;
}

py::array_t<uint8_t> PyQuantize(const std::string& type, const py::array& values, size_t threads) {
  const DenseCodec& codec = DenseFromName(type);
  const std::span<const float> from = TakeArray<float>(values, 2, "quantize", "values");
  const size_t rows = ShapeOf(values)[0], cols = ShapeOf(values)[1];
  py::array_t<uint8_t> data(std::vector<size_t>{DenseBytes(codec, rows, cols)});
  const Team team(threads);
  const std::span<uint8_t> out = SpanOf(data);
  const py::gil_scoped_release release;
  Quantize(codec, from, rows, cols, team, out);
  return data;
}

}  // namespace

void register_file_formats(py::module_& formats) {
  formats.def("decode_ternary", &PyDecodeTernary, py::arg("layout"), py::arg("data"),
              py::arg("rows"), py::arg("cols"), py::kw_only(), py::arg("threads") = 1,
              "Trits [rows, cols] and scales [1, 1], [rows, 1] or [rows, blocks] of a layout that "
              "holds both.");
  formats.def("encode_ternary", &PyEncodeTernary, py::arg("layout"), py::arg("trits"),
              py::arg("scales"), py::kw_only(), py::arg("group_size") = 0, py::arg("threads") = 1,
              "The bytes of trit * scale in a layout that holds both; exact or refused.");
  formats.def(
      "collapse_scales", &PyCollapseScales, py::arg("scales"), py::arg("cols"),
      py::arg("block_cols"),
      "Block scales [rows, blocks] as the coarsest exact kind: (kind, group_size, scales).");
  formats.def("decode_mlx", &PyDecodeMlx, py::arg("codes"), py::arg("scales"), py::arg("biases"),
              py::kw_only(), py::arg("bits"), py::arg("group_size"), py::arg("threads") = 1,
              "Trits [rows, cols] and scales [rows, groups] of MLX's affine groups.");
  formats.def("dequantize", &PyDequantize, py::arg("type_name"), py::arg("data"), py::arg("rows"),
              py::arg("cols"), py::kw_only(), py::arg("threads") = 1,
              "Float32 [rows, cols] of a dense GGUF type.");
  formats.def("quantize", &PyQuantize, py::arg("type_name"), py::arg("values"), py::kw_only(),
              py::arg("threads") = 1, "Float32 [rows, cols] rounded to a dense GGUF type.");
}

}  // namespace tf
