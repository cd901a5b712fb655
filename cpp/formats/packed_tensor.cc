// SPDX-License-Identifier: Apache-2.0
// Construction and checks of PackedTensor.
#include "formats/packed_tensor.h"

#include <cmath>
#include <utility>

#include "base/aligned.h"
#include "base/check.h"

namespace tf {

size_t Scales::PerRow(size_t cols) const {
  return kind == ScaleKind::kGroup ? DivCeil(cols, group_size) : 1;
}

Scales MakeScales(ScaleKind kind, size_t group_size, ScaleConvention convention,
                  std::vector<float> stored, size_t rows, size_t cols) {
  Scales scales{
      kind, kind == ScaleKind::kGroup ? group_size : 0, convention, std::move(stored), {}};
  if (kind == ScaleKind::kGroup) {
    Check(group_size > 0 && group_size % kChunkCols == 0, "[scales] a group size is a multiple of ",
          kChunkCols, ", got ", group_size);
  }
  const size_t expected = kind == ScaleKind::kNone     ? 0
                          : kind == ScaleKind::kTensor ? 1
                                                       : rows * scales.PerRow(cols);
  Check(scales.stored.size() == expected, "[scales] expected ", expected, " scales for ", rows,
        " x ", cols, ", got ", scales.stored.size());
  scales.effective.reserve(expected);
  for (const float stored_value : scales.stored) {
    const float effective =
        convention == ScaleConvention::kDivide ? 1.0f / stored_value : stored_value;
    Check(std::isfinite(effective) && effective >= 0.0f,
          "[scales] a scale is finite and not negative, got ", stored_value);
    scales.effective.push_back(effective);
  }
  return scales;
}

PackedTensor::PackedTensor(Layout layout, size_t rows, size_t cols, std::span<const uint8_t> bytes,
                           std::shared_ptr<const void> owner, Scales scales)
    : layout_(layout),
      rows_(rows),
      cols_(cols),
      bytes_(bytes),
      owner_(std::move(owner)),
      scales_(std::move(scales)) {
  const size_t expected = LayoutBytes(layout, rows, cols, scales_.group_size);
  Check(bytes.size() == expected, "[packed_tensor] ", LayoutName(layout), " of ", rows, " x ", cols,
        " takes ", expected, " bytes, got ", bytes.size());
  if (HoldsScales(layout)) {
    Check(scales_.kind == ScaleKind::kNone || scales_.kind == ScaleKind::kTensor,
          "[packed_tensor] ", LayoutName(layout),
          " holds its scales; only one factor for the whole tensor may come on top");
  } else {
    Check((scales_.kind == ScaleKind::kNone) == (alphabet() == Alphabet::kFloat),
          "[packed_tensor] floats have no scale and codes need one, layout ", LayoutName(layout));
  }
  Check(alphabet() != Alphabet::kInt8 || scales_.kind != ScaleKind::kGroup,
        "[packed_tensor] int8 codes have one scale per tensor or row, not per group");
  if (!IsTiles(layout) || scales_.kind == ScaleKind::kTensor) return;
  panel_scales_ = std::make_shared<PanelScales>(scales_.effective, rows, scales_.PerRow(cols));
  if (scales_.kind == ScaleKind::kGroup) {
    scales_.stored = {};
    scales_.effective = {};
  }
}

PackedTensor PackedTensor::WithTiles(Layout layout, uint8_t** bytes) const {
  Check(IsTernaryTiles(layout_) && IsTernaryTiles(layout),
        "[packed_tensor] not both are tiles of trits: ", LayoutName(layout_), ", ",
        LayoutName(layout));
  auto buffer = std::make_shared<AlignedArray<uint8_t>>(
      LayoutBytes(layout, rows_, cols_, scales_.group_size));
  *bytes = buffer->data();
  PackedTensor result = *this;
  result.layout_ = layout;
  result.bytes_ = std::as_const(*buffer).span();
  result.owner_ = std::move(buffer);
  return result;
}

float PackedTensor::ScaleAt(size_t row, size_t group) const {
  if (panel_scales_ != nullptr) return panel_scales_->At(row, group);
  if (scales_.kind == ScaleKind::kTensor) return scales_.effective[0];
  return scales_.effective[row * scales_.PerRow(cols_) + group];
}

PackedTensor PackedTensor::Allocate(Layout layout, size_t rows, size_t cols, Scales scales,
                                    uint8_t** bytes) {
  auto buffer =
      std::make_shared<AlignedArray<uint8_t>>(LayoutBytes(layout, rows, cols, scales.group_size));
  *bytes = buffer->data();
  const std::span<const uint8_t> view = std::as_const(*buffer).span();
  return PackedTensor(layout, rows, cols, view, std::move(buffer), std::move(scales));
}

}  // namespace tf
