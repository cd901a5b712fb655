// SPDX-License-Identifier: Apache-2.0
// Q1_0 of llama.cpp: 128 columns of -1 or +1 in 18 bytes.
//
//   bytes 0-1    scale, f16
//   bytes 2-17   bit i of byte j is column 8 j + i: 0 is -1, 1 is +1
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kQ10;
  static constexpr size_t kCols = 128, kBytes = 18;

  static float Decode(const uint8_t* bytes, uint8_t* codes) {
    for (size_t j = 0; j < kCols / 8; ++j) {
      // Byte i of the word keeps bit i; adding 0x7F carries it to the top where it is set.
      const uint64_t bits = (bytes[2 + j] * 0x0101010101010101u) & 0x8040201008040201u;
      const uint64_t word = ((bits + 0x7F7F7F7F7F7F7F7Fu) >> 6) & 0x0202020202020202u;
      std::memcpy(codes + 8 * j, &word, sizeof(word));
    }
    return LoadF16(bytes);
  }
  static void Encode(const uint8_t* codes, float scale, uint8_t* bytes) {
    StoreF16(scale, bytes);
    std::memset(bytes + 2, 0, kBytes - 2);
    for (size_t col = 0; col < kCols; ++col) {
      uint8_t& byte = bytes[2 + col / 8];
      byte = static_cast<uint8_t>(byte | (codes[col] / 2) << (col % 8));
    }
  }
};

}  // namespace

const TernaryCodec kQ10Codec = RowsOfBlocks<Block>::Codec("", /*binary=*/true);

}  // namespace tf
