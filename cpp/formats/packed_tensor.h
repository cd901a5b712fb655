// SPDX-License-Identifier: Apache-2.0
// PackedTensor: one weight matrix in any alphabet and layout, with its scales. The noun that files,
// quantizers and kernels exchange.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "formats/layout.h"
#include "formats/panel_scales.h"
#include "formats/ternary.h"

namespace tf {

// The scales of a tensor. weight = code * effective.
struct Scales {
  ScaleKind kind = ScaleKind::kNone;
  size_t group_size = 0;                                    // columns, for kGroup
  ScaleConvention convention = ScaleConvention::kMultiply;  // of `stored`
  std::vector<float> stored;                                // as the checkpoint has them
  std::vector<float> effective;  // kTensor: 1, kRow: rows, kGroup: rows x groups, row-major

  // Scales in a row: 1, or the number of groups (the last may be ragged).
  size_t PerRow(size_t cols) const;
};

// Takes the numbers of a checkpoint, derives the effective scales. Throws std::invalid_argument
// when the count does not fit the shape, a group size is no multiple of kChunkCols, or an effective
// scale is not finite and positive (zero is allowed under kMultiply: an all-zero row).
Scales MakeScales(ScaleKind kind, size_t group_size, ScaleConvention convention,
                  std::vector<float> stored, size_t rows, size_t cols);

// A matrix of `rows` output features x `cols` input features. In a layout that holds its scales,
// Scales are kNone, or kTensor for one more factor (the `.scale` tensor of GGUF files). The bytes
// are either owned or mapped; `owner` keeps them alive. Copies share the bytes, which never change
// after construction.
class PackedTensor {
 public:
  PackedTensor() = default;
  // Throws std::invalid_argument when bytes or scales do not fit the shape. Codes are not looked
  // at.
  PackedTensor(Layout layout, size_t rows, size_t cols, std::span<const uint8_t> bytes,
               std::shared_ptr<const void> owner, Scales scales);

  // Owns a fresh zeroed buffer, handed out for filling.
  static PackedTensor Allocate(Layout layout, size_t rows, size_t cols, Scales scales,
                               uint8_t** bytes);

  // The same matrix in other run-time tiles, a fresh zeroed buffer, handed out for filling; scales
  // are shared. Both layouts are tiles of trits.
  PackedTensor WithTiles(Layout layout, uint8_t** bytes) const;

  Alphabet alphabet() const { return AlphabetOf(layout_); }
  Layout layout() const { return layout_; }
  size_t rows() const { return rows_; }
  size_t cols() const { return cols_; }
  bool empty() const { return rows_ == 0; }
  std::span<const uint8_t> bytes() const { return bytes_; }
  const Scales& scales() const { return scales_; }

  // Of run-time tiles with row or group scales, else null. Tiles with group scales have them here
  // alone: `stored` and `effective` of their scales() are empty.
  const PanelScales* panel_scales() const { return panel_scales_.get(); }
  // The effective scale of an element. The matrix is not of floats.
  float ScaleAt(size_t row, size_t group) const;

 private:
  Layout layout_ = Layout::kF32;
  size_t rows_ = 0;
  size_t cols_ = 0;
  std::span<const uint8_t> bytes_;
  std::shared_ptr<const void> owner_;
  Scales scales_;
  std::shared_ptr<const PanelScales> panel_scales_;
};

}  // namespace tf
