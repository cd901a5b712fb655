// SPDX-License-Identifier: Apache-2.0
// Q6_K of llama.cpp: 256 columns in 210 bytes.
//
//   bytes 0-127     low four bits of q + 32; per half of 128 columns 64 bytes: bits 3-0 of byte j
//   are
//                   column j, bits 7-4 column 64 + j
//   bytes 128-191   high two bits; per half 32 bytes: bits 2p+1..2p of byte j are column 32 p + j
//   bytes 192-207   a signed multiplier a of 16 columns each
//   bytes 208-209   d, f16
//
// weight = d a q, q = -32 .. 31.
#include <algorithm>
#include <cmath>

#include "formats/block_codec.h"
#include "formats/dense_codec.h"

namespace tf {
namespace {

constexpr size_t kCols = 256, kPartCols = 16, kParts = kCols / kPartCols;

// Nearest integer of a number below 2^22, ties to even: the sum drops the fraction.
float RoundSmall(float value) { return (value + 12582912.0f) - 12582912.0f; }

float Level(float value, float inverse) {
  return std::clamp(RoundSmall(value * inverse), -32.0f, 31.0f);
}

// The signed scale s for which levels times s come closest to 16 values, large values weighing more
// (by their squares): for each of some roundings of the largest value, the least-squares scale of
// the levels that it gives, and the best of these.
float BestScale(const float* values) {
  const float largest = Largest({values, kPartCols});
  if (std::fabs(largest) < 1e-15f) return 0;
  float best_scale = 0, best_gain = 0;
  for (int step = -9; step <= 9; ++step) {
    const float inverse = -(32.0f + 0.1f * static_cast<float>(step)) / largest;
    float product = 0, square = 0;
    for (size_t i = 0; i < kPartCols; ++i) {
      const float weight = values[i] * values[i], level = Level(values[i], inverse);
      product += weight * values[i] * level;
      square += weight * level * level;
    }
    // The weighted error of the best scale is the sum of weight * value^2 minus this gain.
    const float gain = square > 0 ? product * product / square : 0;
    if (gain > best_gain) {
      best_gain = gain;
      best_scale = product / square;
    }
  }
  return best_scale;
}

void StoreLevels(const uint8_t* levels, uint8_t* block) {
  for (size_t half = 0; half < 2; ++half, levels += 128) {
    for (size_t j = 0; j < 64; ++j)
      block[64 * half + j] = static_cast<uint8_t>((levels[j] & 15) | (levels[64 + j] & 15) << 4);
    for (size_t j = 0; j < 32; ++j) {
      block[128 + 32 * half + j] =
          static_cast<uint8_t>(levels[j] >> 4 | (levels[32 + j] >> 4) << 2 |
                               (levels[64 + j] >> 4) << 4 | (levels[96 + j] >> 4) << 6);
    }
  }
}

}  // namespace

void DecodeQ6K(const uint8_t* block, float* values) {
  const float d = LoadF16(block + 208);
  for (size_t col = 0; col < kCols; ++col) {
    const size_t half = col / 128, j = col % 128;
    const int low = (block[64 * half + j % 64] >> (4 * (j / 64))) & 15;
    const int high = (block[128 + 32 * half + j % 32] >> (2 * (j / 32))) & 3;
    const auto multiplier = static_cast<float>(static_cast<int8_t>(block[192 + col / kPartCols]));
    values[col] = d * multiplier * static_cast<float>((low | high << 4) - 32);
  }
}

void EncodeQ6K(const float* values, uint8_t* block) {
  float scales[kParts];
  for (size_t part = 0; part < kParts; ++part) scales[part] = BestScale(values + part * kPartCols);
  StoreF16(Largest(scales) / -128.0f, block + 208);  // so that the largest scale is exactly -128 d
  const float d = LoadF16(block + 208);
  uint8_t levels[kCols];
  for (size_t part = 0; part < kParts; ++part) {
    const float multiplier = d != 0 ? std::clamp(RoundSmall(scales[part] / d), -128.0f, 127.0f) : 0;
    block[192 + part] = static_cast<uint8_t>(static_cast<int>(multiplier));
    const float scale = d * multiplier;
    const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
    for (size_t col = part * kPartCols; col < (part + 1) * kPartCols; ++col)
      levels[col] = static_cast<uint8_t>(static_cast<int>(Level(values[col], inverse)) + 32);
  }
  StoreLevels(levels, block);
}

}  // namespace tf
