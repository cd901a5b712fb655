// SPDX-License-Identifier: Apache-2.0
// Linear layers on raw addresses, for callers whose arrays are not NumPy's, such as PyTorch's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "bindings/activation_mode.h"
#include "bindings/registers.h"
#include "formats/layout.h"
#include "formats/packed_tensor.h"
#include "kernels/linear.h"

namespace tf {
namespace {

namespace py = pybind11;

ScaleKind KindOf(size_t count, size_t group_size) {
  if (count == 0) return ScaleKind::kNone;
  if (group_size > 0) return ScaleKind::kGroup;
  return count == 1 ? ScaleKind::kTensor : ScaleKind::kRow;
}

// The addresses of a weight, of its scales and of its output, how many rows it has, and how many
// scales.
using RawLayer = std::tuple<uintptr_t, uintptr_t, uintptr_t, size_t, size_t>;

PackedTensor MakeTensor(const RawLayer& raw, Layout layout, size_t cols, size_t group_size) {
  const auto [weight, scales, out, rows, scale_count] = raw;
  Check(weight != 0 && scales != 0 && out != 0, "[linears_at] an address is null");
  const auto* scale_data = reinterpret_cast<const float*>(scales);
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  return PackedTensor(
      layout, rows, cols, {bytes, LayoutBytes(layout, rows, cols, group_size)}, nullptr,
      MakeScales(KindOf(scale_count, group_size), group_size, ScaleConvention::kMultiply,
                 std::vector<float>(scale_data, scale_data + scale_count), rows, cols));
}

void LinearsAt(uintptr_t x, size_t tokens, size_t cols, const std::vector<RawLayer>& layers,
               const std::string& layout_name, size_t group_size, const std::string& activations,
               size_t threads) {
  const ActivationMode mode = ActivationModeFromName(activations);
  const Layout layout = LayoutFromName(layout_name);
  Check(IsTiles(layout), "[linears_at] the run-time layouts are t8, t16 and t20, got ",
        layout_name);
  Check(!layers.empty(), "[linears_at] there is no layer");
  Check(tokens == 0 || x != 0, "[linears_at] an address is null");
  const Team team(threads);
  const py::gil_scoped_release release;
  if (tokens == 0) return;
  std::vector<PackedTensor> tensors;
  std::vector<LinearJob> jobs;
  tensors.reserve(layers.size());  // jobs point into it
  for (const RawLayer& raw : layers) {
    const PackedTensor& tensor = tensors.emplace_back(MakeTensor(raw, layout, cols, group_size));
    jobs.push_back({&tensor, reinterpret_cast<float*>(std::get<2>(raw)), tensor.rows()});
  }
  ApplyLinears(jobs, reinterpret_cast<const float*>(x), tokens, mode, team);
}

}  // namespace

void register_raw_linear(py::module_& kernels) {
  kernels.def(
      "linears_at", &LinearsAt, py::arg("x"), py::arg("tokens"), py::arg("cols"), py::arg("layers"),
      py::arg("layout"), py::arg("group_size"), py::arg("activations"), py::arg("threads"),
      "As `linear`, on the addresses of C-contiguous arrays, and several layers with one input at "
      "once: float32 x [tokens, cols], layers (bytes of the weight in a run-time layout, float32 "
      "scales, float32 out [tokens, rows], rows, number of scales). The caller answers for their "
      "sizes and keeps them alive.");
}

}  // namespace tf
