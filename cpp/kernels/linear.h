// SPDX-License-Identifier: Apache-2.0
// Linear layers of any weight alphabet, several at once on one input, shared out over a team.
#pragma once

#include <cstddef>
#include <span>

#include "base/aligned.h"
#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// Throws std::invalid_argument where sums over `cols` columns could leave the 32-bit integers:
// kInt8 takes 2^19 columns (see ternary_gemv.h), kInt16 2^16 (2^16 * 32639 < 2^31).
void CheckCols(ActivationMode mode, size_t cols);

// The same for the columns of `weight`; of two planes, whose levels go to 4, kInt16 takes 2^14
// columns that share a scale (4 * 2^14 * 32639 < 2^31).
void CheckExact(ActivationMode mode, const PackedTensor& weight);

// The input of linear layers: up to `max_tokens` rows of up to `max_cols` floats, and their
// quantized form on demand.
class LinearInput {
 public:
  LinearInput(size_t max_tokens, size_t max_cols);

  float* Row(size_t token) { return floats_.data() + token * stride_; }
  // Makes the quantized form of row `token` of `tokens`, each of `cols` floats; nothing under
  // kFloat.
  void Quantize(ActivationMode mode, size_t token, size_t tokens, size_t cols);

  const float* floats() const { return floats_.data(); }
  size_t stride() const { return stride_; }
  // The quantized form of the first `tokens` rows. mode: not kFloat.
  QuantizedActs Quantized(ActivationMode mode, size_t tokens) const;

 private:
  size_t stride_;  // columns of floats and of codes
  size_t prefix_stride_;
  AlignedArray<float> floats_;
  AlignedArray<int8_t> codes_;  // room for two lanes a token and whole blocks
  AlignedArray<float> scales_;
  AlignedArray<uint32_t> prefix_sums_;
};

// One layer to apply: out[t * out_stride + row].
struct LinearJob {
  const PackedTensor* weight;  // layout f32, f16, bf16, int8, t8, t16 or t20
  float* out;
  size_t out_stride;
};

// Runs this worker's share of all jobs on the first `tokens` rows of the input. Weights of
// trits, and of two planes of them, need these rows quantized in `mode`. The result does not depend
// on the number of workers.
void RunLinears(const Worker& worker, std::span<const LinearJob> jobs, const LinearInput& input,
                size_t tokens, ActivationMode mode);

// The same outside a model: jobs of equal columns on x [tokens, cols], with a workspace of its own.
// Checks the columns.
void ApplyLinears(std::span<const LinearJob> jobs, const float* x, size_t tokens,
                  ActivationMode mode, const Team& team);

}  // namespace tf
