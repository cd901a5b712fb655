// SPDX-License-Identifier: Apache-2.0
// Feed-forward activations, times the other half of a gated feed-forward. A plain one passes ones,
// which changes no bit.
#pragma once

#include <cstddef>

namespace tf {

// out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. `out` may be `gate` or `up`.
void SiluMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = max(gate[i], 0) * up[i]. `out` may be `gate` or `up`.
void ReluMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = max(gate[i], 0)^2 * up[i]. `out` may be `gate` or `up`.
void ReluSquaredMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = gelu(gate[i]) * up[i] with gelu(x) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715
// x^3): the tanh form, since (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)). `out` may be `gate` or `up`.
void GeluMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = gelu(gate[i]) * up[i] with gelu(x) = x (1 + erf(x / sqrt(2))) / 2: the exact form, to
// 4e-7 of |x|. `out` may be `gate` or `up`.
void GeluErfMultiply(const float* gate, const float* up, size_t size, float* out);

}  // namespace tf
