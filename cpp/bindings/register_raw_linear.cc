// SPDX-License-Identifier: Apache-2.0
// A linear layer on raw addresses, for callers whose arrays are not NumPy's, such as PyTorch's.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
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

void LinearAt(uintptr_t x, size_t tokens, size_t cols, uintptr_t weight, size_t rows,
              const std::string& layout_name, uintptr_t scales, size_t scale_count,
              size_t group_size, uintptr_t out, const std::string& activations, size_t threads) {
  const ActivationMode mode = ActivationModeFromName(activations);
  const Layout layout = LayoutFromName(layout_name);
  Check(IsTiles(layout), "[linear_at] the run-time layouts are t8, t16 and t20, got ", layout_name);
  Check(tokens == 0 || (x != 0 && weight != 0 && scales != 0 && out != 0),
        "[linear_at] an address is null");
  const Team team(threads);
  const py::gil_scoped_release release;
  if (tokens == 0) return;
  const auto* scale_data = reinterpret_cast<const float*>(scales);
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  const PackedTensor tensor(
      layout, rows, cols, {bytes, LayoutBytes(layout, rows, cols, group_size)}, nullptr,
      MakeScales(KindOf(scale_count, group_size), group_size, ScaleConvention::kMultiply,
                 std::vector<float>(scale_data, scale_data + scale_count), rows, cols));
  ApplyLinear(tensor, reinterpret_cast<const float*>(x), tokens, mode, team,
              reinterpret_cast<float*>(out));
}

}  // namespace

void register_raw_linear(py::module_& kernels) {
  kernels.def(
      "linear_at", &LinearAt, py::arg("x"), py::arg("tokens"), py::arg("cols"), py::arg("weight"),
      py::arg("rows"), py::arg("layout"), py::arg("scales"), py::arg("scale_count"),
      py::arg("group_size"), py::arg("out"), py::arg("activations"), py::arg("threads"),
      "As `linear`, on the addresses of C-contiguous arrays: float32 x [tokens, cols], the "
      "bytes of the weight in a run-time layout, float32 scales, float32 out [tokens, rows]. "
      "The caller answers for their sizes and keeps them alive.");
}

}  // namespace tf
