// SPDX-License-Identifier: Apache-2.0
// Q4_0 of llama.cpp where its weights are exactly -s, 0, +s: 32 columns in 18 bytes.
//
//   bytes 0-1    d, f16
//   bytes 2-17   bits 3-0 of byte j are n of column j, bits 7-4 those of column 16 + j
//
// weight = d (n - 8). Written with d = s, so that n is trit + 8.
#include <algorithm>
#include <cstdlib>

#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kQ40;
  static constexpr size_t kCols = 32, kBytes = 18;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    uint8_t beyond = 0;  // whether a level is none of -1, 0, +1
    for (size_t j = 0; j < 16; ++j) {
      const auto low = static_cast<uint8_t>((bytes[2 + j] & 15) - 7);
      const auto high = static_cast<uint8_t>((bytes[2 + j] >> 4) - 7);
      codes[j] = low;
      codes[16 + j] = high;
      beyond = static_cast<uint8_t>(beyond | (low > 2) | (high > 2));
    }
    return beyond == 0 ? LoadF16(bytes) : DecodeOtherLevels(bytes, codes);
  }
  // Levels -n, 0, +n: what rounding a block makes of ternary weights that have one sign.
  static float DecodeOtherLevels(const uint8_t* bytes, uint8_t* codes) {
    int levels[kCols];
    int largest = 0;
    for (size_t j = 0; j < 16; ++j) {
      levels[j] = (bytes[2 + j] & 15) - 8;
      levels[16 + j] = (bytes[2 + j] >> 4) - 8;
      largest = std::max({largest, std::abs(levels[j]), std::abs(levels[16 + j])});
    }
    for (size_t col = 0; col < kCols; ++col) {
      codes[col] = levels[col] == 0          ? 1
                   : levels[col] == largest  ? 2
                   : levels[col] == -largest ? 0
                                             : kNoTrit;
    }
    return LoadF16(bytes) * static_cast<float>(std::max(largest, 1));  // exact: 11 bits times 4
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    StoreF16(scale, bytes);
    for (size_t j = 0; j < 16; ++j)
      bytes[2 + j] = static_cast<uint8_t>((codes[j] + 7) | (codes[16 + j] + 7) << 4);
  }
};

}  // namespace

const TernaryCodec kQ40Codec = RowsOfBlocks<Block>::Codec(
    "the weights of its block are not -s, 0 and +s: the tensor is not ternary, use it as dense");

}  // namespace tf
