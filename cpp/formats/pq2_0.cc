// SPDX-License-Identifier: Apache-2.0
// PQ2_0 of PrismML, and the form of Q2_0 that its files had before: 128 columns in 34 bytes.
//
//   bytes 0-1    scale, f16
//   bytes 2-33   bits 2i+1..2i of byte j are column 4 j + i; code 3 is +2, which is no trit
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kPq20;
  static constexpr size_t kCols = 128, kBytes = 34;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    DecodeSequence<32>(bytes + 2, codes);
    return LoadF16(bytes);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    StoreF16(scale, bytes);
    EncodeSequence<32>(codes, bytes + 2);
  }
};

}  // namespace

const TernaryCodec kPq20Codec = RowsOfBlocks<Block>::Codec(
    "code 3 stands for +2: the tensor has four levels, or its blocks have another size");

}  // namespace tf
