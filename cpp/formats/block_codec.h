// SPDX-License-Identifier: Apache-2.0
// What codecs of blocks share: numbers in bytes, base-3 digits, rows of blocks.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/check.h"
#include "base/float16.h"
#include "formats/ternary_codec.h"

namespace tf {

static_assert(std::endian::native == std::endian::little, "words are stored as they lie in files");

inline float LoadF16(const uint8_t* from) {
  return FloatFromF16(static_cast<uint16_t>(from[0] | from[1] << 8));
}

inline void StoreF16(float value, uint8_t* to) {
  const uint16_t bits = F16FromFloat(value);
  to[0] = static_cast<uint8_t>(bits & 0xFF);
  to[1] = static_cast<uint8_t>(bits >> 8);
}

inline float LoadF32(const uint8_t* from) {
  return std::bit_cast<float>(static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 8 |
                              static_cast<uint32_t>(from[2]) << 16 |
                              static_cast<uint32_t>(from[3]) << 24);
}

inline void StoreF32(float value, uint8_t* to) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  for (size_t i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(bits >> (8 * i));
}

// Five base-3 digits in one byte, scaled by 256 / 243 and rounded up, so that a digit is the high
// byte of a product by 3: digit n, from the most significant (n = 0), of byte b is
// (b * 3^n mod 256) * 3 / 256. Right for all 243 numbers.
inline constexpr uint8_t kPowersOf3[5] = {1, 3, 9, 27, 81};

inline uint8_t Base3Byte(uint32_t number) {
  return static_cast<uint8_t>((number * 256 + 242) / 243);
}

inline uint8_t Base3Digit(uint8_t byte, uint8_t power) {
  return static_cast<uint8_t>((static_cast<uint8_t>(byte * power) * 3) >> 8);
}

// `Count` bytes that hold `Digits` planes of `Count` codes, most significant digit first:
// codes[plane * Count + j] is digit `plane` of byte j.
template <size_t Count, size_t Digits>
void DecodeBase3Planes(const uint8_t* bytes, uint8_t* codes) {
  for (size_t plane = 0; plane < Digits; ++plane) {
    for (size_t j = 0; j < Count; ++j)
      codes[plane * Count + j] = Base3Digit(bytes[j], kPowersOf3[plane]);
  }
}

// With fewer than five digits the lowest ones are 0.
template <size_t Count, size_t Digits>
void EncodeBase3Planes(const uint8_t* codes, uint8_t* bytes) {
  for (size_t j = 0; j < Count; ++j) {
    uint32_t number = 0;
    for (size_t plane = 0; plane < 5; ++plane)
      number = number * 3 + (plane < Digits ? codes[plane * Count + j] : 0u);
    bytes[j] = Base3Byte(number);
  }
}

// `Count` bytes that hold four planes of `Count` 2-bit codes, plane 0 in the lowest bits, or in the
// highest.
enum class FirstPlane { kLowBits, kHighBits };

template <size_t Count, FirstPlane First>
void DecodePlanes(const uint8_t* bytes, uint8_t* codes) {
  for (size_t plane = 0; plane < 4; ++plane) {
    const size_t shift = 2 * (First == FirstPlane::kLowBits ? plane : 3 - plane);
    for (size_t j = 0; j < Count; ++j)
      codes[plane * Count + j] = static_cast<uint8_t>((bytes[j] >> shift) & 3);
  }
}

template <size_t Count, FirstPlane First>
void EncodePlanes(const uint8_t* codes, uint8_t* bytes) {
  for (size_t j = 0; j < Count; ++j) {
    uint32_t byte = 0;
    for (size_t plane = 0; plane < 4; ++plane) {
      const size_t shift = 2 * (First == FirstPlane::kLowBits ? plane : 3 - plane);
      byte |= static_cast<uint32_t>(codes[plane * Count + j]) << shift;
    }
    bytes[j] = static_cast<uint8_t>(byte);
  }
}

// `Count` bytes of four neighbouring 2-bit codes each, the first in the lowest bits.
template <size_t Count>
void DecodeSequence(const uint8_t* bytes, uint8_t* codes) {
  for (size_t j = 0; j < Count; ++j) {
    const uint32_t byte = bytes[j];
    const uint32_t word = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303u;
    std::memcpy(codes + 4 * j, &word, sizeof(word));
  }
}

template <size_t Count>
void EncodeSequence(const uint8_t* codes, uint8_t* bytes) {
  for (size_t j = 0; j < Count; ++j) {
    bytes[j] = static_cast<uint8_t>(codes[4 * j] | codes[4 * j + 1] << 2 | codes[4 * j + 2] << 4 |
                                    codes[4 * j + 3] << 6);
  }
}

// Rows of blocks with one scale each. `Block` has kCols, kBytes, Decode(bytes, codes) -> scale and
// Encode(codes, scale, bytes).
template <typename Block>
struct RowsOfBlocks {
  static size_t Bytes(size_t rows, size_t cols) {
    Check(cols % Block::kCols == 0, "[", LayoutName(Block::kLayout),
          "] columns must be a multiple of ", Block::kCols, ", got ", rows, " x ", cols);
    return rows * (cols / Block::kCols) * Block::kBytes;
  }
  static void DecodeRow(const uint8_t* data, size_t, size_t cols, size_t row, uint8_t* codes,
                        float* scales) {
    const size_t blocks = cols / Block::kCols;
    data += row * blocks * Block::kBytes;
    for (size_t b = 0; b < blocks; ++b)
      scales[b] = Block::Decode(data + b * Block::kBytes, codes + b * Block::kCols);
  }
  static void EncodeRow(const uint8_t* codes, const float* scales, size_t, size_t cols, size_t row,
                        uint8_t* data) {
    const size_t blocks = cols / Block::kCols;
    data += row * blocks * Block::kBytes;
    for (size_t b = 0; b < blocks; ++b)
      Block::Encode(codes + b * Block::kCols, scales[b], data + b * Block::kBytes);
  }
  static constexpr TernaryCodec Codec(std::string_view no_trit, bool binary = false) {
    return {Block::kLayout, ScaleKind::kGroup, Block::kCols, true, binary, no_trit,
            &Bytes,         &DecodeRow,        &EncodeRow};
  }
};

// Rows that begin with their scale, then blocks of codes. `Block` has kCols, kBytes, Decode(bytes,
// codes), Encode(codes, bytes), and kHalfScale.
template <typename Block>
struct ScaledRows {
  static constexpr size_t kScaleBytes = Block::kHalfScale ? 2 : 4;
  static size_t RowBytes(size_t cols) { return kScaleBytes + cols / Block::kCols * Block::kBytes; }
  static size_t Bytes(size_t rows, size_t cols) {
    Check(cols % Block::kCols == 0, "[", LayoutName(Block::kLayout),
          "] columns must be a multiple of ", Block::kCols, ", got ", rows, " x ", cols);
    return rows * RowBytes(cols);
  }
  static void DecodeRow(const uint8_t* data, size_t, size_t cols, size_t row, uint8_t* codes,
                        float* scales) {
    data += row * RowBytes(cols);
    scales[0] = Block::kHalfScale ? LoadF16(data) : LoadF32(data);
    for (size_t b = 0; b < cols / Block::kCols; ++b)
      Block::Decode(data + kScaleBytes + b * Block::kBytes, codes + b * Block::kCols);
  }
  static void EncodeRow(const uint8_t* codes, const float* scales, size_t, size_t cols, size_t row,
                        uint8_t* data) {
    data += row * RowBytes(cols);
    Block::kHalfScale ? StoreF16(scales[0], data) : StoreF32(scales[0], data);
    for (size_t b = 0; b < cols / Block::kCols; ++b)
      Block::Encode(codes + b * Block::kCols, data + kScaleBytes + b * Block::kBytes);
  }
  static constexpr TernaryCodec Codec(std::string_view no_trit) {
    return {Block::kLayout, ScaleKind::kRow, Block::kCols, Block::kHalfScale, false,
            no_trit,        &Bytes,          &DecodeRow,   &EncodeRow};
  }
};

inline constexpr std::string_view kCode3IsNoTrit =
    "code 3 stands for no trit: the data is damaged or of another layout";

// The value of the largest magnitude, the first of several. By its place: clang 19 makes a wrong
// sign of a loop that keeps the value itself.
inline float Largest(std::span<const float> values) {
  size_t place = 0;
  for (size_t i = 1; i < values.size(); ++i) {
    if (std::fabs(values[i]) > std::fabs(values[place])) place = i;
  }
  return values[place];
}

}  // namespace tf
