// SPDX-License-Identifier: Apache-2.0
// IQ2_BN of ik_llama.cpp: a row is its scale (f32), then 64 columns in 16 bytes.
//
//   bits 2p+1..2p of byte j are column 16 p + j
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kIq2Bn;
  static constexpr size_t kCols = 64, kBytes = 16;
  static constexpr bool kHalfScale = false;

  static void Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodePlanes<16, FirstPlane::kLowBits>(bytes, codes);
  }
  static void Encode(const uint8_t* codes, uint8_t* bytes) {
    EncodePlanes<16, FirstPlane::kLowBits>(codes, bytes);
  }
};

}  // namespace

const TernaryCodec kIq2BnCodec = ScaledRows<Block>::Codec(kCode3IsNoTrit);

}  // namespace tf
