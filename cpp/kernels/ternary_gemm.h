// SPDX-License-Identifier: Apache-2.0
// Ternary matrix x several tokens: prefill and batches with int8 activations, and any number of
// tokens with floats.
#pragma once

#include <cstddef>

#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// GemvT16I8 for `tokens` tokens, with the same bits: token t writes out[t * out_stride + row].
void GemmT16I8(const PackedTensor& weight, const Int8Acts& acts, size_t tokens, size_t panel_begin,
               size_t panel_end, float* out, size_t out_stride);

// out[t, r] = scale[r] * sum_k trit[r, k] * x[t, k] with float activations: rows of `x_stride`
// floats, of which weight.cols() count. Every sum runs over the columns in their order (products
// with -1, 0, +1 are exact), so all targets, token counts and panel ranges give the same bits.
// Group scales as in GemvT16I8.
void GemmT16F32(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

}  // namespace tf
