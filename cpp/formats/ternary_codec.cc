// SPDX-License-Identifier: Apache-2.0
// Whole matrices through a codec; the collapse of block scales.
#include "formats/ternary_codec.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>

#include "base/aligned.h"
#include "base/check.h"
#include "base/float16.h"

namespace tf {
namespace {

constexpr std::array<const TernaryCodec*, 13> kCodecs = {
    &kI2SCodec,  &kI2S64Codec, &kI2SRows4Codec, &kTq10Codec, &kTq20Codec,  &kQ10Codec,   &kQ20Codec,
    &kPq20Codec, &kPtq10Codec, &kQ2KCodec,      &kQ40Codec,  &kIq1BnCodec, &kIq2BnCodec,
};

// Remembers the first row at which a worker failed.
class FirstRow {
 public:
  explicit FirstRow(size_t rows) : rows_(rows), row_(rows) {}
  void Report(size_t row) {
    size_t seen = row_.load();
    while (row < seen && !row_.compare_exchange_weak(seen, row)) {
    }
  }
  bool found() const { return row_.load() < rows_; }
  size_t row() const { return row_.load(); }

 private:
  size_t rows_;
  std::atomic<size_t> row_;
};

// The columns of scale `index` of a row.
Range ScaleCols(const TernaryCodec& codec, size_t cols, size_t index) {
  if (codec.scale_kind != ScaleKind::kGroup) return {0, cols};
  return {index * codec.block_cols, (index + 1) * codec.block_cols};
}

bool BringToOneForm(const TernaryCodec& codec, size_t cols, uint8_t* codes, float* scales) {
  for (size_t i = 0; i < codec.ScalesPerRow(cols); ++i) {
    if (!std::isfinite(scales[i])) return false;
    if (scales[i] > 0) continue;
    const Range range = ScaleCols(codec, cols, i);
    for (size_t col = range.begin; col < range.end; ++col)
      codes[col] = scales[i] == 0 ? uint8_t{1} : static_cast<uint8_t>(2 - codes[col]);
    scales[i] = std::fabs(scales[i]);
  }
  return true;
}

bool HasNoTrit(const uint8_t* codes, size_t cols) {
  uint8_t found = 0;
  for (size_t col = 0; col < cols; ++col)
    found = static_cast<uint8_t>(found | (codes[col] & (codes[col] >> 1)));
  return (found & 1) != 0;
}

void CheckSize(const TernaryCodec& codec, const char* op, size_t rows, size_t cols, size_t trits,
               size_t bytes) {
  const size_t expected = LayoutBytes(codec.layout, rows, cols);
  Check(bytes == expected, "[", op, "] ", LayoutName(codec.layout), " of ", rows, " x ", cols,
        " takes ", expected, " bytes, got ", bytes);
  Check(trits == rows * cols, "[", op, "] trits are ", rows, " x ", cols, ", got ", trits,
        " values");
}

// One row on its way into a layout.
class RowEncoder {
 public:
  RowEncoder(const TernaryCodec& codec, std::span<const int8_t> trits, size_t rows, size_t cols,
             const Scales& scales)
      : codec_(codec),
        trits_(trits),
        rows_(rows),
        cols_(cols),
        scales_(scales),
        groups_(scales.PerRow(cols)),
        group_cols_(scales.kind == ScaleKind::kGroup ? scales.group_size : cols),
        codes_(cols),
        row_scales_(codec.ScalesPerRow(cols)) {}

  // The error of this row; empty when it can be written.
  std::string Prepare(size_t row) {
    for (size_t col = 0; col < cols_; ++col) {
      const int trit = trits_[row * cols_ + col];
      if (trit < -1 || trit > 1)
        return StrCat("a trit is -1, 0 or 1, got ", trit, " at row ", row, ", column ", col);
      codes_[col] = ScaleAt(row, col) == 0 ? uint8_t{1} : static_cast<uint8_t>(trit + 1);
    }
    for (size_t i = 0; i < row_scales_.size(); ++i) {
      const Range range = ScaleCols(codec_, cols_, i);
      float shared = 0;
      for (size_t col = range.begin; col < range.end;
           col = std::min(range.end, (col / group_cols_ + 1) * group_cols_)) {
        const float scale = ScaleAt(row, col);
        if (shared != 0 && scale != 0 && scale != shared)
          return StrCat("columns ", range.begin, " to ", range.end - 1, " of row ", row,
                        " share one scale in this layout, got ", shared, " and ", scale);
        if (scale != 0) shared = scale;
      }
      if (codec_.half_scales && FloatFromF16(F16FromFloat(shared)) != shared)
        return StrCat("f16 does not hold the scale ", shared, " of row ", row,
                      " exactly: round the scales first and report the error, or take a layout "
                      "with f32 scales");
      if (codec_.binary && std::find(codes_.begin() + static_cast<ptrdiff_t>(range.begin),
                                     codes_.begin() + static_cast<ptrdiff_t>(range.end),
                                     1) != codes_.begin() + static_cast<ptrdiff_t>(range.end)) {
        if (shared != 0) return StrCat("the layout has no 0, got one in row ", row);
        std::fill(codes_.begin() + static_cast<ptrdiff_t>(range.begin),
                  codes_.begin() + static_cast<ptrdiff_t>(range.end), uint8_t{0});
      }
      row_scales_[i] = shared;
    }
    return {};
  }

  float row_scale() const { return row_scales_[0]; }
  void set_row_scale(float scale) { row_scales_[0] = scale; }
  void Write(size_t row, uint8_t* data) const {
    codec_.encode_row(codes_.data(), row_scales_.data(), rows_, cols_, row, data);
  }

 private:
  float ScaleAt(size_t row, size_t col) const {
    switch (scales_.kind) {
      case ScaleKind::kTensor:
        return scales_.effective[0];
      case ScaleKind::kRow:
        return scales_.effective[row];
      default:
        return scales_.effective[row * groups_ + col / group_cols_];
    }
  }

  const TernaryCodec& codec_;
  std::span<const int8_t> trits_;
  size_t rows_, cols_;
  const Scales& scales_;
  size_t groups_, group_cols_;
  std::vector<uint8_t> codes_;
  std::vector<float> row_scales_;
};

// The one scale of a matrix whose layout has no other; throws where there are two.
float TensorScale(const TernaryCodec& codec, const Scales& scales) {
  float shared = 0;
  for (const float scale : scales.effective) {
    if (scale == 0) continue;
    Check(shared == 0 || scale == shared, "[encode_ternary] ", LayoutName(codec.layout),
          ": the matrix shares one scale in this layout, got ", shared, " and ", scale);
    shared = scale;
  }
  return shared;
}

// Whether all scales of `factor` neighbouring blocks are equal, in every row, zeros aside; their
// values go to `merged`.
bool MergeBlocks(std::span<const float> scales, size_t rows, size_t per_row, size_t factor,
                 std::vector<float>& merged) {
  const size_t groups = DivCeil(per_row, factor);
  merged.assign(rows * groups, 0.0f);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t block = 0; block < per_row; ++block) {
      const float scale = scales[row * per_row + block];
      float& group = merged[row * groups + block / factor];
      if (scale == 0) continue;
      if (group != 0 && group != scale) return false;
      group = scale;
    }
  }
  return true;
}

}  // namespace

const TernaryCodec* FindTernaryCodec(Layout layout) {
  for (const TernaryCodec* codec : kCodecs) {
    if (codec->layout == layout) return codec;
  }
  return nullptr;
}

bool DecodeTernaryRow(const TernaryCodec& codec, std::span<const uint8_t> data, size_t rows,
                      size_t cols, size_t row, uint8_t* codes, float* scales) {
  codec.decode_row(data.data(), rows, cols, row, codes, scales);
  return !HasNoTrit(codes, cols) && BringToOneForm(codec, cols, codes, scales);
}

void ThrowUndecodable(const TernaryCodec& codec, std::span<const uint8_t> data, size_t rows,
                      size_t cols, size_t row) {
  std::vector<uint8_t> codes(cols);
  std::vector<float> scales(codec.ScalesPerRow(cols));
  codec.decode_row(data.data(), rows, cols, row, codes.data(), scales.data());
  for (size_t i = 0; i < scales.size(); ++i) {
    if (!std::isfinite(scales[i])) {
      throw FormatError(StrCat("[", LayoutName(codec.layout), "] the scale of row ", row,
                               ", column ", ScaleCols(codec, cols, i).begin, " is ", scales[i],
                               ": the data is damaged or of another layout"));
    }
  }
  const auto col = std::find(codes.begin(), codes.end(), kNoTrit) - codes.begin();
  throw FormatError(StrCat("[", LayoutName(codec.layout), "] no trit at row ", row, ", column ",
                           col, ": ", codec.no_trit));
}

void DecodeTernary(const TernaryCodec& codec, std::span<const uint8_t> data, size_t rows,
                   size_t cols, const Team& team, std::span<int8_t> trits,
                   std::span<float> scales) {
  CheckSize(codec, "decode_ternary", rows, cols, trits.size(), data.size());
  const size_t per_row = codec.ScalesPerRow(cols);
  const bool one_scale = codec.scale_kind == ScaleKind::kTensor;
  Check(scales.size() == (one_scale ? 1 : rows * per_row), "[decode_ternary] expected ",
        one_scale ? 1 : rows * per_row, " scales, got ", scales.size());
  FirstRow failed(rows);
  std::vector<float> tensor_scales(team.threads());
  team.Run([&](Worker& worker) {
    const Range share = worker.Share(rows);
    for (size_t row = share.begin; row < share.end; ++row) {
      auto* codes = reinterpret_cast<uint8_t*>(trits.data() + row * cols);
      float* row_scales = one_scale ? &tensor_scales[worker.index()] : &scales[row * per_row];
      if (!DecodeTernaryRow(codec, data, rows, cols, row, codes, row_scales)) failed.Report(row);
      for (size_t col = 0; col < cols; ++col)
        trits[row * cols + col] = static_cast<int8_t>(codes[col] - 1);
    }
  });
  if (failed.found()) ThrowUndecodable(codec, data, rows, cols, failed.row());
  if (one_scale) scales[0] = tensor_scales[0];
}

void EncodeTernary(const TernaryCodec& codec, std::span<const int8_t> trits, size_t rows,
                   size_t cols, const Scales& scales, const Team& team, std::span<uint8_t> data) {
  CheckSize(codec, "encode_ternary", rows, cols, trits.size(), data.size());
  Check(codec.encode_row != nullptr, "[encode_ternary] ", LayoutName(codec.layout),
        " is only read");
  Check(cols % codec.block_cols == 0, "[encode_ternary] ", LayoutName(codec.layout),
        ": columns must be a multiple of ", codec.block_cols, ", got ", rows, " x ", cols);
  const bool one_scale = codec.scale_kind == ScaleKind::kTensor;
  const float tensor_scale = one_scale ? TensorScale(codec, scales) : 0;
  std::vector<RowEncoder> encoders(team.threads(), RowEncoder(codec, trits, rows, cols, scales));
  FirstRow failed(rows);
  team.Run([&](Worker& worker) {
    RowEncoder& encoder = encoders[worker.index()];
    const Range share = worker.Share(rows);
    for (size_t row = share.begin; row < share.end; ++row) {
      if (!encoder.Prepare(row).empty()) {
        failed.Report(row);
        return;
      }
      if (one_scale) encoder.set_row_scale(tensor_scale);
      encoder.Write(row, data.data());
    }
  });
  if (failed.found()) {
    throw std::invalid_argument(StrCat("[encode_ternary] ", LayoutName(codec.layout), ": ",
                                       encoders[0].Prepare(failed.row())));
  }
}

CollapsedScales CollapseScales(std::span<const float> block_scales, size_t rows, size_t cols,
                               size_t block_cols) {
  Check(rows > 0 && cols > 0 && block_cols > 0, "[collapse_scales] an empty matrix");
  const size_t per_row = DivCeil(cols, block_cols);
  Check(block_scales.size() == rows * per_row, "[collapse_scales] expected ", rows * per_row,
        " scales for ", rows, " x ", cols, ", got ", block_scales.size());
  std::vector<float> merged, coarser;
  if (MergeBlocks(block_scales, 1, rows * per_row, rows * per_row, merged))
    return {ScaleKind::kTensor, 0, std::move(merged)};
  if (MergeBlocks(block_scales, rows, per_row, per_row, merged))
    return {ScaleKind::kRow, 0, std::move(merged)};
  size_t factor = 1;
  merged.assign(block_scales.begin(), block_scales.end());
  while (factor < per_row && MergeBlocks(block_scales, rows, per_row, 2 * factor, coarser)) {
    factor *= 2;
    merged.swap(coarser);
  }
  return {ScaleKind::kGroup, factor * block_cols, std::move(merged)};
}

}  // namespace tf
