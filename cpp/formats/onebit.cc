// SPDX-License-Identifier: Apache-2.0
// Scalar codec of the packed modes of .1bit files.
#include "formats/onebit.h"

#include <algorithm>

#include "base/check.h"

namespace tf {
namespace {

// Columns in a byte, and what a trit is in their bits; kNoCode: the mode has none for it.
constexpr uint8_t kNoCode = 0xFF;

struct Mode {
  size_t per_byte;
  const char* name;
  uint8_t codes[3];  // of -1, 0, +1
};

constexpr Mode kTernary = {4, "onebit", {3, 0, 1}};
constexpr Mode kBinary = {8, "onebit_binary", {0, kNoCode, 1}};

void CheckSizes(const Mode& mode, size_t trits, size_t bytes, size_t rows, size_t cols) {
  Check(trits == rows * cols && bytes == rows * DivCeil(cols, mode.per_byte), "[", mode.name,
        "] sizes do not match ", rows, " x ", cols);
}

void Pack(const Mode& mode, std::span<const int8_t> trits, size_t rows, size_t cols,
          std::span<uint8_t> packed) {
  CheckSizes(mode, trits.size(), packed.size(), rows, cols);
  std::fill(packed.begin(), packed.end(), uint8_t{0});
  const size_t bits = 8 / mode.per_byte, row_bytes = DivCeil(cols, mode.per_byte);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int trit = trits[row * cols + col];
      Check(trit >= -1 && trit <= 1 && mode.codes[trit + 1] != kNoCode, "[", mode.name,
            "] a weight is ", mode.per_byte == 4 ? "-1, 0 or 1" : "-1 or 1", ", got ", trit,
            " at row ", row, ", column ", col);
      uint8_t& byte = packed[row * row_bytes + col / mode.per_byte];
      byte = static_cast<uint8_t>(byte | mode.codes[trit + 1] << bits * (col % mode.per_byte));
    }
  }
}

void Unpack(const Mode& mode, std::span<const uint8_t> packed, size_t rows, size_t cols,
            std::span<int8_t> trits) {
  CheckSizes(mode, trits.size(), packed.size(), rows, cols);
  const size_t bits = 8 / mode.per_byte, row_bytes = DivCeil(cols, mode.per_byte);
  const int mask = (1 << bits) - 1;
  for (size_t row = 0; row < rows; ++row) {
    const uint8_t* bytes = packed.data() + row * row_bytes;
    for (size_t col = 0; col < row_bytes * mode.per_byte; ++col) {
      const int code = bytes[col / mode.per_byte] >> bits * (col % mode.per_byte) & mask;
      if (col >= cols ? code != 0 : code == 2) {
        throw FormatError(StrCat("[", mode.name, "] the code at row ", row, ", column ", col,
                                 " is ", code, col >= cols ? ", behind the last column" : "",
                                 ": the data is damaged"));
      }
      if (col >= cols) continue;
      const auto* found = std::find(mode.codes, mode.codes + 3, static_cast<uint8_t>(code));
      trits[row * cols + col] = static_cast<int8_t>(found - mode.codes - 1);
    }
  }
}

}  // namespace

void OnebitTernaryPack(std::span<const int8_t> trits, size_t rows, size_t cols,
                       std::span<uint8_t> packed) {
  Pack(kTernary, trits, rows, cols, packed);
}

void OnebitBinaryPack(std::span<const int8_t> trits, size_t rows, size_t cols,
                      std::span<uint8_t> packed) {
  Pack(kBinary, trits, rows, cols, packed);
}

void OnebitTernaryUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                         std::span<int8_t> trits) {
  Unpack(kTernary, packed, rows, cols, trits);
}

void OnebitBinaryUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                        std::span<int8_t> trits) {
  Unpack(kBinary, packed, rows, cols, trits);
}

}  // namespace tf
