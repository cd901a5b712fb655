// SPDX-License-Identifier: Apache-2.0
// The two packed modes of .1bit files (docs/reference/onebit.md): rows one after the other, each
// padded with zero bits to whole bytes, the first column in the lowest bits.
//
//   ternary  column c of a row: byte c / 4, bits 2 * (c % 4) .. + 1   00 = 0, 01 = +1, 11 = -1
//   binary   column c of a row: byte c / 8, bit c % 8                 0 = -1, 1 = +1
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned.h"

namespace tf {

constexpr size_t OnebitTernaryBytes(size_t rows, size_t cols) { return rows * DivCeil(cols, 4); }
constexpr size_t OnebitBinaryBytes(size_t rows, size_t cols) { return rows * DivCeil(cols, 8); }

// Packs row-major trits [rows, cols]. Throws std::invalid_argument for values other than -1, 0, +1;
// binary mode also for 0.
void OnebitTernaryPack(std::span<const int8_t> trits, size_t rows, size_t cols,
                       std::span<uint8_t> packed);
void OnebitBinaryPack(std::span<const int8_t> trits, size_t rows, size_t cols,
                      std::span<uint8_t> packed);

// The inverse. Throws FormatError for the code 10, and for padding bits that are set.
void OnebitTernaryUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                         std::span<int8_t> trits);
void OnebitBinaryUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                        std::span<int8_t> trits);

}  // namespace tf
