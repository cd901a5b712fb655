// SPDX-License-Identifier: Apache-2.0
// Matrices of MLX's affine quantization whose weights are ternary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/parallel.h"

namespace tf {

// `codes` are uint32 [rows, cols * bits / 32] as bytes: 1 or 2 bits each, the first column in the
// lowest bits. weight = scale * code + bias with one scale and bias per `group_size` columns,
// [rows, cols / group_size] each. Fills trits [rows, cols] and the positive scales of trits.
// Throws std::invalid_argument when sizes do not fit, FormatError that names the place where the
// weights of a group are not exactly -s, 0 and +s.
void DecodeMlx(std::span<const uint8_t> codes, std::span<const float> scales,
               std::span<const float> biases, size_t bits, size_t group_size, size_t rows,
               size_t cols, const Team& team, std::span<int8_t> trits,
               std::span<float> trit_scales);

}  // namespace tf
