// SPDX-License-Identifier: Apache-2.0
// Matrix of two tied trit planes x activations, one token or many.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// out[t * out_stride + r] = scale[r] / acts.scales[t] * sum_k level[r, k] * code[t, k] for the rows
// of panels panel_begin .. panel_end - 1 (16 rows each; rows past weight.rows() are not written).
// weight: layout t8, any scale kind. One product does for both planes, since the levels 3 * first +
// second, -4 .. 4, are bytes.
//
// The integer sums are exact for cols < 2^19: a 32-bit lane takes at most 8 * 128 * 8 per tile of 8
// columns. Group scales: one exact sum per group, added as floats in the order of the groups. The
// bits do not depend on the target, the other tokens or the panel range.
void TwoPlaneLinear(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                    size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

// The exact integer sums alone, for scales per tensor or row: out[r] = sum_k level[r, k] *
// codes[k]. `codes` holds PaddedCols(cols) bytes, zeros behind the columns.
void TwoPlaneDot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
                 size_t panel_end, int32_t* out);

// out[t, r] = scale[r] * sum_k level[r, k] * x[t, k] with float activations: rows of `x_stride`
// floats, of which weight.cols() count. Every sum runs over the columns in their order, product and
// sum rounded apart, so all targets, token counts and panel ranges give the same bits.
void TwoPlaneLinearFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                         size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

}  // namespace tf
