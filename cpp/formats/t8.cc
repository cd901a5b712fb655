// SPDX-License-Identifier: Apache-2.0
// Scalar codec of the T8 tiles.
#include "formats/t8.h"

#include <algorithm>

#include "base/check.h"

namespace tf {

void T8Pack(std::span<const int8_t> levels, size_t rows, size_t cols, std::span<uint8_t> tiles) {
  Check(levels.size() == rows * cols && tiles.size() == T8Bytes(rows, cols),
        "[t8] sizes do not match ", rows, " x ", cols);
  std::ranges::fill(tiles, kT8Zeros);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int code = levels[row * cols + col] + kT8Bias;
      Check(code >= 0 && code <= kT8MaxCode, "[t8] a level lies in -4 .. 4, got ", code - kT8Bias,
            " at row ", row, ", column ", col);
      uint8_t& byte = tiles[T8Byte(cols, row, col)];
      const size_t shift = T8Shift(col);
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (code << shift));
    }
  }
}

void T8Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, std::span<int8_t> levels) {
  Check(levels.size() == rows * cols && tiles.size() == T8Bytes(rows, cols),
        "[t8] sizes do not match ", rows, " x ", cols);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int code = tiles[T8Byte(cols, row, col)] >> T8Shift(col) & 15;
      if (code > kT8MaxCode) {
        throw FormatError(StrCat("[t8] the code at row ", row, ", column ", col, " is ", code,
                                 ", above 8: the data is not nine levels or is damaged"));
      }
      levels[row * cols + col] = static_cast<int8_t>(code - kT8Bias);
    }
  }
}

}  // namespace tf
