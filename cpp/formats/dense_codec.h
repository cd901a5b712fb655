// SPDX-License-Identifier: Apache-2.0
// Matrices that are not ternary, in the types of GGUF files: embeddings, heads, plain models.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/parallel.h"

namespace tf {

// Rows of blocks, each decoded by itself.
struct DenseCodec {
  std::string_view name;  // of the GGUF type
  size_t block_cols;
  size_t block_bytes;
  void (*decode)(const uint8_t* block, float* values);
  void (*encode)(const float* values, uint8_t* block);  // null where the type is only read
};

// F32, F16, BF16, Q8_0, Q6_K, Q4_0, Q2_K; null for other names.
const DenseCodec* FindDenseCodec(std::string_view name);

// Bytes of a matrix; throws std::invalid_argument when cols is no multiple of the block.
size_t DenseBytes(const DenseCodec& codec, size_t rows, size_t cols);

// values [rows, cols], as llama.cpp computes them. Throws std::invalid_argument when sizes do not
// fit. Infinities and NaN in the data come out as they are.
void Dequantize(const DenseCodec& codec, std::span<const uint8_t> data, size_t rows, size_t cols,
                const Team& team, std::span<float> values);

// The inverse, rounded: F16, BF16 to nearest even; Q8_0 and Q4_0 to the same bytes as llama.cpp's
// reference; Q6_K by a search for the scale of least squared error per 16 columns. Throws
// std::invalid_argument when sizes do not fit, when a value is not finite, and when a value is too
// large for f16.
void Quantize(const DenseCodec& codec, std::span<const float> values, size_t rows, size_t cols,
              const Team& team, std::span<uint8_t> data);

// Q6_K, in q6_k.cc.
void DecodeQ6K(const uint8_t* block, float* values);
void EncodeQ6K(const float* values, uint8_t* block);

}  // namespace tf
