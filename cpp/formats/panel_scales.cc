// SPDX-License-Identifier: Apache-2.0
// Reordering of scales; see panel_scales.h.
#include "formats/panel_scales.h"

#include <algorithm>

#include "base/float16.h"
#include "formats/t16.h"

namespace tf {

PanelScales::PanelScales(std::span<const float> effective, size_t rows, size_t groups)
    : groups_(groups) {
  const size_t size = PanelCount(rows) * groups * kPanelRows;
  const bool fits = std::ranges::all_of(
      effective, [](float scale) { return FloatFromF16(F16FromFloat(scale)) == scale; });
  if (fits) {
    half_ = AlignedArray<uint16_t>(size);
  } else {
    single_ = AlignedArray<float>(size);
  }
  for (size_t row = 0; row < rows; ++row) {
    for (size_t group = 0; group < groups; ++group) {
      const float scale = effective[row * groups + group];
      if (fits) {
        half_[Index(row, group)] = F16FromFloat(scale);
      } else {
        single_[Index(row, group)] = scale;
      }
    }
  }
}

size_t PanelScales::Index(size_t row, size_t group) const {
  return (row / kPanelRows * groups_ + group) * kPanelRows + row % kPanelRows;
}

float PanelScales::At(size_t row, size_t group) const {
  const size_t index = Index(row, group);
  return half_.size() != 0 ? FloatFromF16(half_[index]) : single_[index];
}

}  // namespace tf
