// SPDX-License-Identifier: Apache-2.0
// From exact integer sums of codes to scaled floats: shared by the ternary GEMV and GEMM.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "formats/t16.h"
#include "kernels/quantize_acts.h"

namespace tf {

// Tensor and row scales count as one group that spans all columns. Multiplications and additions
// are separate (never fused) and in the order of the groups, so that every target gives the same
// bits.
class Epilogue {
 public:
  Epilogue(const PackedTensor& weight, const QuantizedActs& acts)
      : weight_(weight),
        acts_(acts),
        groups_(weight.scales().PerRow(weight.cols())),
        group_cols_(weight.scales().kind == ScaleKind::kGroup
                        ? weight.scales().group_size
                        : RoundUp(weight.cols(), kChunkCols)) {}

  size_t groups() const { return groups_; }

  // The tiles of one group: group sizes are multiples of kChunkCols, so of a tile; the last group
  // may be ragged.
  Range GroupTiles(size_t group) const {
    const size_t tiles_per_group = group_cols_ / kT16TileCols;
    return {group * tiles_per_group,
            std::min((group + 1) * tiles_per_group, T16TilesPerPanel(weight_.cols()))};
  }

  // totals[row] += scale * (sum of the row's codes - sum of the group's activations), for 16 rows
  // of a panel and one token. sums: the token's lanes, `lane_stride` apart.
  void AddGroup(size_t panel, size_t group, size_t token, const int32_t* lane_sums,
                size_t lane_stride, float* totals) const {
    // The codes are trit + 1, so every sum is too large by the sum of its activations. Unsigned,
    // because parts may leave 32 bits where the result does not: |code| <= 32639, and CheckCols.
    const uint32_t act_sum = ActSum(group, token);
    const int32_t* low_sums = lane_sums + (acts_.lanes_per_token - 1) * lane_stride;
    const uint32_t high_weight = acts_.lanes_per_token == 2 ? 256 : 0;
    int32_t sums[kPanelRows];
    for (size_t row = 0; row < kPanelRows; ++row) {
      const auto high = static_cast<uint32_t>(lane_sums[row]);
      const auto low = static_cast<uint32_t>(low_sums[row]);
      sums[row] = static_cast<int32_t>(high_weight * high + low - act_sum);
    }
    const Scales& scales = weight_.scales();
    const float* scale = scales.effective.data();
    if (scales.kind == ScaleKind::kTensor) {
      for (size_t row = 0; row < kPanelRows; ++row)
        totals[row] += static_cast<float>(sums[row]) * scale[0];
      return;
    }
    const size_t rows = std::min(kPanelRows, weight_.rows() - panel * kPanelRows);
    scale += panel * kPanelRows * groups_ + group;
    for (size_t row = 0; row < rows; ++row) {
      totals[row] += static_cast<float>(sums[row]) * scale[row * groups_];
    }
  }

  // Writes the rows of a panel that exist to out[panel * 16 ..].
  void Store(size_t panel, size_t token, const float* totals, float* out) const {
    const float act_scale = acts_.scales[token];
    const size_t rows = std::min(kPanelRows, weight_.rows() - panel * kPanelRows);
    for (size_t row = 0; row < rows; ++row) out[panel * kPanelRows + row] = totals[row] / act_scale;
  }

 private:
  uint32_t ActSum(size_t group, size_t token) const {
    const size_t chunks_per_group = group_cols_ / kChunkCols;
    const size_t chunk_end = std::min((group + 1) * chunks_per_group, ChunkCount(weight_.cols()));
    const int32_t* chunk_sums = acts_.chunk_sums + token * acts_.chunk_stride;
    uint32_t sum = 0;
    for (size_t chunk = group * chunks_per_group; chunk < chunk_end; ++chunk)
      sum += static_cast<uint32_t>(chunk_sums[chunk]);
    return sum;
  }

  const PackedTensor& weight_;
  const QuantizedActs& acts_;
  size_t groups_;
  size_t group_cols_;
};

}  // namespace tf
