// SPDX-License-Identifier: Apache-2.0
// Single rows of run-time tiles as floats.
#pragma once

#include <cstddef>

#include "formats/packed_tensor.h"

namespace tf {

// out[col] = trit (or level) * scale of row `row` of a matrix in layout t16 (or t8). A row touches
// 4 of every 64 bytes of its panel, so one copy of a tied embedding serves the look-up and the
// head.
void CopyTernaryRow(const PackedTensor& weight, size_t row, float* out);

}  // namespace tf
