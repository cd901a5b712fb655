// SPDX-License-Identifier: Apache-2.0
// Sharing out linear layers by panels of 16 rows; see linear.h.
#include "kernels/linear.h"

#include <algorithm>

#include "base/check.h"
#include "formats/t16.h"
#include "kernels/dense_linear.h"
#include "kernels/ternary_gemm.h"
#include "kernels/ternary_gemv.h"
#include "kernels/two_plane_linear.h"

namespace tf {
namespace {

void RunPanels(const LinearJob& job, const LinearInput& input, size_t tokens, ActivationMode mode,
               size_t panel_begin, size_t panel_end) {
  const PackedTensor& weight = *job.weight;
  if (!IsTiles(weight.layout())) {
    DenseLinear(weight, input.floats(), tokens, input.stride(), panel_begin * kPanelRows,
                std::min(panel_end * kPanelRows, weight.rows()), job.out, job.out_stride);
  } else if (mode == ActivationMode::kFloat) {
    const auto run = weight.layout() == Layout::kT8 ? TwoPlaneLinearFloat : TernaryGemmFloat;
    run(weight, input.floats(), tokens, input.stride(), panel_begin, panel_end, job.out,
        job.out_stride);
  } else {
    const QuantizedActs acts = input.Quantized(mode, tokens);
    const auto run = weight.layout() == Layout::kT8 ? TwoPlaneLinear
                     : acts.block <= kMaxGemvLanes  ? TernaryGemv
                                                    : TernaryGemm;
    run(weight, acts, tokens, panel_begin, panel_end, job.out, job.out_stride);
  }
}

}  // namespace

void CheckCols(ActivationMode mode, size_t cols) {
  if (mode == ActivationMode::kFloat) return;
  const size_t limit = mode == ActivationMode::kInt16 ? size_t{1} << 16 : size_t{1} << 19;
  Check(cols <= limit, "[activations] ", mode == ActivationMode::kInt16 ? "int16" : "int8",
        " sums are exact up to ", limit, " columns, got ", cols, ": use float activations");
}

void CheckExact(ActivationMode mode, const PackedTensor& weight) {
  CheckCols(mode, weight.cols());
  const Scales& scales = weight.scales();
  const size_t together =
      scales.kind == ScaleKind::kGroup ? std::min(scales.group_size, weight.cols()) : weight.cols();
  Check(weight.layout() != Layout::kT8 || mode != ActivationMode::kInt16 ||
            together <= size_t{1} << 14,
        "[activations] int16 sums of two planes are exact up to 16384 columns that share a scale, "
        "got ",
        together, ": use float activations");
}

LinearInput::LinearInput(size_t max_tokens, size_t max_cols)
    : stride_(PaddedCols(max_cols)),
      prefix_stride_(ChunkCount(max_cols) + 1),
      floats_(max_tokens * stride_),
      codes_(RoundUp(2 * max_tokens, kMaxLaneBlock) * stride_),
      scales_(max_tokens),
      prefix_sums_(max_tokens * prefix_stride_) {}

void LinearInput::Quantize(ActivationMode mode, size_t token, size_t tokens, size_t cols) {
  if (mode == ActivationMode::kFloat) return;
  const QuantizedActs acts = Quantized(mode, tokens);
  const size_t lane = token * acts.lanes_per_token;
  int8_t* codes = codes_.data() + lane / acts.block * acts.block_stride + 4 * (lane % acts.block);
  QuantizeActs(mode, Row(token), cols, acts.block, codes, scales_.data() + token,
               prefix_sums_.data() + token * prefix_stride_);
}

QuantizedActs LinearInput::Quantized(ActivationMode mode, size_t tokens) const {
  const size_t lanes_per_token = LanesPerToken(mode);
  const size_t block = LaneBlock(tokens * lanes_per_token);
  return {codes_.data(),  lanes_per_token,     block,         block * stride_,
          scales_.data(), prefix_sums_.data(), prefix_stride_};
}

void RunLinears(const Worker& worker, std::span<const LinearJob> jobs, const LinearInput& input,
                size_t tokens, ActivationMode mode) {
  size_t total = 0;
  for (const LinearJob& job : jobs) total += PanelCount(job.weight->rows());
  const Range share = worker.Share(total);
  size_t first = 0;
  for (const LinearJob& job : jobs) {
    const size_t panels = PanelCount(job.weight->rows());
    const size_t begin = std::clamp(share.begin, first, first + panels) - first;
    const size_t end = std::clamp(share.end, first, first + panels) - first;
    if (begin < end) RunPanels(job, input, tokens, mode, begin, end);
    first += panels;
  }
}

void ApplyLinears(std::span<const LinearJob> jobs, const float* x, size_t tokens,
                  ActivationMode mode, const Team& team) {
  const size_t cols = jobs.front().weight->cols();
  for (const LinearJob& job : jobs) {
    Check(job.weight->cols() == cols, "[linear] layers of one input have equal columns, got ", cols,
          " and ", job.weight->cols());
    CheckExact(mode, *job.weight);
  }
  LinearInput input(tokens, cols);
  for (size_t t = 0; t < tokens; ++t) {
    std::copy_n(x + t * cols, cols, input.Row(t));
    input.Quantize(mode, t, tokens, cols);
  }
  team.Run([&](Worker& worker) { RunLinears(worker, jobs, input, tokens, mode); });
}

}  // namespace tf
