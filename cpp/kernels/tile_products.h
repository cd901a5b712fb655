// SPDX-License-Identifier: Apache-2.0
// A matrix of doubles times vectors that lie side by side: the one product of the calibrator.
#pragma once

#include <cstddef>

#include "base/parallel.h"

namespace tf {

// Vectors side by side come in multiples of it.
inline constexpr size_t kProductRows = 16;

// sums [k][width] += sum over j of m_jk * values [j][width], for k in `columns` and j in `terms`,
// with m_jk = matrix[j * stride + k], or matrix[k * stride + j] where `transposed`. `width` is a
// multiple of kProductRows; `values` and `sums` may lie in one array where no index is in both
// ranges. Every product is rounded, then added, j after j: the bits are the same on every target,
// however the ranges are cut into calls.
void AddTileProducts(const double* matrix, size_t stride, bool transposed, Range terms,
                     Range columns, size_t width, const double* values, double* sums);

}  // namespace tf
