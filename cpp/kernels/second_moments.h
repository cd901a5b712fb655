// SPDX-License-Identifier: Apache-2.0
// Sums of outer products of activations, in double: what calibration knows about a layer's input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/parallel.h"

namespace tf {

// Columns side by side in a packed panel.
inline constexpr size_t kMomentPanel = 16;

// Doubles of the packed form of [tokens, cols].
constexpr size_t MomentDoubles(size_t tokens, size_t cols) {
  return (cols + kMomentPanel - 1) / kMomentPanel * kMomentPanel * tokens;
}

// Activations x [tokens, cols] to panels of kMomentPanel columns, token after token, zeros behind
// the last column. Only the panels of `panels`.
void PackMoments(const float* x, size_t tokens, size_t cols, Range panels, double* packed);

// sums [cols_a, cols_b] += a^T b, of packed activations of the same tokens. This worker takes every
// count-th panel of a. The product of two floats is exact in double and tokens are added one after
// the other, so the bits are the same on every target, with any number of workers.
void AddMoments(const Worker& worker, const double* a, size_t cols_a, const double* b,
                size_t cols_b, size_t tokens, double* sums);

// The same for b = a: half of the work, and the sums stay symmetric.
void AddSecondMoments(const Worker& worker, const double* a, size_t cols, size_t tokens,
                      double* sums);

}  // namespace tf
