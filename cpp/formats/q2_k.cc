// SPDX-License-Identifier: Apache-2.0
// Q2_K of llama.cpp where its weights are exactly -s, 0, +s: 256 columns in 84 bytes.
//
//   bytes 0-15    of 16 columns each: bits 3-0 multiplier a, bits 7-4 minimum b
//   bytes 16-47   bits 2p+1..2p of byte j are q of column       32 p + j
//   bytes 48-79   bits 2p+1..2p of byte j are q of column 128 + 32 p + j
//   bytes 80-83   d and dmin, f16
//
// weight = d a q - dmin b. Written with a = b = 1 and d = dmin = s, so that q is trit + 1.
#include <algorithm>
#include <cmath>

#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kQ2K;
  static constexpr size_t kCols = 256, kBytes = 84;

  // Doubles hold every weight exactly: an 11-bit significand times numbers below 64, whose
  // exponents lie within 40 bits of each other.
  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodePlanes<32, FirstPlane::kLowBits>(bytes + 16, codes);
    DecodePlanes<32, FirstPlane::kLowBits>(bytes + 48, codes + 128);
    if (std::all_of(bytes, bytes + 16, [](uint8_t byte) { return byte == 0x11; }) &&
        std::memcmp(bytes + 80, bytes + 82, 2) == 0)
      return LoadF16(bytes + 80);  // as written here: q = 3 is 2 s, which is no trit
    const double d = LoadF16(bytes + 80), minimum = LoadF16(bytes + 82);
    if (!std::isfinite(d) || !std::isfinite(minimum)) return std::nanf("");
    double scale = 0;
    for (size_t part = 0; part < 16; ++part) {
      const double step = d * (bytes[part] & 15), offset = minimum * (bytes[part] >> 4);
      for (size_t col = 16 * part; col < 16 * part + 16; ++col) {
        const double weight = step * codes[col] - offset;
        if (scale == 0) scale = std::fabs(weight);
        codes[col] = weight == 0 ? 1 : weight == scale ? 2 : weight == -scale ? 0 : kNoTrit;
      }
    }
    if (scale == 0) return static_cast<float>(d);
    if (static_cast<float>(scale) != scale) codes[0] = kNoTrit;
    return static_cast<float>(scale);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    std::memset(bytes, 0x11, 16);
    EncodePlanes<32, FirstPlane::kLowBits>(codes, bytes + 16);
    EncodePlanes<32, FirstPlane::kLowBits>(codes + 128, bytes + 48);
    StoreF16(scale, bytes + 80);
    StoreF16(scale, bytes + 82);
  }
};

}  // namespace

const TernaryCodec kQ2KCodec = RowsOfBlocks<Block>::Codec(
    "the weights of its block are not -s, 0 and +s: the tensor is not ternary, use it as dense");

}  // namespace tf
