// SPDX-License-Identifier: Apache-2.0
// Python module `quant`: rounding schemes and the detection of ternary weights.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "bindings/array.h"
#include "bindings/registers.h"
#include "quant/find_ternary.h"
#include "quant/packer.h"

namespace tf {
namespace {

namespace py = pybind11;

ScaleKind KindFromName(std::string_view name) {
  if (name == "tensor") return ScaleKind::kTensor;
  if (name == "row") return ScaleKind::kRow;
  Check(name == "group", "[quantize_weights] a scale is per tensor, row or group, got '", name,
        "'");
  return ScaleKind::kGroup;
}

const char* KindName(ScaleKind kind) {
  return kind == ScaleKind::kTensor ? "tensor" : kind == ScaleKind::kRow ? "row" : "group";
}

// [1], [rows] or [rows, groups].
py::array_t<float> NewScales(ScaleKind kind, size_t count, size_t rows) {
  std::vector<size_t> shape{count};
  if (kind == ScaleKind::kGroup) shape = {rows, count / rows};
  return py::array_t<float>(shape);
}

py::tuple PyQuantizeWeights(const py::array& weights, std::string_view scheme_name,
                            std::string_view scale, size_t group_size, size_t threads) {
  const std::span<const float> values = TakeArray<float>(weights, 2, "quantize_weights", "weights");
  const size_t rows = ShapeOf(weights)[0], cols = ShapeOf(weights)[1];
  const Scheme scheme = SchemeFromName(scheme_name);
  const ScaleKind kind = KindFromName(scale);
  const size_t count = ScaleCount(kind, group_size, rows, cols);
  const Team team(threads);
  py::array_t<int8_t> trits({rows, cols});
  py::array_t<float> scales = NewScales(kind, count, rows);
  const std::span<int8_t> trit_span = SpanOf(trits);
  const std::span<float> scale_span = SpanOf(scales);
  {
    const py::gil_scoped_release release;
    QuantizeWeights(values, rows, cols, scheme, kind, group_size, team, trit_span, scale_span);
  }
  return py::make_tuple(trits, scales);
}

py::object PyFindTernary(const py::array& weights, size_t group_size, size_t threads) {
  const std::span<const float> values = TakeArray<float>(weights, 2, "find_ternary", "weights");
  const size_t rows = ShapeOf(weights)[0], cols = ShapeOf(weights)[1];
  const Team team(threads);
  std::optional<TernaryScales> found;
  {
    const py::gil_scoped_release release;
    found = FindTernary(values, rows, cols, group_size, team);
  }
  if (!found) return py::none();
  py::array_t<int8_t> trits({rows, cols});
  py::array_t<float> scales = NewScales(found->kind, found->values.size(), rows);
  std::copy(found->values.begin(), found->values.end(), scales.mutable_data());
  const std::span<int8_t> trit_span = SpanOf(trits);
  {
    const py::gil_scoped_release release;
    TakeSigns(values, team, trit_span);
  }
  return py::make_tuple(KindName(found->kind), trits, scales);
}

}  // namespace

void register_quant(py::module_& quant) {
  quant.def(
      "quantize_weights", &PyQuantizeWeights, py::arg("weights"), py::kw_only(), py::arg("scheme"),
      py::arg("scale"), py::arg("group_size") = 128, py::arg("threads") = 1,
      "Float32 weights [rows, cols] to trits [rows, cols] and fp16-exact scales [1], [rows] or "
      "[rows, groups].");
  quant.def(
      "find_ternary", &PyFindTernary, py::arg("weights"), py::kw_only(),
      py::arg("group_size") = 128, py::arg("threads") = 1,
      "The coarsest scale kind, trits and exact scales of weights that already are ternary, or "
      "None.");
}

}  // namespace tf
