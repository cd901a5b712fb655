// SPDX-License-Identifier: Apache-2.0
// IQ1_BN of ik_llama.cpp: a row is its scale (f16), then 64 columns in 13 bytes.
//
//   byte 3 i + k, i = 0..3, k = 0..2   columns 16 i + 5 k .. + 4, the first the *least* significant
//                                      of five base-3 digits
//   byte 12                            columns 15, 31, 47, 63 as digits 0 .. 3
#include "formats/block_codec.h"

namespace tf {
namespace {

struct Block {
  static constexpr Layout kLayout = Layout::kIq1Bn;
  static constexpr size_t kCols = 64, kBytes = 13;
  static constexpr bool kHalfScale = true;

  static void Decode(const uint8_t* bytes, uint8_t* codes) {
    for (size_t i = 0; i < 4; ++i) {
      for (size_t k = 0; k < 3; ++k) {
        for (size_t digit = 0; digit < 5; ++digit)
          codes[16 * i + 5 * k + digit] = Base3Digit(bytes[3 * i + k], kPowersOf3[4 - digit]);
      }
      codes[16 * i + 15] = Base3Digit(bytes[12], kPowersOf3[4 - i]);
    }
  }
  static void Encode(const uint8_t* codes, uint8_t* bytes) {
    uint32_t last = 0;
    for (size_t i = 0; i < 4; ++i) {
      for (size_t k = 0; k < 3; ++k) {
        uint32_t number = 0;
        for (size_t digit = 0; digit < 5; ++digit)
          number += codes[16 * i + 5 * k + digit] * uint32_t{kPowersOf3[digit]};
        bytes[3 * i + k] = Base3Byte(number);
      }
      last += codes[16 * i + 15] * uint32_t{kPowersOf3[i]};
    }
    bytes[12] = Base3Byte(last);
  }
};

}  // namespace

const TernaryCodec kIq1BnCodec = ScaledRows<Block>::Codec("");

}  // namespace tf
