// SPDX-License-Identifier: Apache-2.0
// I2_S of bitnet.cpp: 2-bit codes of the whole matrix, then 32 bytes that begin with one f32 scale.
//
//   i2_s         (x86, and every published file) 128 weights in 32 bytes, rows one after another:
//                bits 7-6 of byte j are weight j, bits 5-4 32 + j, bits 3-2 64 + j, bits 1-0 96 + j
//   i2_s_64      (quantized on ARM since the end of 2025) the same with 64 weights in 16 bytes
//   i2_s_rows4   (x86 builds without ACT_PARALLEL) one byte per column of four rows, the first row
//                in bits 7-6
//
// Nothing in a file tells the three apart.
#include "formats/block_codec.h"

namespace tf {
namespace {

constexpr size_t kTailBytes = 32;

void EncodeTail(float scale, uint8_t* tail) {
  std::memset(tail, 0, kTailBytes);
  StoreF32(scale, tail);
}

template <Layout kLayout, size_t kCount>
struct Blocks {
  static constexpr size_t kWeights = 4 * kCount;  // of a block

  // A row of another length than a multiple of a block begins and ends inside of blocks.
  static size_t Bytes(size_t rows, size_t cols) {
    Check(rows * cols % kWeights == 0, "[", LayoutName(kLayout),
          "] the number of weights must be a multiple of ", kWeights, ", got ", rows, " x ", cols);
    return rows * cols / 4 + kTailBytes;
  }
  static void DecodeRow(const uint8_t* data, size_t rows, size_t cols, size_t row, uint8_t* codes,
                        float* scales) {
    scales[0] = LoadF32(data + rows * cols / 4);
    if (cols % kWeights == 0) {
      for (size_t col = 0; col < cols; col += kWeights)
        DecodePlanes<kCount, FirstPlane::kHighBits>(data + (row * cols + col) / 4, codes + col);
      return;
    }
    for (size_t col = 0; col < cols; ++col) {
      const size_t index = row * cols + col, in_block = index % kWeights;
      const uint8_t byte = data[index / kWeights * kCount + in_block % kCount];
      codes[col] = static_cast<uint8_t>((byte >> (6 - 2 * (in_block / kCount))) & 3);
    }
  }
  static void EncodeRow(const uint8_t* codes, const float* scales, size_t rows, size_t cols,
                        size_t row, uint8_t* data) {
    if (row == 0) EncodeTail(scales[0], data + rows * cols / 4);
    for (size_t col = 0; col < cols; col += kWeights)
      EncodePlanes<kCount, FirstPlane::kHighBits>(codes + col, data + (row * cols + col) / 4);
  }
  static constexpr TernaryCodec Codec() {
    return {kLayout, ScaleKind::kTensor, kWeights,  false, false, kCode3IsNoTrit,
            &Bytes,  &DecodeRow,         &EncodeRow};
  }
};

size_t BytesOfRows4(size_t rows, size_t cols) {
  Check(rows % 4 == 0, "[i2_s_rows4] rows must be a multiple of 4, got ", rows, " x ", cols);
  return rows * cols / 4 + kTailBytes;
}

void DecodeRowOfRows4(const uint8_t* data, size_t rows, size_t cols, size_t row, uint8_t* codes,
                      float* scales) {
  scales[0] = LoadF32(data + rows * cols / 4);
  const size_t shift = 6 - 2 * (row % 4);
  for (size_t col = 0; col < cols; ++col)
    codes[col] = static_cast<uint8_t>((data[row / 4 * cols + col] >> shift) & 3);
}

}  // namespace

const TernaryCodec kI2SCodec = Blocks<Layout::kI2S, 32>::Codec();
const TernaryCodec kI2S64Codec = Blocks<Layout::kI2S64, 16>::Codec();
const TernaryCodec kI2SRows4Codec = {
    Layout::kI2SRows4, ScaleKind::kTensor, 1,      false, false, kCode3IsNoTrit,
    &BytesOfRows4,     &DecodeRowOfRows4,  nullptr};

}  // namespace tf
