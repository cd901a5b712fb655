// SPDX-License-Identifier: Apache-2.0
// Normalisation of one row: by its root mean square (Zhang and Sennrich 2019), or by mean and
// variance (Ba, Kiros and Hinton 2016).
#pragma once

#include <cstddef>

namespace tf {

// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]. The sum of squares is taken in the fixed
// order of 16 lanes that DenseLinear describes. `out` may be `x`.
void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, float* out);

// out[i] = (x[i] - m) / sqrt(mean((x - m)^2) + epsilon) * weight[i] + bias[i], m = mean(x). Both
// sums are taken in the order of 16 lanes, the squares after the mean is known. `out` may be `x`.
void LayerNorm(const float* x, const float* weight, const float* bias, size_t size, float epsilon,
               float* out);

}  // namespace tf
