// SPDX-License-Identifier: Apache-2.0
// The ternary layout of Hugging Face "bitnet" checkpoints: uint8 [rows / 4, cols], four row blocks
// in one byte.
//
//   bits 1-0  row r                 code = trit + 1: 0, 1, 2 (3 is invalid)
//   bits 3-2  row r + rows / 4
//   bits 5-4  row r + rows / 2
//   bits 7-6  row r + 3 * rows / 4
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tf {

// Bytes of a packed matrix. Throws std::invalid_argument unless rows is a multiple of 4.
size_t HfPackedBytes(size_t rows, size_t cols);

// The code (0, 1, 2 or the invalid 3) of one weight.
inline uint8_t HfPackedCode(const uint8_t* packed, size_t rows, size_t cols, size_t row,
                            size_t col) {
  const size_t quarter = rows / 4;
  return (packed[(row % quarter) * cols + col] >> (2 * (row / quarter))) & 3;
}

// Packs row-major trits [rows, cols] of -1, 0, +1. Throws std::invalid_argument for any other
// value.
void HfPack(std::span<const int8_t> trits, size_t rows, size_t cols, std::span<uint8_t> packed);

// The inverse. Throws FormatError where a code is 3.
void HfUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols, std::span<int8_t> trits);

// Whether no weight has the invalid code 3.
bool HfPackedIsValid(std::span<const uint8_t> packed);

}  // namespace tf
