// SPDX-License-Identifier: Apache-2.0
// Root-mean-square normalisation (Zhang and Sennrich 2019).
#pragma once

#include <cstddef>

namespace tf {

// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]. The sum of squares is taken in the fixed
// order of 16 lanes that DenseLinear describes. `out` may be `x`.
void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, float* out);

}  // namespace tf
