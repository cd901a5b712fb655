// SPDX-License-Identifier: Apache-2.0
// Ternary matrix x int8 vector: decoding one token.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// out[r] = scale[r] / acts.scales[0] * sum_k trit[r, k] * code[k] for the rows of panels
// panel_begin .. panel_end - 1 (16 rows each; rows past weight.rows() are not written). weight:
// layout t16, any scale kind.
//
// The integer sums are exact for cols < 2^19: a 32-bit lane of the top plane takes at most 128 *
// 128 * 4 per tile of 16 columns. Group scales: one exact sum per group, added as floats in the
// order of the groups.
void GemvT16I8(const PackedTensor& weight, const Int8Acts& acts, size_t panel_begin,
               size_t panel_end, float* out);

// The exact integer sums alone: out[r] = sum_k trit[r, k] * codes[k]. `codes` is padded to a
// multiple of kChunkCols with zeros.
void DotT16I8(const PackedTensor& weight, const int8_t* codes, size_t panel_begin, size_t panel_end,
              int32_t* out);

}  // namespace tf
