// SPDX-License-Identifier: Apache-2.0
// Scalar references of the float kernels, written from the formulas in double, against which the
// self test compares.
#pragma once

#include <cstddef>

#include "formats/packed_tensor.h"

namespace tf::reference {

// The value of one weight of an f32, f16, bf16 or int8 matrix, its scale included.
double DenseWeight(const PackedTensor& weight, size_t row, size_t col);

// out[t, r] = sum_k weight[r, k] * x[t, k] for all rows; x and out without gaps.
void DenseLinear(const PackedTensor& weight, const float* x, size_t tokens, double* out);

// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i].
void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, double* out);

// out[i] = (x[i] - m) / sqrt(mean((x - m)^2) + epsilon) * weight[i] + bias[i], m = mean(x).
void LayerNorm(const float* x, const float* weight, const float* bias, size_t size, float epsilon,
               double* out);

// out = the head with pairs (i, half + i) rotated by the angles of cos and sin.
void RotateHalves(const float* head, const float* cos, const float* sin, size_t half, double* out);

// out = exp(x) / sum(exp(x)).
void Softmax(const float* x, size_t size, double* out);

// log(sum(exp(x))).
double LogSumExp(const float* x, size_t size);

// out[i] = gate / (1 + exp(-gate)) * up.
void SiluMultiply(const float* gate, const float* up, size_t size, double* out);

// out[i] = max(gate, 0) * up.
void ReluMultiply(const float* gate, const float* up, size_t size, double* out);

// out[i] = max(gate, 0)^2 * up.
void ReluSquaredMultiply(const float* gate, const float* up, size_t size, double* out);

// out[i] = gate * (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) / 2 * up.
void GeluMultiply(const float* gate, const float* up, size_t size, double* out);

// out[i] = gate * (1 + erf(gate / sqrt(2))) / 2 * up.
void GeluErfMultiply(const float* gate, const float* up, size_t size, double* out);

// Attention of one head over keys and values [length, head_dim] without gaps; soft_cap 0 is none.
void AttendHead(const float* query, const float* keys, const float* values, size_t head_dim,
                size_t length, float scale, float soft_cap, double* out);

}  // namespace tf::reference
