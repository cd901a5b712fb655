// SPDX-License-Identifier: Apache-2.0
// TQ2_0 of llama.cpp: 256 columns in 66 bytes.
//
//   bytes 0-31    bits 2p+1..2p of byte j are column       32 p + j
//   bytes 32-63   bits 2p+1..2p of byte j are column 128 + 32 p + j
//   bytes 64-65   scale, f16
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kTq20;
  static constexpr size_t kCols = 256, kBytes = 66;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodePlanes<32, FirstPlane::kLowBits>(bytes, codes);
    DecodePlanes<32, FirstPlane::kLowBits>(bytes + 32, codes + 128);
    return LoadF16(bytes + 64);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    EncodePlanes<32, FirstPlane::kLowBits>(codes, bytes);
    EncodePlanes<32, FirstPlane::kLowBits>(codes + 128, bytes + 32);
    StoreF16(scale, bytes + 64);
  }
};

}  // namespace

const TernaryCodec kTq20Codec = RowsOfBlocks<Block>::Codec(kCode3IsNoTrit);

}  // namespace tf
