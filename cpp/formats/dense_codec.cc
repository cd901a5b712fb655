// SPDX-License-Identifier: Apache-2.0
// The dense types but Q6_K, and whole matrices of any of them.
#include "formats/dense_codec.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/check.h"
#include "formats/block_codec.h"

namespace tf {
namespace {

void DecodeF32(const uint8_t* block, float* values) { *values = LoadF32(block); }
void EncodeF32(const float* values, uint8_t* block) { StoreF32(*values, block); }

void DecodeF16(const uint8_t* block, float* values) { *values = LoadF16(block); }
void EncodeF16(const float* values, uint8_t* block) { StoreF16(*values, block); }

void DecodeBf16(const uint8_t* block, float* values) {
  *values = FloatFromBf16(static_cast<uint16_t>(block[0] | block[1] << 8));
}
void EncodeBf16(const float* values, uint8_t* block) {
  const uint16_t bits = Bf16FromFloat(*values);
  block[0] = static_cast<uint8_t>(bits & 0xFF);
  block[1] = static_cast<uint8_t>(bits >> 8);
}

// Q8_0: 32 columns in 34 bytes: d (f16), then 32 signed bytes q; weight = d q.
void DecodeQ80(const uint8_t* block, float* values) {
  const float d = LoadF16(block);
  for (size_t i = 0; i < 32; ++i)
    values[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}
void EncodeQ80(const float* values, uint8_t* block) {
  float largest = 0;
  for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(values[i]));
  const float d = largest / 127.0f;
  const float inverse = d != 0 ? 1.0f / d : 0.0f;
  StoreF16(d, block);
  for (size_t i = 0; i < 32; ++i)  // halves are rounded away from zero
    block[2 + i] = static_cast<uint8_t>(static_cast<int>(std::round(values[i] * inverse)));
}

// Q4_0: see q4_0.cc. The weight of largest magnitude becomes exactly -8 d.
void DecodeQ40(const uint8_t* block, float* values) {
  const float d = LoadF16(block);
  for (size_t j = 0; j < 16; ++j) {
    values[j] = d * static_cast<float>((block[2 + j] & 15) - 8);
    values[16 + j] = d * static_cast<float>((block[2 + j] >> 4) - 8);
  }
}
void EncodeQ40(const float* values, uint8_t* block) {
  const float d = Largest({values, 32}) / -8.0f;
  const float inverse = d != 0 ? 1.0f / d : 0.0f;
  StoreF16(d, block);
  const auto level = [inverse](float value) {
    return std::min(15, static_cast<int>(value * inverse + 8.5f));
  };
  for (size_t j = 0; j < 16; ++j)
    block[2 + j] = static_cast<uint8_t>(level(values[j]) | level(values[16 + j]) << 4);
}

// Q2_K: see q2_k.cc.
void DecodeQ2K(const uint8_t* block, float* values) {
  uint8_t codes[256];
  DecodePlanes<32, FirstPlane::kLowBits>(block + 16, codes);
  DecodePlanes<32, FirstPlane::kLowBits>(block + 48, codes + 128);
  const float d = LoadF16(block + 80), minimum = LoadF16(block + 82);
  for (size_t part = 0; part < 16; ++part) {
    const float step = d * static_cast<float>(block[part] & 15);
    const float offset = minimum * static_cast<float>(block[part] >> 4);
    for (size_t col = 16 * part; col < 16 * part + 16; ++col)
      values[col] = step * static_cast<float>(codes[col]) - offset;
  }
}

constexpr DenseCodec kCodecs[] = {
    {"F32", 1, 4, &DecodeF32, &EncodeF32},      {"F16", 1, 2, &DecodeF16, &EncodeF16},
    {"BF16", 1, 2, &DecodeBf16, &EncodeBf16},   {"Q8_0", 32, 34, &DecodeQ80, &EncodeQ80},
    {"Q6_K", 256, 210, &DecodeQ6K, &EncodeQ6K}, {"Q4_0", 32, 18, &DecodeQ40, &EncodeQ40},
    {"Q2_K", 256, 84, &DecodeQ2K, nullptr},
};

void CheckSizes(const DenseCodec& codec, const char* op, size_t rows, size_t cols, size_t values,
                size_t bytes) {
  const size_t expected = DenseBytes(codec, rows, cols);
  Check(bytes == expected && values == rows * cols, "[", op, "] ", codec.name, " of ", rows, " x ",
        cols, " takes ", expected, " bytes, got ", bytes, " for ", values, " values");
}

}  // namespace

const DenseCodec* FindDenseCodec(std::string_view name) {
  for (const DenseCodec& codec : kCodecs) {
    if (codec.name == name) return &codec;
  }
  return nullptr;
}

size_t DenseBytes(const DenseCodec& codec, size_t rows, size_t cols) {
  LayoutBytes(Layout::kF32, rows, cols);  // refuses sizes that overflow
  Check(cols % codec.block_cols == 0, "[", codec.name, "] columns must be a multiple of ",
        codec.block_cols, ", got ", rows, " x ", cols);
  return rows * (cols / codec.block_cols) * codec.block_bytes;
}

void Dequantize(const DenseCodec& codec, std::span<const uint8_t> data, size_t rows, size_t cols,
                const Team& team, std::span<float> values) {
  CheckSizes(codec, "dequantize", rows, cols, values.size(), data.size());
  team.Run([&](Worker& worker) {
    const Range blocks = worker.Share(values.size() / codec.block_cols);
    for (size_t block = blocks.begin; block < blocks.end; ++block)
      codec.decode(data.data() + block * codec.block_bytes,
                   values.data() + block * codec.block_cols);
  });
}

void Quantize(const DenseCodec& codec, std::span<const float> values, size_t rows, size_t cols,
              const Team& team, std::span<uint8_t> data) {
  CheckSizes(codec, "quantize", rows, cols, values.size(), data.size());
  Check(codec.encode != nullptr, "[quantize] ", codec.name, " is only read");
  // d of Q8_0 is a 127th, d of Q4_0 an 8th of the largest value; those of Q6_K smaller still.
  const float limit = codec.name == "F32" || codec.name == "BF16" ? INFINITY
                      : codec.name == "F16"                       ? 65520.0f
                                                                  : 8 * 65504.0f;
  std::atomic<size_t> bad = values.size();
  team.Run([&](Worker& worker) {
    const Range blocks = worker.Share(values.size() / codec.block_cols);
    for (size_t block = blocks.begin; block < blocks.end; ++block) {
      const float* from = values.data() + block * codec.block_cols;
      for (size_t i = 0; i < codec.block_cols; ++i) {
        if (!(std::fabs(from[i]) < limit)) {
          bad = block * codec.block_cols + i;
          return;
        }
      }
      codec.encode(from, data.data() + block * codec.block_bytes);
    }
  });
  Check(bad == values.size(), "[quantize] ", codec.name, " takes finite values below ", limit,
        ", got ", bad < values.size() ? values[bad] : 0.0f, " at row ", bad / cols, ", column ",
        bad % cols);
}

}  // namespace tf
