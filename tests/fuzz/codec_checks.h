// SPDX-License-Identifier: Apache-2.0
// What must hold for any bytes of a tensor; a violation ends the process.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "formats/dense_codec.h"
#include "formats/ternary_codec.h"
#include "fuzz/require.h"

namespace tf {

// Bytes of a ternary layout decode to trits and scales, or are refused; what was decoded encodes
// to bytes that decode to the same.
inline void CheckTernary(std::string_view layout, std::span<const uint8_t> data, size_t rows,
                         size_t cols) {
  const TernaryCodec* codec = nullptr;
  try {
    codec = FindTernaryCodec(LayoutFromName(layout));
  } catch (const std::invalid_argument&) {
  }
  if (codec == nullptr) return;
  const Team team(1);
  const bool one_scale = codec->scale_kind == ScaleKind::kTensor;
  std::vector<int8_t> trits(rows * cols), again(rows * cols);
  std::vector<float> scales(one_scale ? 1 : rows * codec->ScalesPerRow(cols));
  std::vector<float> scales_again(scales.size());
  try {
    DecodeTernary(*codec, data, rows, cols, team, trits, scales);
  } catch (const FormatError&) {
    return;
  }
  for (const int8_t trit : trits) Require(trit >= -1 && trit <= 1, "trits");
  for (const float scale : scales) Require(std::isfinite(scale) && scale >= 0, "scales");
  const CollapsedScales collapsed =
      CollapseScales(scales, one_scale ? 1 : rows, one_scale ? 1 : cols,
                     codec->scale_kind == ScaleKind::kGroup ? codec->block_cols : cols);
  Require(!collapsed.values.empty(), "collapsed scales");
  if (codec->encode_row == nullptr || cols % codec->block_cols != 0) return;
  Scales all;
  all.kind = codec->scale_kind;
  all.group_size = codec->scale_kind == ScaleKind::kGroup ? codec->block_cols : 0;
  all.effective = scales;
  std::vector<uint8_t> bytes(data.size());
  try {
    EncodeTernary(*codec, trits, rows, cols, all, team, bytes);
  } catch (const std::invalid_argument&) {
    // Only where a scale of Q2_K or Q4_0 was a product that f16 does not hold.
    Require(codec->layout == Layout::kQ2K || codec->layout == Layout::kQ40, "encoding again");
    return;
  }
  DecodeTernary(*codec, bytes, rows, cols, team, again, scales_again);
  Require(scales == scales_again, "the same scales");
  Require(codec->binary || trits == again, "the same trits");  // binary has no 0 for a scale of 0
}

// Bytes of a dense type become floats, and finite floats become bytes.
inline void CheckDense(std::string_view type, std::span<const uint8_t> data, size_t rows,
                       size_t cols) {
  const DenseCodec* codec = FindDenseCodec(type);
  if (codec == nullptr) return;
  const Team team(1);
  std::vector<float> values(rows * cols), again(rows * cols);
  Dequantize(*codec, data, rows, cols, team, values);
  if (codec->encode == nullptr) return;
  std::vector<uint8_t> bytes(data.size());
  try {
    Quantize(*codec, values, rows, cols, team, bytes);
  } catch (const std::invalid_argument&) {  // a value that is not finite, or too large
    return;
  }
  Dequantize(*codec, bytes, rows, cols, team, again);
  for (const float value : again) Require(!std::isnan(value), "numbers");
}

}  // namespace tf
