// SPDX-License-Identifier: Apache-2.0
// One pass over all groups; their scales then merge to rows and to one.
#include "quant/find_ternary.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <utility>

#include "base/aligned.h"
#include "base/check.h"
#include "quant/packer.h"
#include "quant/weight_scan.h"

namespace tf {
namespace {

// Scale and number of the weights in one group that are not zero.
struct GroupValues {
  bool ternary;
  float scale;
  size_t nonzero;
};

GroupValues ReadGroup(std::span<const float> weights) {
  const uint32_t max = MaxMagnitudeBits(weights);
  size_t zeros = 0;
  size_t largest = 0;
  for (const float w : weights) {
    const uint32_t magnitude = MagnitudeBits(w);
    zeros += magnitude == 0 ? 1 : 0;
    largest += magnitude == max ? 1 : 0;
  }
  const bool ternary = max < kInfinityBits && (max == 0 || zeros + largest == weights.size());
  return {ternary, std::bit_cast<float>(max), weights.size() - zeros};
}

// Replaces every run of `count` scales by one, where all that are not zero are equal.
bool Merge(std::vector<float>& scales, size_t count) {
  std::vector<float> merged(scales.size() / count);
  for (size_t i = 0; i < scales.size(); ++i) {
    float& scale = merged[i / count];
    if (scale == 0.0f) scale = scales[i];
    if (scales[i] != 0.0f && scales[i] != scale) return false;
  }
  scales = std::move(merged);
  return true;
}

}  // namespace

std::optional<TernaryScales> FindTernary(std::span<const float> weights, size_t rows, size_t cols,
                                         size_t group_size, const Team& most_threads) {
  std::vector<float> scales(ScaleCount(ScaleKind::kGroup, group_size, rows, cols));
  Check(weights.size() == rows * cols, "[find_ternary] sizes do not match ", rows, " x ", cols);
  const size_t groups = DivCeil(cols, group_size);
  const Team team = TeamFor(weights.size(), most_threads);
  // Ternary per tensor or row is ternary per group too, so one group that is not settles it.
  std::atomic<bool> ternary{true};
  std::atomic<size_t> nonzero{0};
  team.Run([&](Worker& worker) {
    const Range range = worker.Share(rows);
    size_t own_nonzero = 0;
    for (size_t index = range.begin * groups; index < range.end * groups; ++index) {
      if (!ternary.load(std::memory_order_relaxed)) return;
      const size_t col = index % groups * group_size;
      const GroupValues group =
          ReadGroup(weights.subspan(index / groups * cols + col, std::min(group_size, cols - col)));
      scales[index] = group.scale;
      if (!group.ternary) ternary = false;
      own_nonzero += group.nonzero;
    }
    nonzero += own_nonzero;
  });
  if (!ternary) return std::nullopt;

  TernaryScales found{ScaleKind::kGroup, std::move(scales)};
  if (Merge(found.values, groups)) {
    found.kind = ScaleKind::kRow;
    if (Merge(found.values, rows)) {
      if (found.values[0] == 0.0f) found.values[0] = 1.0f;
      found.kind = ScaleKind::kTensor;
      return found;
    }
  }
  const auto zeros = std::count(found.values.begin(), found.values.end(), 0.0f);
  if (nonzero <= found.values.size() - static_cast<size_t>(zeros)) return std::nullopt;
  return found;
}

void TakeSigns(std::span<const float> weights, const Team& most_threads, std::span<int8_t> trits) {
  Check(weights.size() == trits.size(), "[find_ternary] ", weights.size(), " weights, ",
        trits.size(), " trits");
  TeamFor(weights.size(), most_threads).Run([&](Worker& worker) {
    const Range range = worker.Share(weights.size());
    for (size_t i = range.begin; i < range.end; ++i) {
      trits[i] = static_cast<int8_t>((weights[i] > 0.0f) - (weights[i] < 0.0f));
    }
  });
}

}  // namespace tf
