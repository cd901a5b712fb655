// SPDX-License-Identifier: Apache-2.0
// Softmax and its logarithm's normaliser, with sums in the fixed order of 16 lanes.
#pragma once

#include <cstddef>

namespace tf {

// Replaces x by exp(x - max) / sum, size >= 1. Values of -infinity give 0; one at least is finite.
void Softmax(float* x, size_t size);

// log(sum(exp(x))), size >= 1, one at least finite, computed as max + log(sum(exp(x - max))).
float LogSumExp(const float* x, size_t size);

// x[i] = cap * tanh(x[i] / cap): the soft-capped scores of Gemma 2.
void SoftCap(float* x, size_t size, float cap);

}  // namespace tf
