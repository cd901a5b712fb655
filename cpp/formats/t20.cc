// SPDX-License-Identifier: Apache-2.0
// Scalar codec of the T20 tiles.
#include "formats/t20.h"

#include <algorithm>

#include "base/check.h"

namespace tf {
namespace {

// The byte that holds one element, and its plane; plane kT20Planes stands for a T16 tile.
struct Place {
  size_t byte;
  size_t plane;
};

Place PlaceOf(const T20Shape& shape, size_t row, size_t col) {
  const size_t panel = row / kPanelRows * shape.PanelBytes();
  if (col >= shape.tail_begin) {
    const size_t tail_cols = shape.cols - shape.tail_begin;
    return {
        panel + shape.TailBegin() + T16Byte(tail_cols, row % kPanelRows, col - shape.tail_begin),
        kT20Planes};
  }
  const size_t in_plane = col % shape.plane_cols;
  const size_t segment = col / shape.plane_cols / kT20Planes;
  const size_t tile = segment * shape.SegmentTiles() + in_plane / 4;
  return {panel + tile * kTileBytes + 4 * (row % kPanelRows) + in_plane % 4,
          col / shape.plane_cols % kT20Planes};
}

void FillZeros(const T20Shape& shape, std::span<uint8_t> tiles) {
  for (size_t panel = 0; panel < tiles.size(); panel += shape.PanelBytes()) {
    const auto begin = tiles.begin() + static_cast<std::ptrdiff_t>(panel);
    const auto tail = begin + static_cast<std::ptrdiff_t>(shape.TailBegin());
    std::fill(begin, tail, kT20Zeros);
    std::fill(tail, begin + static_cast<std::ptrdiff_t>(shape.PanelBytes()), kT16Zeros);
  }
}

}  // namespace

void T20Pack(std::span<const int8_t> trits, size_t rows, size_t cols, size_t group_size,
             std::span<uint8_t> tiles) {
  Check(trits.size() == rows * cols && tiles.size() == T20Bytes(rows, cols, group_size),
        "[t20] sizes do not match ", rows, " x ", cols);
  const T20Shape shape(cols, group_size);
  FillZeros(shape, tiles);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const int trit = trits[row * cols + col];
      Check(trit >= -1 && trit <= 1, "[t20] a trit is -1, 0 or 1, got ", trit, " at row ", row,
            ", column ", col);
      const Place place = PlaceOf(shape, row, col);
      // Every element changes its byte once, and zeros are there already.
      const int step = place.plane == kT20Planes ? 1 << T16Shift(col - shape.tail_begin)
                                                 : kT20Powers[place.plane];
      tiles[place.byte] = static_cast<uint8_t>(tiles[place.byte] + trit * step);
    }
  }
}

void T20Unpack(std::span<const uint8_t> tiles, size_t rows, size_t cols, size_t group_size,
               std::span<int8_t> trits) {
  Check(trits.size() == rows * cols && tiles.size() == T20Bytes(rows, cols, group_size),
        "[t20] sizes do not match ", rows, " x ", cols);
  const T20Shape shape(cols, group_size);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t col = 0; col < cols; ++col) {
      const Place place = PlaceOf(shape, row, col);
      const int byte = tiles[place.byte];
      const bool in_tail = place.plane == kT20Planes;
      const int code = in_tail ? (byte >> T16Shift(col - shape.tail_begin)) & 3
                               : byte / kT20Powers[place.plane] % 3;
      if (in_tail ? code == 3 : byte >= kT20Codes) {
        throw FormatError(StrCat("[t20] invalid code ", in_tail ? code : byte, " at row ", row,
                                 ", column ", col));
      }
      trits[row * cols + col] = static_cast<int8_t>(code - 1);
    }
  }
}

}  // namespace tf
