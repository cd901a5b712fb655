// SPDX-License-Identifier: Apache-2.0
// An output head in 4, 6 or 8 bits a weight: its form, its products, and how far off they can be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "base/parallel.h"
#include "formats/packed_tensor.h"

namespace tf {

inline constexpr size_t kHeadPanelRows = 16;

// Columns that share a scale.
constexpr size_t HeadGroupCols(size_t bits) { return bits == 6 ? 16 : 32; }
// Bytes of one group of all rows of a panel.
constexpr size_t HeadGroupBytes(size_t bits) {
  return kHeadPanelRows * HeadGroupCols(bits) * bits / 8;
}

// Of a head of this shape: codes, group scales, row scales and the two norms of each row.
constexpr size_t QuantizedHeadBytes(size_t rows, size_t cols, size_t bits) {
  const size_t panels = DivCeil(rows, kHeadPanelRows), groups = DivCeil(cols, HeadGroupCols(bits));
  return panels * groups * (HeadGroupBytes(bits) + kHeadPanelRows) +
         panels * kHeadPanelRows * 3 * sizeof(float);
}

// weight[r, c] is about
//
//   row_scale[r] * group_scale[r, g] * (code[r, c] - (2^bits - 1) / 2),   g = c / HeadGroupCols
//
// with codes 0 .. 2^bits - 1, group scales 0 .. 255 and row scales of eight significant bits, so
// that this value is an exact float. Rows lie in panels of 16, a panel group after group (cols
// rounded up to whole groups). A step is four columns of 16 rows, byte 4 r + j for row r, column j:
//
//   bits  a group's bytes
//   8     8 x 64: step after step
//   4     4 x 64: step 2 v in the low, step 2 v + 1 in the high nibbles of vector v
//   6     3 x 64: the low nibbles of steps 0 .. 3 as above, then bits 4 and 5 of step n in bits 2 n
//         and 2 n + 1 of the third
class QuantizedHead {
 public:
  QuantizedHead() = default;
  // Of a f32, f16 or bf16 matrix, in parallel. Scales are searched for the least squared error. A
  // row with a value that is not finite throws std::invalid_argument.
  QuantizedHead(const PackedTensor& weight, size_t bits, const Team& team);

  bool empty() const { return rows_ == 0; }
  size_t rows() const { return rows_; }
  size_t cols() const { return cols_; }
  size_t bits() const { return bits_; }
  size_t groups() const { return DivCeil(cols_, HeadGroupCols(bits_)); }
  size_t panels() const { return DivCeil(rows_, kHeadPanelRows); }
  size_t bytes() const { return empty() ? 0 : QuantizedHeadBytes(rows_, cols_, bits_); }

  const uint8_t* codes() const { return codes_.data(); }
  const uint8_t* group_scales() const { return group_scales_.data(); }  // panel, group, row
  const float* row_scales() const { return row_scales_.data(); }
  // Not less than the Euclidean norms of the row as quantized, and of what quantization took away.
  const float* norms() const { return norms_.data(); }
  const float* residuals() const { return residuals_.data(); }
  float largest_row_scale() const { return largest_row_scale_; }

  // Row `row` as it is multiplied: cols floats.
  void CopyRow(size_t row, float* out) const;

 private:
  size_t rows_ = 0;
  size_t cols_ = 0;
  size_t bits_ = 0;
  AlignedArray<uint8_t> codes_;
  AlignedArray<uint8_t> group_scales_;
  AlignedArray<float> row_scales_, norms_, residuals_;
  float largest_row_scale_ = 0;
};

// Activations of 15 bits: x[i] is about scale * (128 * high[i] + low[i]), high -127 .. 127, low -64
// .. 63, zeros behind the last column.
class HeadActs {
 public:
  HeadActs(size_t max_tokens, const QuantizedHead& head);

  // scale = max|x| / 16319, codes rounded to nearest even. False where a value is not finite: the
  // token's products are NaN then.
  bool Quantize(const float* x, size_t token);

  const int8_t* high(size_t token) const { return high_.data() + token * stride_; }
  const int8_t* low(size_t token) const { return low_.data() + token * stride_; }
  // -(2^bits - 1) / 2 times the sum of each group's codes: exact up to 6 bits.
  const float* offsets(size_t token) const { return offsets_.data() + token * groups_; }
  float scale(size_t token) const { return scales_[token]; }
  // Not less than the Euclidean norm of the token, and of what quantization took away.
  double norm(size_t token) const { return norms_[token]; }
  double residual(size_t token) const { return residuals_[token]; }

 private:
  size_t cols_, groups_, group_cols_, stride_;
  float center_;
  AlignedArray<int8_t> high_, low_;
  AlignedArray<float> offsets_, scales_;
  AlignedArray<double> norms_, residuals_;
};

// out[t * out_stride + row] = <row, token t> for the rows of panels panel_begin .. panel_end - 1
// that exist. Integer sums of a group are exact; groups are added in their order in f32.
void HeadProducts(const QuantizedHead& head, const HeadActs& acts, size_t tokens,
                  size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

// Upper bounds, instead, of what DenseLinear gives for the matrix that `head` was made of, at the
// tokens, at most kMaxBoundTokens, that `acts` was made of: docs/design/0009-head.md has the proof.
// Of 4 or 6 bits.
inline constexpr size_t kMaxBoundTokens = 16;
void HeadUpperBounds(const QuantizedHead& head, const HeadActs& acts, size_t tokens,
                     size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

}  // namespace tf
