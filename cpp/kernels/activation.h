// SPDX-License-Identifier: Apache-2.0
// Gated feed-forward activations.
#pragma once

#include <cstddef>

namespace tf {

// out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. `out` may be `gate` or `up`.
void SiluMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = max(gate[i], 0)^2 * up[i]. `out` may be `gate` or `up`.
void ReluSquaredMultiply(const float* gate, const float* up, size_t size, float* out);

// out[i] = gelu(gate[i]) * up[i] with gelu(x) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715
// x^3): the tanh form, since (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)). `out` may be `gate` or `up`.
void GeluMultiply(const float* gate, const float* up, size_t size, float* out);

}  // namespace tf
