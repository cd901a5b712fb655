// SPDX-License-Identifier: Apache-2.0
// Per-token int8 quantization of activations (BitNet b1.58).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned.h"
#include "formats/ternary.h"

namespace tf {

// Quantized activations of several tokens. Token t has its codes at codes + t * stride, padded with
// zeros to a multiple of kChunkCols, the scale scales[t] (x is about code / scale), and the sum of
// every kChunkCols neighbouring codes at chunk_sums + t * chunk_stride.
struct Int8Acts {
  const int8_t* codes;
  size_t stride;
  const float* scales;
  const int32_t* chunk_sums;
  size_t chunk_stride;
};

constexpr size_t PaddedCols(size_t cols) { return RoundUp(cols, kChunkCols); }
constexpr size_t ChunkCount(size_t cols) { return DivCeil(cols, kChunkCols); }

// Quantizes the `size` activations of one token: scale = 127 * (1 / max(max|x|, 1e-5)), code = x *
// scale rounded half to even. Writes PaddedCols(size) codes and ChunkCount(size) sums. The result
// is the same on every target.
void QuantizeActs(const float* x, size_t size, int8_t* codes, float* scale, int32_t* chunk_sums);

}  // namespace tf
