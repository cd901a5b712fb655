// SPDX-License-Identifier: Apache-2.0
// Repacking at load; see repack.h.
#include "kernels/repack.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "base/check.h"
#include "formats/hf_packed.h"
#include "formats/t16.h"
#include "formats/t20.h"
#include "formats/t8.h"
#include "formats/ternary_codec.h"

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

// The codes [cols] of one row into the tiles of its panel.
void PutRow(const uint8_t* codes, size_t cols, size_t row, uint8_t* tiles) {
  const size_t whole_tiles = cols / kT16TileCols;
  uint8_t* to = tiles + 4 * row;
  for (size_t tile = 0; tile < whole_tiles; ++tile) {
    const uint32_t word = InterleavePlanes(codes + tile * kT16TileCols, 0);
    std::memcpy(to + tile * kTileBytes, &word, sizeof(word));
  }
  if (cols % kT16TileCols != 0) {
    uint8_t rest[kT16TileCols];
    std::memset(rest, 1, sizeof(rest));
    std::memcpy(rest, codes + whole_tiles * kT16TileCols, cols % kT16TileCols);
    const uint32_t word = InterleavePlanes(rest, 0);
    std::memcpy(to + whole_tiles * kTileBytes, &word, sizeof(word));
  }
}

// A row of two planes into the tiles of its panel. first, second: the bytes that hold its codes,
// each `shift` bits up; a code of the tile is 3 * first + second.
void PutTwoPlaneRow(const uint8_t* first, const uint8_t* second, size_t shift, size_t cols,
                    uint8_t* to) {
  for (size_t col = 0; col < cols; ++col) {
    const int code = 3 * (first[col] >> shift & 3) + (second[col] >> shift & 3);
    uint8_t& byte = to[col / kT8TileCols * kTileBytes + col % 4];
    const size_t place = T8Shift(col);
    byte = static_cast<uint8_t>((byte & ~(15 << place)) | (code << place));
  }
}

// The scales of a file as run-time scales, times `factor`.
Scales RuntimeScales(const TernaryCodec& codec, std::span<const float> stored, size_t rows,
                     size_t cols, float factor) {
  const size_t unit = codec.scale_kind == ScaleKind::kGroup ? codec.block_cols : cols;
  CollapsedScales collapsed = CollapseScales(stored, rows, cols, unit);
  Check(collapsed.kind != ScaleKind::kGroup || collapsed.group_size % kChunkCols == 0, "[repack] ",
        LayoutName(codec.layout), " has one scale per ", codec.block_cols,
        " columns and neighbours differ; run-time tiles take groups of ", kChunkCols,
        " columns at least: use the tensor as dense");
  for (float& value : collapsed.values) value *= factor;
  return MakeScales(collapsed.kind, collapsed.group_size, ScaleConvention::kMultiply,
                    std::move(collapsed.values), rows, cols);
}

PackedTensor RepackFileLayout(const TernaryCodec& codec, const PackedTensor& weight,
                              const Team& team) {
  const size_t rows = weight.rows(), cols = weight.cols();
  const size_t per_row = codec.ScalesPerRow(cols);
  std::vector<float> scales(rows * per_row);
  AlignedArray<uint8_t> tiles(T16Bytes(rows, cols));
  AlignedArray<uint8_t> codes(team.threads() * RoundUp(cols, kAlignment));
  std::atomic<size_t> bad_row = rows;
  team.Run([&](Worker& worker) {
    uint8_t* row_codes = codes.data() + worker.index() * RoundUp(cols, kAlignment);
    const Range panels = worker.Share(PanelCount(rows));
    for (size_t panel = panels.begin; panel < panels.end; ++panel) {
      uint8_t* panel_tiles = tiles.data() + panel * T16PanelBytes(cols);
      std::memset(panel_tiles, kT16Zeros, T16PanelBytes(cols));
      const size_t begin = panel * kPanelRows, end = std::min(rows, begin + kPanelRows);
      for (size_t row = begin; row < end; ++row) {
        if (!DecodeTernaryRow(codec, weight.bytes(), rows, cols, row, row_codes,
                              &scales[row * per_row])) {
          bad_row = row;
          return;
        }
        PutRow(row_codes, cols, row - begin, panel_tiles);
      }
    }
  });
  if (bad_row < rows) ThrowUndecodable(codec, weight.bytes(), rows, cols, bad_row);
  const float factor =
      weight.scales().kind == ScaleKind::kTensor ? weight.scales().effective[0] : 1.0f;
  Scales runtime = RuntimeScales(codec, scales, rows, cols, factor);
  auto owner = std::make_shared<AlignedArray<uint8_t>>(std::move(tiles));
  const std::span<const uint8_t> bytes = std::as_const(*owner).span();
  return PackedTensor(Layout::kT16, rows, cols, bytes, std::move(owner), std::move(runtime));
}

// Eight codes of one plane at a time; the words of five planes, times their powers of 3, add up to
// at most 242 a byte.
uint64_t PlaneWord(const uint8_t* tiles, size_t step, size_t word) {
  uint64_t bytes;
  std::memcpy(&bytes, tiles + step / 4 * kTileBytes + word * sizeof(bytes), sizeof(bytes));
  return (bytes >> (2 * (step % 4))) & 0x0303030303030303u;
}

// `from`: the T16 tiles of a panel; `to`: its T20 tiles.
void RetilePanel(const T20Shape& shape, const uint8_t* from, uint8_t* to) {
  constexpr size_t kWords = kTileBytes / sizeof(uint64_t);
  constexpr uint64_t kOnes = 0x0101010101010101u;
  const size_t steps = 4 * T16TilesPerPanel(shape.cols);  // of four columns
  for (size_t segment = 0; segment < shape.segments; ++segment) {
    for (size_t tile = 0; tile < shape.SegmentTiles(); ++tile, to += kTileBytes) {
      for (size_t word = 0; word < kWords; ++word) {
        uint64_t bytes = 0;
        for (size_t plane = 0; plane < kT20Planes; ++plane) {
          const size_t step = (segment * kT20Planes + plane) * shape.plane_cols / 4 + tile;
          const uint64_t codes = step < steps ? PlaneWord(from, step, word) : kOnes;
          bytes += codes * static_cast<uint64_t>(kT20Powers[plane]);
        }
        std::memcpy(to + word * sizeof(bytes), &bytes, sizeof(bytes));
      }
    }
  }
  const size_t tail_tile = shape.tail_begin / kT16TileCols;  // a whole number of tiles, or no tail
  if (shape.tail_begin < shape.cols)
    std::memcpy(to, from + tail_tile * kTileBytes, T16PanelBytes(shape.cols - shape.tail_begin));
}

void CheckTrits(std::span<const uint8_t> codes) {
  if (HfPackedIsValid(codes)) return;
  throw FormatError(
      "[repack] a code is 3, which stands for no trit: the data is not ternary or is damaged");
}

}  // namespace

PackedTensor RepackT8(const PackedTensor& weight, const Team& team) {
  if (weight.layout() == Layout::kT8) return weight;
  Check(weight.layout() == Layout::kTwoPlane, "[repack] only two_plane can become t8, got ",
        LayoutName(weight.layout()));
  CheckTrits(weight.bytes());
  const size_t rows = weight.rows(), cols = weight.cols(), quarter = rows / 4;
  uint8_t* tiles = nullptr;
  PackedTensor result = PackedTensor::Allocate(Layout::kT8, rows, cols, weight.scales(), &tiles);
  team.Run([&](Worker& worker) {
    const Range panels = worker.Share(PanelCount(rows));
    for (size_t panel = panels.begin; panel < panels.end; ++panel) {
      uint8_t* to = tiles + panel * T8PanelBytes(cols);
      std::memset(to, kT8Zeros, T8PanelBytes(cols));
      const size_t begin = panel * kPanelRows, end = std::min(rows, begin + kPanelRows);
      for (size_t row = begin; row < end; ++row) {
        const uint8_t* first = weight.bytes().data() + row % quarter * cols;
        PutTwoPlaneRow(first, first + quarter * cols, 2 * (row / quarter), cols,
                       to + 4 * (row - begin));
      }
    }
  });
  return result;
}

PackedTensor RepackTiles(const PackedTensor& weight, const Team& team) {
  if (weight.alphabet() == Alphabet::kNineLevels) return RepackT8(weight, team);
  return weight.alphabet() == Alphabet::kTrit ? RepackT16(weight, team) : weight;
}

PackedTensor RepackT20(const PackedTensor& weight, const Team& team) {
  if (weight.layout() == Layout::kT20) return weight;
  Check(weight.layout() == Layout::kT16, "[repack] only t16 can become t20, got ",
        LayoutName(weight.layout()));
  uint8_t* tiles = nullptr;
  PackedTensor result = weight.WithTiles(Layout::kT20, &tiles);
  const T20Shape shape(weight.cols(), weight.scales().group_size);
  team.Run([&](Worker& worker) {
    const Range panels = worker.Share(PanelCount(weight.rows()));
    for (size_t panel = panels.begin; panel < panels.end; ++panel) {
      RetilePanel(shape, weight.bytes().data() + panel * T16PanelBytes(weight.cols()),
                  tiles + panel * shape.PanelBytes());
    }
  });
  return result;
}

PackedTensor RepackT16(const PackedTensor& weight, const Team& team) {
  if (weight.layout() == Layout::kT16) return weight;
  if (const TernaryCodec* codec = FindTernaryCodec(weight.layout()))
    return RepackFileLayout(*codec, weight, team);
  Check(weight.layout() == Layout::kHfPacked,
        "[repack] hf_packed and file layouts become t16, got ", LayoutName(weight.layout()));
  CheckTrits(weight.bytes());
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
