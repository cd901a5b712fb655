// SPDX-License-Identifier: Apache-2.0
// T8, the run-time layout of two tied trit planes: tiles of 16 rows x 8 columns in 64 bytes (4 bits
// a weight), panel after panel.
//
//   tile(R, C), R = row / 16, C = col / 8, at byte (R * tiles_per_panel + C) * 64
//   byte  4 * (row % 16) + col % 4
//   bits  4 * ((col / 4) % 2) .. + 3     columns 8 C .. + 3 in the low, 8 C + 4 .. + 7 in the high
//   code  level + 4 = 3 * (first trit + 1) + (second trit + 1), 0 .. 8
//
// As in T16 (formats/t16.h), half a tile is one operand of a byte dot product whose 32-bit lane r
// belongs to row r. Padding rows and columns hold code 4 (level 0).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned.h"
#include "formats/t16.h"

namespace tf {

inline constexpr size_t kT8TileCols = 8;
inline constexpr uint8_t kT8Zeros = 0x44;  // two codes of level 0
inline constexpr int kT8Bias = 4;          // code - level
inline constexpr int kT8MaxCode = 8;

constexpr size_t T8TilesPerPanel(size_t cols) { return DivCeil(cols, kT8TileCols); }
constexpr size_t T8PanelBytes(size_t cols) { return T8TilesPerPanel(cols) * kTileBytes; }
constexpr size_t T8Bytes(size_t rows, size_t cols) { return PanelCount(rows) * T8PanelBytes(cols); }

// The byte of a tiled matrix that holds (row, col), and the shift of its four bits within it.
constexpr size_t T8Byte(size_t cols, size_t row, size_t col) {
  return (row / 16) * T8PanelBytes(cols) + (col / 8) * kTileBytes + 4 * (row % 16) + col % 4;
}
constexpr size_t T8Shift(size_t col) { return 4 * (col / 4 % 2); }

// Packs row-major levels [rows, cols]. Throws std::invalid_argument for values outside of -4 .. 4.
void T8Pack(std::span<const int8_t> levels, size_t rows, size_t cols, std::span<uint8_t> tiles);

// The inverse; padding is not looked at. Throws FormatError where a code is above 8.
void T8Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, std::span<int8_t> levels);

}  // namespace tf
