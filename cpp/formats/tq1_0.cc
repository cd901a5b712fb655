// SPDX-License-Identifier: Apache-2.0
// TQ1_0 of llama.cpp: 256 columns in 54 bytes, five trits in most bytes.
//
//   bytes 0-31    digit p of byte j is column       32 p + j, p = 0..4
//   bytes 32-47   digit p of byte j is column 160 + 16 p + j, p = 0..4
//   bytes 48-51   digit p of byte j is column 240 +  4 p + j, p = 0..3, the last digit 0
//   bytes 52-53   scale, f16
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kTq10;
  static constexpr size_t kCols = 256, kBytes = 54;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodeBase3Planes<32, 5>(bytes, codes);
    DecodeBase3Planes<16, 5>(bytes + 32, codes + 160);
    DecodeBase3Planes<4, 4>(bytes + 48, codes + 240);
    return LoadF16(bytes + 52);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    EncodeBase3Planes<32, 5>(codes, bytes);
    EncodeBase3Planes<16, 5>(codes + 160, bytes + 32);
    EncodeBase3Planes<4, 4>(codes + 240, bytes + 48);
    StoreF16(scale, bytes + 52);
  }
};

}  // namespace

const TernaryCodec kTq10Codec = RowsOfBlocks<Block>::Codec("");

}  // namespace tf
