// SPDX-License-Identifier: Apache-2.0
// Ternary matrix x many tokens: prefill and batches with quantized activations, and any number of
// tokens with floats.
#pragma once

#include <cstddef>

#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// TernaryGemv for any number of lanes, with the same bits. acts.block: 4, 8 or 12.
void TernaryGemm(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

// out[t, r] = scale[r] * sum_k trit[r, k] * x[t, k] with float activations: rows of `x_stride`
// floats, of which weight.cols() count. Every sum runs over the columns in their order (products
// with -1, 0, +1 are exact), so all targets, token counts and panel ranges give the same bits.
// Group scales as in TernaryGemv.
void TernaryGemmFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                      size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

}  // namespace tf
