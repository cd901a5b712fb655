// SPDX-License-Identifier: Apache-2.0
// Scalar ternary arithmetic, written from the formats and the arithmetic contract, not from the
// kernels. Trits may also be the levels of two planes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "formats/packed_tensor.h"

namespace tf::reference {

// sum_k trit[row, k] * codes[k] for every row of row-major trits [rows, codes.size()].
std::vector<int32_t> TernaryDot(std::span<const int8_t> trits, size_t rows,
                                std::span<const int8_t> codes);

// The integer codes (-max_code .. max_code) and the scale of one token's activations.
std::vector<int32_t> QuantizeActs(std::span<const float> x, int max_code, float* scale);

// The scaled product with activations of up to max_code: exact sums per scale group, then doubles.
std::vector<double> TernaryLinearInteger(std::span<const int8_t> trits, size_t rows,
                                         const Scales& scales, std::span<const float> x,
                                         int max_code);

// The scaled product with float activations, in doubles.
std::vector<double> TernaryLinearF32(std::span<const int8_t> trits, size_t rows,
                                     const Scales& scales, std::span<const float> x);

}  // namespace tf::reference
