// SPDX-License-Identifier: Apache-2.0
// T16, the run-time layout of ternary matrices: tiles of 16 rows x 16 columns in 64 bytes, panel
// after panel.
//
//   tile(R, C), R = row / 16, C = col / 16, at byte (R * tiles_per_panel + C) * 64
//   byte  4 * (row % 16) + col % 4
//   bits  2 * ((col / 4) % 4) .. + 1     plane n holds columns 16 C + 4 n .. 16 C + 4 n + 3
//   code  trit + 1
//
// One plane of one tile, masked, is a vector whose 32-bit lane r holds four neighbouring columns of
// row r: the operand of vpdpbusd and sdot. Result lane r belongs to row r, so no horizontal sum is
// ever needed. Padding rows and columns hold code 1 (trit 0).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned.h"

namespace tf {

inline constexpr size_t kPanelRows = 16;
inline constexpr size_t kT16TileCols = 16;
inline constexpr size_t kTileBytes = 64;
inline constexpr uint8_t kT16Zeros = 0x55;  // four codes of trit 0

constexpr size_t PanelCount(size_t rows) { return DivCeil(rows, kPanelRows); }
constexpr size_t T16TilesPerPanel(size_t cols) { return DivCeil(cols, kT16TileCols); }
constexpr size_t T16PanelBytes(size_t cols) { return T16TilesPerPanel(cols) * kTileBytes; }
constexpr size_t T16Bytes(size_t rows, size_t cols) {
  return PanelCount(rows) * T16PanelBytes(cols);
}

// The byte of a tiled matrix that holds (row, col), and the shift of its two bits within it.
constexpr size_t T16Byte(size_t cols, size_t row, size_t col) {
  return (row / 16) * T16PanelBytes(cols) + (col / 16) * kTileBytes + 4 * (row % 16) + col % 4;
}
constexpr size_t T16Shift(size_t col) { return 2 * (col / 4 % 4); }

// Packs row-major trits [rows, cols]. Throws std::invalid_argument for values other than -1, 0, +1.
void T16Pack(std::span<const int8_t> trits, size_t rows, size_t cols, std::span<uint8_t> tiles);

// The inverse; padding is not looked at. Throws FormatError where a code is 3.
void T16Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, std::span<int8_t> trits);

}  // namespace tf
