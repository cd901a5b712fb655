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

// How ternary weights see their input. Floating-point weights always see floats.
enum class ActivationMode : uint8_t {
  kInt8,   // per-token int8, what BitNet models are trained with
  kFloat,  // as they are, for weight-only models and as reference
};

// The input of linear layers: up to `max_tokens` rows of up to `max_cols` floats, and their int8
// form on demand.
class LinearInput {
 public:
  LinearInput(size_t max_tokens, size_t max_cols);

  float* Row(size_t token) { return floats_.data() + token * stride_; }
  // Makes the int8 form of one row of `cols` floats.
  void Quantize(size_t token, size_t cols);

  const float* floats() const { return floats_.data(); }
  size_t stride() const { return stride_; }
  Int8Acts int8() const {
    return {codes_.data(), stride_, scales_.data(), chunk_sums_.data(), chunk_stride_};
  }

 private:
  size_t stride_;  // columns padded to kChunkCols, for floats and codes alike
  size_t chunk_stride_;
  AlignedArray<float> floats_;
  AlignedArray<int8_t> codes_;
  AlignedArray<float> scales_;
  AlignedArray<int32_t> chunk_sums_;
};

// One layer to apply: out[t * out_stride + row].
struct LinearJob {
  const PackedTensor* weight;  // layout f32, f16, bf16, int8 or t16
  float* out;
  size_t out_stride;
};

// Runs this worker's share of all jobs on the first `tokens` rows of the input. Ternary weights
// under kInt8 need the rows quantized. The result does not depend on the number of workers.
void RunLinears(const Worker& worker, std::span<const LinearJob> jobs, const LinearInput& input,
                size_t tokens, ActivationMode mode);

}  // namespace tf
