// SPDX-License-Identifier: Apache-2.0
// Matrix products with floating-point and int8 weights and float activations.
#pragma once

#include <cstddef>

#include "formats/packed_tensor.h"

namespace tf {

// out[t, r] = sum_k weight[r, k] * x[t, k] for t < tokens and row_begin <= r < row_end.
//
// weight: layout f32, f16, bf16 or int8 (int8: the scale of the tensor or row multiplies the sum).
// x: rows of `x_stride` floats, of which weight.cols() count. out: rows of `out_stride` floats;
// column r is row r. Every output is one sum in a fixed order of 16 lanes (lane l adds the products
// of columns l, l + 16, ... with fused multiply-add, then a fixed tree adds the lanes), whatever
// `tokens`, the row range and the thread count are, so results are bit-identical over chunking and
// threads, and over all targets that have fused multiply-add.
void DenseLinear(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                 size_t row_begin, size_t row_end, float* out, size_t out_stride);

// Copies row `row` of a f32, f16, bf16, int8 or t16 matrix as floats, scales applied: the embedding
// look-up.
void CopyRow(const PackedTensor& weight, size_t row, float* out);

}  // namespace tf
