// SPDX-License-Identifier: Apache-2.0
// PTQ1_0 of PrismML: 128 columns in 28 bytes, five trits in most bytes.
//
//   bytes 0-15    digit p of byte j is column      16 p + j, p = 0..4
//   bytes 16-23   digit p of byte j is column  80 + 8 p + j, p = 0..4
//   bytes 24-25   digit p of byte j is column 120 + 2 p + j, p = 0..3, the last digit 0
//   bytes 26-27   scale, f16
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kPtq10;
  static constexpr size_t kCols = 128, kBytes = 28;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodeBase3Planes<16, 5>(bytes, codes);
    DecodeBase3Planes<8, 5>(bytes + 16, codes + 80);
    DecodeBase3Planes<2, 4>(bytes + 24, codes + 120);
    return LoadF16(bytes + 26);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    EncodeBase3Planes<16, 5>(codes, bytes);
    EncodeBase3Planes<8, 5>(codes + 80, bytes + 16);
    EncodeBase3Planes<2, 4>(codes + 120, bytes + 24);
    StoreF16(scale, bytes + 26);
  }
};

}  // namespace

const TernaryCodec kPtq10Codec = RowsOfBlocks<Block>::Codec("");

}  // namespace tf
