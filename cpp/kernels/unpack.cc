// SPDX-License-Identifier: Apache-2.0
// Codes of one row, tile by tile; see unpack.h.
#include "kernels/unpack.h"

#include <algorithm>

#include "formats/t16.h"
#include "formats/t8.h"

namespace tf {

void CopyTernaryRow(const PackedTensor& weight, size_t row, float* out) {
  const size_t cols = weight.cols();
  const Scales& scales = weight.scales();
  const size_t group_cols = scales.kind == ScaleKind::kGroup ? scales.group_size : cols;
  const uint8_t* tiles = weight.bytes().data();
  const bool two_planes = weight.layout() == Layout::kT8;
  for (size_t begin = 0; begin < cols; begin += group_cols) {
    const float scale = weight.ScaleAt(row, begin / group_cols);
    for (size_t col = begin; col < std::min(begin + group_cols, cols); ++col) {
      const int level = two_planes ? (tiles[T8Byte(cols, row, col)] >> T8Shift(col) & 15) - kT8Bias
                                   : (tiles[T16Byte(cols, row, col)] >> T16Shift(col) & 3) - 1;
      out[col] = static_cast<float>(level) * scale;
    }
  }
}

}  // namespace tf
