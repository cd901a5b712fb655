// SPDX-License-Identifier: Apache-2.0
// Sharing out linear layers by panels of 16 rows; see linear.h.
#include "kernels/linear.h"

#include <algorithm>

#include "formats/t16.h"
#include "kernels/dense_linear.h"
#include "kernels/ternary_gemm.h"
#include "kernels/ternary_gemv.h"

namespace tf {
namespace {

void RunPanels(const LinearJob& job, const LinearInput& input, size_t tokens, ActivationMode mode,
               size_t panel_begin, size_t panel_end) {
  const PackedTensor& weight = *job.weight;
  if (weight.alphabet() != Alphabet::kTrit) {
    DenseLinear(weight, input.floats(), tokens, input.stride(), panel_begin * kPanelRows,
                std::min(panel_end * kPanelRows, weight.rows()), job.out, job.out_stride);
  } else if (mode == ActivationMode::kFloat) {
    GemmT16F32(weight, input.floats(), tokens, input.stride(), panel_begin, panel_end, job.out,
               job.out_stride);
  } else if (tokens == 1) {
    GemvT16I8(weight, input.int8(), panel_begin, panel_end, job.out);
  } else {
    GemmT16I8(weight, input.int8(), tokens, panel_begin, panel_end, job.out, job.out_stride);
  }
}

}  // namespace

LinearInput::LinearInput(size_t max_tokens, size_t max_cols)
    : stride_(PaddedCols(max_cols)),
      chunk_stride_(ChunkCount(max_cols)),
      floats_(max_tokens * stride_),
      codes_(max_tokens * stride_),
      scales_(max_tokens),
      chunk_sums_(max_tokens * chunk_stride_) {}

void LinearInput::Quantize(size_t token, size_t cols) {
  QuantizeActs(Row(token), cols, codes_.data() + token * stride_, scales_.data() + token,
               chunk_sums_.data() + token * chunk_stride_);
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

}  // namespace tf
