// SPDX-License-Identifier: Apache-2.0
// Bindings of the linear kernels, for tests, benchmarks and ternaryforge.matmul.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/parallel.h"
#include "bindings/activation_mode.h"
#include "bindings/array.h"
#include "bindings/registers.h"
#include "formats/t16.h"
#include "kernels/linear.h"
#include "kernels/quantize_acts.h"
#include "kernels/repack.h"
#include "kernels/self_test.h"
#include "kernels/ternary_gemv.h"
#include "kernels/tile_choice.h"
#include "kernels/two_plane_linear.h"

namespace tf {
namespace {

namespace py = pybind11;

py::tuple QuantizeActsArray(const py::array& x, const std::string& activations) {
  const std::span<const float> values = TakeArray<float>(x, 2, "quantize_acts", "x");
  const size_t tokens = ShapeOf(x)[0], cols = ShapeOf(x)[1];
  const ActivationMode mode = ActivationModeFromName(activations);
  Check(mode != ActivationMode::kFloat, "[quantize_acts] float activations have no codes");
  auto codes = py::array_t<int16_t>({tokens, cols});
  py::array_t<float> scales(std::vector<size_t>{tokens});
  const std::span<int16_t> codes_out = SpanOf(codes);
  const std::span<float> scales_out = SpanOf(scales);
  {
    const py::gil_scoped_release release;
    const size_t lanes = LanesPerToken(mode);
    AlignedArray<int8_t> parts(lanes * PaddedCols(cols));
    AlignedArray<uint32_t> sums(ChunkCount(cols) + 1);
    for (size_t t = 0; t < tokens; ++t) {
      QuantizeActs(mode, values.data() + t * cols, cols, lanes, parts.data(), &scales_out[t],
                   sums.data());
      for (size_t i = 0; i < cols; ++i) {
        const int8_t* part = parts.data() + i / 4 * 4 * lanes + i % 4;
        codes_out[t * cols + i] =
            static_cast<int16_t>(lanes == 1 ? part[0] : 256 * part[0] + part[4]);
      }
    }
  }
  return py::make_tuple(codes, scales);
}

// Tiles stay as they are.
PackedTensor ToTiles(const PackedTensor& tensor, const Team& team) {
  return IsTiles(tensor.layout()) ? tensor : RepackTiles(tensor, team);
}

PackedTensor Repack(const PackedTensor& tensor, const std::string& layout, size_t threads) {
  const Layout wanted = LayoutFromName(layout);
  Check(IsTiles(wanted), "[repack] the run-time layouts are t8, t16 and t20, got ", layout);
  const Team team(threads);
  const py::gil_scoped_release release;
  if (wanted == Layout::kT8) return RepackT8(tensor, team);
  if (wanted == Layout::kT16) return RepackT16(tensor, team);
  return RepackT20(ToTiles(tensor, team), team);
}

py::array_t<float> Linear(const py::array& x, const PackedTensor& tensor,
                          const std::string& activations, size_t threads) {
  const std::span<const float> values = TakeArray<float>(x, 2, "linear", "x");
  const size_t tokens = ShapeOf(x)[0], cols = ShapeOf(x)[1];
  Check(cols == tensor.cols(), "[linear] x has ", tensor.cols(), " columns like the weight, got ",
        cols);
  const ActivationMode mode = ActivationModeFromName(activations);
  const Team team(threads);
  auto out = py::array_t<float>({tokens, tensor.rows()});
  const std::span<float> result = SpanOf(out);
  const py::gil_scoped_release release;
  const PackedTensor tiles = ToTiles(tensor, team);
  const LinearJob job[] = {{&tiles, result.data(), tiles.rows()}};
  ApplyLinears(job, values.data(), tokens, mode, team);
  return out;
}

py::array_t<int32_t> TernaryDotArray(const py::array& codes, const PackedTensor& tensor) {
  const std::span<const int8_t> values = TakeArray<int8_t>(codes, 2, "ternary_dot", "codes");
  const size_t tokens = ShapeOf(codes)[0], cols = ShapeOf(codes)[1];
  Check(cols == tensor.cols(), "[ternary_dot] codes has ", tensor.cols(),
        " columns like the weight, got ", cols);
  auto out = py::array_t<int32_t>({tokens, tensor.rows()});
  const std::span<int32_t> result = SpanOf(out);
  const py::gil_scoped_release release;
  const PackedTensor weight = ToTiles(tensor, Team(1));
  Check(IsTiles(weight.layout()), "[ternary_dot] trits or two planes of them are needed, got ",
        LayoutName(weight.layout()));
  const auto dot = weight.alphabet() == Alphabet::kTrit ? TernaryDot : TwoPlaneDot;
  AlignedArray<int8_t> padded(PaddedCols(cols));
  for (size_t t = 0; t < tokens; ++t) {
    std::copy_n(values.data() + t * cols, cols, padded.data());
    dot(weight, padded.data(), 0, PanelCount(weight.rows()), result.data() + t * weight.rows());
  }
  return out;
}

}  // namespace

void register_kernels(py::module_& kernels) {
  kernels.def("quantize_acts", &QuantizeActsArray, py::arg("x"), py::kw_only(),
              py::arg("activations") = "int8",
              "Per-token integer codes and scales of activations [tokens, cols]; x is about codes "
              "/ scale.");
  kernels.def("repack", &Repack, py::arg("tensor"), py::arg("layout"), py::kw_only(),
              py::arg("threads") = 1, "The same matrix in a run-time layout.");
  kernels.def("linear", &Linear, py::arg("x"), py::arg("tensor"), py::kw_only(),
              py::arg("activations"), py::arg("threads") = 1,
              "x [tokens, cols] times the transposed weight: [tokens, rows].");
  kernels.def("ternary_dot", &TernaryDotArray, py::arg("codes"), py::arg("tensor"),
              "Exact integer sums of trit or level * code: [tokens, rows].");
  kernels.def(
      "time_linear",
      [](const PackedTensor& tensor, size_t tokens, const std::string& activations, size_t threads,
         size_t passes) {
        const ActivationMode mode = ActivationModeFromName(activations);
        CheckExact(mode, tensor);
        const Team team(threads);
        const py::gil_scoped_release release;
        return TimeLinear(tensor, tokens, mode, team, passes);
      },
      py::arg("tensor"), py::arg("tokens"), py::kw_only(), py::arg("activations"),
      py::arg("threads") = 1, py::arg("passes") = 5,
      "Seconds of each pass of `linear` on a tensor in a run-time layout.");
  kernels.def(
      "fastest_layout",
      [](size_t weights, const std::string& activations, size_t threads) {
        const ActivationMode mode = ActivationModeFromName(activations);
        const Team team(threads);
        const py::gil_scoped_release release;
        return std::string(LayoutName(FastestTiles(weights, mode, team)));
      },
      py::arg("weights"), py::kw_only(), py::arg("activations"), py::arg("threads") = 1,
      "The run-time layout, t16 or t20, that this machine multiplies faster.");
  kernels.def("self_test", &SelfTest, py::call_guard<py::gil_scoped_release>(),
              "Checks every kernel of the active target against scalar code; returns what failed.");
}

}  // namespace tf
