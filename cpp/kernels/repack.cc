// SPDX-License-Identifier: Apache-2.0
// Repacking at load; see repack.h.
#include "kernels/repack.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "formats/hf_packed.h"
#include "formats/t16.h"

namespace tf {
namespace {

// One row of 16 columns: the four 32-bit words of codes become the four bit planes of one word.
uint32_t InterleavePlanes(const uint8_t* codes, size_t shift) {
  uint32_t words[4];
  std::memcpy(words, codes, sizeof(words));
  uint32_t result = 0;
  for (size_t plane = 0; plane < 4; ++plane) {
    result |= ((words[plane] >> shift) & 0x03030303u) << (2 * plane);
  }
  return result;
}

void RepackPanel(const PackedTensor& weight, size_t panel, uint8_t* tiles) {
  const size_t cols = weight.cols(), quarter = weight.rows() / 4;
  const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
  const size_t whole_tiles = cols / kT16TileCols;
  std::memset(tiles, kT16Zeros, T16PanelBytes(cols));
  for (size_t row = 0; row < rows; ++row) {
    const size_t from_row = panel * kPanelRows + row;
    const uint8_t* from = weight.bytes().data() + from_row % quarter * cols;
    const size_t shift = 2 * (from_row / quarter);
    uint8_t* to = tiles + 4 * row;
    for (size_t tile = 0; tile < whole_tiles; ++tile) {
      const uint32_t word = InterleavePlanes(from + tile * kT16TileCols, shift);
      std::memcpy(to + tile * kTileBytes, &word, sizeof(word));
    }
    if (cols % kT16TileCols != 0) {
      uint8_t rest[kT16TileCols];
      std::memset(rest, 0x55, sizeof(rest));  // code 1 in every quarter
      std::memcpy(rest, from + whole_tiles * kT16TileCols, cols % kT16TileCols);
      const uint32_t word = InterleavePlanes(rest, shift);
      std::memcpy(to + whole_tiles * kTileBytes, &word, sizeof(word));
    }
  }
}

}  // namespace

PackedTensor RepackT16(const PackedTensor& weight, const Team& team) {
  if (weight.layout() == Layout::kT16) return weight;
  Check(weight.layout() == Layout::kHfPacked, "[repack] only hf_packed can become t16, got ",
        LayoutName(weight.layout()));
  if (!HfPackedIsValid(weight.bytes())) {
    throw FormatError(
        "[repack] a code is 3, which stands for no trit: the data is not ternary or is damaged");
  }
  uint8_t* tiles = nullptr;
  PackedTensor result =
      PackedTensor::Allocate(Layout::kT16, weight.rows(), weight.cols(), weight.scales(), &tiles);
  team.Run([&](Worker& worker) {
    const Range panels = worker.Share(PanelCount(weight.rows()));
    for (size_t panel = panels.begin; panel < panels.end; ++panel) {
      RepackPanel(weight, panel, tiles + panel * T16PanelBytes(weight.cols()));
    }
  });
  return result;
}

}  // namespace tf
