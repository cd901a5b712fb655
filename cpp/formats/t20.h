// SPDX-License-Identifier: Apache-2.0
// T20, the dense run-time layout of ternary matrices: tiles of 16 rows x 20 columns in 64 bytes,
// five trits a byte (1.6 bits a weight).
//
//   byte   4 * (row % 16) + j of tile t, j = 0 .. 3
//   value  sum over planes n = 0 .. 4 of (trit + 1) * 3^n
//   plane n of tile t holds the columns begin + n * plane_cols + 4 t + j
//
// A segment is `plane_cols / 4` tiles with one `begin`: each plane runs through its own fifth of
// the segment's columns. Without groups a panel of 16 rows is one segment, whose planes are padded
// with trit 0 to a multiple of four columns. With groups of g columns every five whole groups are a
// segment of g / 4 tiles, one group a plane, so that a plane's sum is a group's sum; the columns
// that are left (fewer than six groups) follow in T16 tiles (formats/t16.h). Panels follow each
// other; padding rows hold trit 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned.h"
#include "formats/t16.h"

namespace tf {

inline constexpr size_t kT20Planes = 5;
inline constexpr uint8_t kT20Zeros = 121;  // five trits of 0: 1 + 3 + 9 + 27 + 81
inline constexpr int kT20Codes = 243;
inline constexpr int kT20Powers[kT20Planes] = {1, 3, 9, 27, 81};

// Where the columns of one panel lie. group_size: 0 without groups, else a multiple of 64.
struct T20Shape {
  constexpr T20Shape(size_t cols_, size_t group_size)
      : cols(cols_),
        plane_cols(group_size != 0 ? group_size : 4 * DivCeil(cols, 4 * kT20Planes)),
        segments(group_size != 0 ? cols / group_size / kT20Planes : 1),
        tail_begin(group_size != 0 ? segments * kT20Planes * group_size : cols) {}

  constexpr size_t SegmentTiles() const { return plane_cols / 4; }
  constexpr size_t TailBegin() const { return segments * SegmentTiles() * kTileBytes; }
  constexpr size_t PanelBytes() const {
    return TailBegin() + T16TilesPerPanel(cols - tail_begin) * kTileBytes;
  }

  size_t cols;
  size_t plane_cols;
  size_t segments;
  size_t tail_begin;  // the first column in T16 tiles; `cols` where there is none
};

constexpr size_t T20Bytes(size_t rows, size_t cols, size_t group_size) {
  return PanelCount(rows) * T20Shape(cols, group_size).PanelBytes();
}

// Packs row-major trits [rows, cols]. Throws std::invalid_argument for values other than -1, 0, +1.
void T20Pack(std::span<const int8_t> trits, size_t rows, size_t cols, size_t group_size,
             std::span<uint8_t> tiles);

// The inverse; padding is not looked at. Throws FormatError where a byte is no code.
void T20Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, size_t group_size,
               std::span<int8_t> trits);

}  // namespace tf
