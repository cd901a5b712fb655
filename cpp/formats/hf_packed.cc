// SPDX-License-Identifier: Apache-2.0
// Scalar codec of the Hugging Face "bitnet" layout.
#include "formats/hf_packed.h"

#include <algorithm>

#include "base/check.h"

namespace tf {

size_t HfPackedBytes(size_t rows, size_t cols) {
  Check(rows % 4 == 0, "[hf_packed] rows must be a multiple of 4, got ", rows, " x ", cols,
        ": keep such a tensor in floating point");
  return rows / 4 * cols;
}

void HfPack(std::span<const int8_t> trits, size_t rows, size_t cols, std::span<uint8_t> packed) {
  const size_t size = HfPackedBytes(rows, cols);
  Check(trits.size() == rows * cols && packed.size() == size, "[hf_packed] sizes do not match ",
        rows, " x ", cols);
  std::fill(packed.begin(), packed.end(), uint8_t{0});
  const size_t quarter = rows / 4;
  for (size_t row = 0; row < rows; ++row) {
    const size_t shift = 2 * (row / quarter);
    uint8_t* to = packed.data() + (row % quarter) * cols;
    for (size_t col = 0; col < cols; ++col) {
      const int code = trits[row * cols + col] + 1;
      Check(code >= 0 && code <= 2, "[hf_packed] a trit is -1, 0 or 1, got ", code - 1, " at row ",
            row, ", column ", col);
      to[col] = static_cast<uint8_t>(to[col] | (code << shift));
    }
  }
}

void HfUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols, std::span<int8_t> trits) {
  const size_t size = HfPackedBytes(rows, cols);
  Check(trits.size() == rows * cols && packed.size() == size, "[hf_packed] sizes do not match ",
        rows, " x ", cols);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const uint8_t code = HfPackedCode(packed.data(), rows, cols, row, col);
      if (code == 3) {
        throw FormatError(
            StrCat("[hf_packed] the code at row ", row, ", column ", col,
                   " is 3, which stands for no trit: the data is not ternary or is damaged"));
      }
      trits[row * cols + col] = static_cast<int8_t>(code - 1);
    }
  }
}

bool HfPackedIsValid(std::span<const uint8_t> packed) {
  uint8_t invalid = 0;
  for (const uint8_t byte : packed)
    invalid = static_cast<uint8_t>(invalid | (byte & (byte >> 1) & 0x55));
  return invalid == 0;
}

}  // namespace tf
