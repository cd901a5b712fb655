// SPDX-License-Identifier: Apache-2.0
// Plain loops; see reference.h.
#include "kernels/reference.h"

#include <algorithm>
#include <cmath>

namespace tf::reference {
namespace {

double ScaleAt(const Scales& scales, size_t row, size_t col, size_t cols) {
  switch (scales.kind) {
    case ScaleKind::kTensor:
      return static_cast<double>(scales.effective[0]);
    case ScaleKind::kRow:
      return static_cast<double>(scales.effective[row]);
    default:
      return static_cast<double>(
          scales.effective[row * scales.PerRow(cols) + col / scales.group_size]);
  }
}

template <typename Value>
std::vector<double> Product(std::span<const int8_t> trits, size_t rows, const Scales& scales,
                            std::span<const Value> values) {
  const size_t cols = values.size();
  std::vector<double> out(rows);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      out[row] += static_cast<double>(trits[row * cols + col]) * static_cast<double>(values[col]) *
                  ScaleAt(scales, row, col, cols);
    }
  }
  return out;
}

}  // namespace

std::vector<int32_t> TernaryDot(std::span<const int8_t> trits, size_t rows,
                                std::span<const int8_t> codes) {
  std::vector<int32_t> sums(rows);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < codes.size(); ++col)
      sums[row] += trits[row * codes.size() + col] * codes[col];
  }
  return sums;
}

std::vector<int32_t> QuantizeActs(std::span<const float> x, int max_code, float* scale) {
  const auto limit = static_cast<float>(max_code);
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  *scale = limit * (1.0f / std::max(largest, 1e-5f));
  std::vector<int32_t> codes;
  for (const float value : x) {
    codes.push_back(
        static_cast<int32_t>(std::clamp(std::nearbyint(value * *scale), -limit, limit)));
  }
  return codes;
}

std::vector<double> TernaryLinearInteger(std::span<const int8_t> trits, size_t rows,
                                         const Scales& scales, std::span<const float> x,
                                         int max_code) {
  float act_scale = 0;
  const std::vector<int32_t> codes = QuantizeActs(x, max_code, &act_scale);
  std::vector<double> out = Product<int32_t>(trits, rows, scales, codes);
  for (double& value : out) value /= static_cast<double>(act_scale);
  return out;
}

std::vector<double> TernaryLinearF32(std::span<const int8_t> trits, size_t rows,
                                     const Scales& scales, std::span<const float> x) {
  return Product<float>(trits, rows, scales, x);
}

}  // namespace tf::reference
