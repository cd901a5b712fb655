// SPDX-License-Identifier: Apache-2.0
// Ternary matrix x few lanes of activations: decoding, small batches, speculation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// Most lanes that TernaryGemv takes: as many as the memory feeds without time to spare.
inline constexpr size_t kMaxGemvLanes = 4;

// out[t * out_stride + r] = scale[r] / acts.scales[t] * sum_k trit[r, k] * code[t, k] for the rows
// of panels panel_begin .. panel_end - 1 (16 rows each; rows past weight.rows() are not written).
// weight: layout t16 or t20, any scale kind; both give the same bits. acts: one block of at most
// kMaxGemvLanes lanes. The weights are read once for all of them.
//
// The integer sums are exact for cols < 2^19: a 32-bit lane of the top plane takes at most 128 *
// 128 * 4 per tile of 16 columns. Group scales: one exact sum per group, added as floats in the
// order of the groups. The bits do not depend on the target, the other tokens or the panel range.
void TernaryGemv(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride);

// The exact integer sums alone, for scales per tensor or row: out[r] = sum_k trit[r, k] * codes[k].
// `codes` holds PaddedCols(cols) bytes, zeros behind the columns.
void TernaryDot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
                size_t panel_end, int32_t* out);

}  // namespace tf
