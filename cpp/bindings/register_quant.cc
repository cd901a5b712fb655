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
#include "quant/calibrator.h"
#include "quant/descent.h"
#include "quant/find_ternary.h"
#include "quant/moment_factor.h"
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

Alphabet AlphabetOfPlanes(size_t planes) {
  Check(planes == 1 || planes == 2, "[calibrate] planes is 1 or 2, got ", planes);
  return planes == 1 ? Alphabet::kTrit : Alphabet::kNineLevels;
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

// `sums` is changed in place.
template <typename Value>
std::span<Value> TakeWritable(py::array& array, size_t rank, const char* op, const char* name) {
  const std::span<const Value> values =
      TakeArray<Value>(array, static_cast<py::ssize_t>(rank), op, name);
  Check(array.writeable(), "[", op, "] ", name, " must be writeable");
  return {static_cast<Value*>(array.mutable_data()), values.size()};
}

void PySumMoments(const py::array& a, const py::object& b, py::array& sums, size_t threads) {
  const std::span<const float> values = TakeArray<float>(a, 2, "second_moments", "activations");
  const std::span<double> total = TakeWritable<double>(sums, 2, "second_moments", "sums");
  const size_t cols = ShapeOf(a)[1];
  const Team team(threads);
  if (b.is_none()) {
    const py::gil_scoped_release release;
    SumSecondMoments(values, cols, team, total);
    return;
  }
  const auto other = b.cast<py::array>();
  const std::span<const float> others = TakeArray<float>(other, 2, "second_moments", "b");
  const size_t other_cols = ShapeOf(other)[1];
  const py::gil_scoped_release release;
  SumCrossMoments(values, cols, others, other_cols, team, total);
}

void PyAddCorrection(py::array& target, const py::array& lacking, const py::array& factor,
                     size_t threads) {
  const std::span<double> values = TakeWritable<double>(target, 2, "calibrate", "target");
  const std::span<const double> sums = TakeArray<double>(lacking, 2, "calibrate", "lacking");
  const std::span<const double> factors = TakeArray<double>(factor, 2, "calibrate", "factor");
  const size_t rows = ShapeOf(target)[0], cols = ShapeOf(target)[1];
  const Team team(threads);
  const py::gil_scoped_release release;
  AddCorrection(values, rows, cols, sums, factors, team);
}

py::tuple PyRoundWithFeedback(const py::array& target, const py::object& factor,
                              const py::array& importance, std::string_view rule_name,
                              std::string_view scale, size_t group_size, float tensor_scale,
                              size_t planes, size_t threads) {
  const std::span<const double> values = TakeArray<double>(target, 2, "calibrate", "target");
  const std::span<const double> weights =
      TakeArray<double>(importance, 1, "calibrate", "importance");
  std::span<const double> factors;
  py::array kept;
  if (!factor.is_none()) {
    kept = factor.cast<py::array>();
    factors = TakeArray<double>(kept, 2, "calibrate", "factor");
  }
  const size_t rows = ShapeOf(target)[0], cols = ShapeOf(target)[1];
  const Alphabet alphabet = AlphabetOfPlanes(planes);
  const ScaleRule rule = ScaleRuleFromName(rule_name);
  const ScaleKind kind = KindFromName(scale);
  const size_t count = ScaleCount(kind, group_size, rows, cols);
  const Team team(threads);
  py::array_t<int8_t> levels({rows, cols});
  py::array_t<float> scales = NewScales(kind, count, rows);
  if (kind == ScaleKind::kTensor) *scales.mutable_data() = tensor_scale;
  const std::span<int8_t> level_span = SpanOf(levels);
  const std::span<float> scale_span = SpanOf(scales);
  {
    const py::gil_scoped_release release;
    RoundWithFeedback(values, rows, cols, factors, weights, alphabet, rule, kind, group_size, team,
                      level_span, scale_span);
  }
  return py::make_tuple(levels, scales);
}

void PyDescend(const py::array& target, const py::array& moments, py::array& levels,
               py::array& scales, std::string_view scale, size_t group_size, size_t rounds,
               size_t sweeps, size_t planes, size_t threads) {
  const std::span<const double> values = TakeArray<double>(target, 2, "calibrate", "target");
  const std::span<const double> sums = TakeArray<double>(moments, 2, "calibrate", "moments");
  const Alphabet alphabet = AlphabetOfPlanes(planes);
  const ScaleKind kind = KindFromName(scale);
  const std::span<int8_t> level_span = TakeWritable<int8_t>(levels, 2, "calibrate", "levels");
  const std::span<float> scale_span =
      TakeWritable<float>(scales, kind == ScaleKind::kGroup ? 2 : 1, "calibrate", "scales");
  const size_t rows = ShapeOf(target)[0], cols = ShapeOf(target)[1];
  const Team team(threads);
  const py::gil_scoped_release release;
  Descend(values, rows, cols, sums, alphabet, kind, group_size, rounds, sweeps, team, level_span,
          scale_span);
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
  quant.def("sum_moments", &PySumMoments, py::arg("a"), py::arg("b"), py::arg("sums"),
            py::kw_only(), py::arg("threads") = 1,
            "sums += a^T a, or a^T b where b is given; float32 [tokens, cols] into float64.");
  quant.def("add_correction", &PyAddCorrection, py::arg("target"), py::arg("lacking"),
            py::arg("factor"), py::kw_only(), py::arg("threads") = 1,
            "target += lacking H^-1, in place, for the upper triangular factor R of H = R R^T.");
  quant.def("round_with_feedback", &PyRoundWithFeedback, py::arg("target"), py::arg("factor"),
            py::arg("importance"), py::kw_only(), py::arg("rule"), py::arg("scale"),
            py::arg("group_size") = 128, py::arg("tensor_scale") = 1.0f, py::arg("planes") = 1,
            py::arg("threads") = 1,
            "Float64 targets to trits (planes=2: to levels -4 .. 4) and fp16-exact scales, each "
            "column minding the errors of those on its left.");
  quant.def("descend", &PyDescend, py::arg("target"), py::arg("moments"), py::arg("levels"),
            py::arg("scales"), py::kw_only(), py::arg("scale"), py::arg("group_size") = 128,
            py::arg("rounds") = 4, py::arg("sweeps") = 4, py::arg("planes") = 1,
            py::arg("threads") = 1, "Moves levels and scales, in place, to a smaller error.");
}

}  // namespace tf
