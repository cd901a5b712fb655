// SPDX-License-Identifier: Apache-2.0
// Per-token quantization of activations: int8 (BitNet b1.58), and int16 as two int8 lanes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned.h"
#include "formats/ternary.h"

namespace tf {

// How ternary weights see their input. Floating-point weights always see floats.
enum class ActivationMode : uint8_t {
  kInt8,   // per-token int8, what BitNet models are trained with
  kInt16,  // per-token 16-bit integers, for weight-only models
  kFloat,  // as they are, the reference
};

// A lane is one row of int8 codes. A token is one lane under kInt8; under kInt16 it is two, the
// high and the low part of code = 256 * high + low.
constexpr size_t LanesPerToken(ActivationMode mode) {
  return mode == ActivationMode::kInt16 ? 2 : 1;
}

// The largest code. 32639 = 127 * 257 is the largest number whose two parts both lie in -127 ..
// 127; 32767 would need a high part of 128.
constexpr int kInt8MaxCode = 127;
constexpr int kInt16MaxCode = 32639;

// Codes lie interleaved in blocks of this many lanes, or fewer where there are few: 1, 2, 4, 8 or
// 12.
inline constexpr size_t kMaxLaneBlock = 12;
constexpr size_t LaneBlock(size_t lanes) {
  return lanes > 8 ? kMaxLaneBlock : lanes > 4 ? 8 : lanes > 2 ? 4 : lanes;
}

// Columns of codes that exist behind `cols` activations at least: kernels read whole tiles.
constexpr size_t PaddedCols(size_t cols) { return RoundUp(cols + 16, kChunkCols); }
constexpr size_t ChunkCount(size_t cols) { return DivCeil(cols, kChunkCols); }

// Quantized activations of several tokens. Lane l = token * lanes_per_token (+ 1 for the low part)
// has four neighbouring columns c .. c + 3, c a multiple of 4, at
//   codes + l / block * block_stride + c * block + 4 * (l % block).
// Columns behind the last are zero. x is about code / scales[token]; the codes of the columns
// before chunk * kChunkCols sum to prefix_sums[token * prefix_stride + chunk], modulo 2^32.
struct QuantizedActs {
  const int8_t* codes;
  size_t lanes_per_token;
  size_t block;
  size_t block_stride;
  const float* scales;
  const uint32_t* prefix_sums;
  size_t prefix_stride;
};

// Quantizes the `size` activations of one token: scale = max_code * (1 / max(max|x|, 1e-5)), code =
// x * scale rounded half to even. Writes the codes of PaddedCols(size) columns into a block of
// `block` lanes, where `codes` points at the first column of the token's first lane (under kInt16
// the low part follows at codes + 4), and ChunkCount(size) + 1 sums. mode: not kFloat. The result
// is the same on every target.
void QuantizeActs(ActivationMode mode, const float* x, size_t size, size_t block, int8_t* codes,
                  float* scale, uint32_t* prefix_sums);

}  // namespace tf
