// SPDX-License-Identifier: Apache-2.0
// Scalar codec of the T16 tiles.
#include "formats/t16.h"

#include <algorithm>

#include "base/check.h"

namespace tf {

void T16Pack(std::span<const int8_t> trits, size_t rows, size_t cols, std::span<uint8_t> tiles) {
  Check(trits.size() == rows * cols && tiles.size() == T16Bytes(rows, cols),
        "[t16] sizes do not match ", rows, " x ", cols);
  std::fill(tiles.begin(), tiles.end(), kT16Zeros);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int code = trits[row * cols + col] + 1;
      Check(code >= 0 && code <= 2, "[t16] a trit is -1, 0 or 1, got ", code - 1, " at row ", row,
            ", column ", col);
      uint8_t& byte = tiles[T16Byte(cols, row, col)];
      const size_t shift = T16Shift(col);
      byte = static_cast<uint8_t>((byte & ~(3 << shift)) | (code << shift));
    }
  }
}

void T16Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, std::span<int8_t> trits) {
  Check(trits.size() == rows * cols && tiles.size() == T16Bytes(rows, cols),
        "[t16] sizes do not match ", rows, " x ", cols);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int code = (tiles[T16Byte(cols, row, col)] >> T16Shift(col)) & 3;
      if (code == 3)
        throw FormatError(StrCat("[t16] invalid code 3 at row ", row, ", column ", col));
      trits[row * cols + col] = static_cast<int8_t>(code - 1);
    }
  }
}

}  // namespace tf
