// SPDX-License-Identifier: Apache-2.0
// The file layout of two tied trit planes: uint8 [2, rows / 4, cols], each plane as in
// formats/hf_packed.h (4 bits a weight).
//
//   level = 3 * first + second for the trits of the two planes: every level -4 .. 4 in one way
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tf {

// Bytes of both planes. Throws std::invalid_argument unless rows is a multiple of 4.
size_t TwoPlaneBytes(size_t rows, size_t cols);

// Packs row-major levels [rows, cols]. Throws std::invalid_argument for values outside of -4 .. 4.
void TwoPlanePack(std::span<const int8_t> levels, size_t rows, size_t cols,
                  std::span<uint8_t> packed);

// The inverse. Throws FormatError where a code is 3, which stands for no trit.
void TwoPlaneUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                    std::span<int8_t> levels);

}  // namespace tf
