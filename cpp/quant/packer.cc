// SPDX-License-Identifier: Apache-2.0
// Rounding schemes: one scale for one run of weights, then all runs of a matrix in parallel.
#include "quant/packer.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "quant/stored_scale.h"
#include "quant/weight_scan.h"

namespace tf {
namespace {

constexpr double kTwnThreshold = 0.7;

// Weights of one tensor-wide sum are added chunk by chunk, so that the result does not depend on
// how threads share the chunks.
constexpr size_t kChunkWeights = size_t{1} << 16;

// Sum and number of those |w| that are above a threshold.
struct Tail {
  double sum = 0.0;
  size_t count = 0;
  double Mean() const { return sum / static_cast<double>(count); }
};

// FloorToFloat in the order of MagnitudeBits; -1 for a negative value, which every |w| is above.
int32_t FloorToBits(double value) {
  return value < 0 ? -1 : std::bit_cast<int32_t>(FloorToFloat(value));
}

// Eight independent sums keep the additions in a fixed order and in vector registers; masks instead
// of branches, which would be a coin toss for every weight.
Tail SumAbove(std::span<const float> weights, int32_t threshold_bits) {
  constexpr size_t kLanes = 8;
  double sums[kLanes] = {};
  int64_t counts[kLanes] = {};
  const auto add = [&](float weight, size_t lane) {
    const int32_t magnitude = static_cast<int32_t>(MagnitudeBits(weight));
    const int32_t mask = -static_cast<int32_t>(magnitude > threshold_bits);
    sums[lane] += static_cast<double>(std::bit_cast<float>(magnitude & mask));
    counts[lane] -= mask;
  };
  size_t i = 0;
  for (; i + kLanes <= weights.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) add(weights[i + lane], lane);
  }
  for (size_t lane = 0; i < weights.size(); ++i, ++lane) add(weights[i], lane);
  Tail tail;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    tail.sum += sums[lane];
    tail.count += static_cast<size_t>(counts[lane]);
  }
  return tail;
}

// The weights that share one scale, read by one thread.
class Run {
 public:
  explicit Run(std::span<const float> weights) : weights_(weights) {}

  std::span<const float> weights() const { return weights_; }
  Tail Above(double threshold) const { return SumAbove(weights_, FloorToBits(threshold)); }

 private:
  std::span<const float> weights_;
};

// The same for a whole tensor, read by a team.
class SharedRun {
 public:
  SharedRun(std::span<const float> weights, const Team& team)
      : weights_(weights), team_(team), parts_(DivCeil(weights.size(), kChunkWeights)) {}

  std::span<const float> weights() const { return weights_; }

  Tail Above(double threshold) {
    const int32_t floor = FloorToBits(threshold);
    team_.Run([&](Worker& worker) {
      const Range range = worker.Share(parts_.size());
      for (size_t part = range.begin; part < range.end; ++part) {
        const size_t begin = part * kChunkWeights;
        const size_t size = std::min(kChunkWeights, weights_.size() - begin);
        parts_[part] = SumAbove(weights_.subspan(begin, size), floor);
      }
    });
    Tail tail;
    for (const Tail& part : parts_) {
      tail.sum += part.sum;
      tail.count += part.count;
    }
    return tail;
  }

 private:
  std::span<const float> weights_;
  const Team& team_;
  std::vector<Tail> parts_;
};

// The scale of least squared error.
//
// With F(s) = mean of the |w| above s / 2, the optimum is a fixed point of F: taking one more
// weight in, or the smallest one out, does not pay. F never falls as s grows, so iterating it from
// the mean of all (below every fixed point) and from the maximum (above) closes in on all fixed
// points from both sides. Only the weights between the two thresholds are left to be sorted and
// tried one by one. Equal energies: the smaller support, that is, the larger scale.
template <typename Values>
double LeastSquaresScale(Values& values, const Tail& all, double max, std::vector<float>& between) {
  constexpr int kIterations = 24;     // each shrinks the gap to about 0.4 for a bell curve
  constexpr double kRounding = 1e-9;  // more than all rounding errors of a sum
  // So few are as quick to sort as all are to read again.
  const size_t few_weights = std::max<size_t>(32, all.count / 256);
  double low = all.Mean();
  double high = max;
  for (int i = 0; i < kIterations; ++i) {
    const Tail many = values.Above(low / 2);
    const Tail few = values.Above(high / 2);
    if (many.count - few.count <= few_weights) break;
    const double next_low = many.Mean();
    const double next_high = few.Mean();
    if (next_low <= low && next_high >= high) break;
    low = std::max(low, next_low);
    high = std::min(high, next_high);
  }
  const float low_threshold = FloorToFloat(low / 2 * (1 - kRounding));
  const float high_threshold = FloorToFloat(high / 2 * (1 + kRounding));
  between.clear();
  for (const float w : values.weights()) {
    const float magnitude = std::bit_cast<float>(MagnitudeBits(w));
    if (magnitude > low_threshold && magnitude <= high_threshold) between.push_back(magnitude);
  }
  std::sort(between.begin(), between.end(), std::greater<>());

  Tail kept = values.Above(high_threshold);
  Tail best = kept;
  double best_energy = kept.count > 0 ? kept.sum * kept.Mean() : -1.0;
  for (const float magnitude : between) {
    kept.sum += static_cast<double>(magnitude);
    ++kept.count;
    const double energy = kept.sum * kept.Mean();
    if (energy > best_energy) {
      best = kept;
      best_energy = energy;
    }
  }
  return best.Mean();
}

// A scale before rounding, and the |w| above which a trit is not 0; a negative threshold stands for
// half of the stored scale.
struct Fit {
  double scale;
  double threshold;
};

// Needs at least one weight that is not zero.
template <typename Values>
Fit FitScale(Values& values, Scheme scheme, double max, std::vector<float>& scratch) {
  if (scheme == Scheme::kAbsMax) return {max, max / 2};
  const Tail all = values.Above(-1.0);
  switch (scheme) {
    case Scheme::kAbsMean:
      return {all.Mean(), all.Mean() / 2};
    case Scheme::kTwn: {
      const double threshold = kTwnThreshold * all.Mean();
      return {values.Above(threshold).Mean(), threshold};
    }
    default:
      return {LeastSquaresScale(values, all, max, scratch), -1.0};
  }
}

void SetTrits(std::span<const float> weights, float threshold, int8_t* trits) {
  for (size_t i = 0; i < weights.size(); ++i) {
    trits[i] = static_cast<int8_t>((weights[i] > threshold) - (weights[i] < -threshold));
  }
}

float Threshold(const Fit& fit, float stored) {
  return fit.threshold < 0 ? stored / 2 : FloorToFloat(fit.threshold);
}

void QuantizeTensor(std::span<const float> weights, float max, Scheme scheme, const Team& team,
                    std::span<int8_t> trits, float* scale) {
  *scale = 1.0f;
  float threshold = 0.0f;
  if (max > 0) {
    SharedRun run(weights, team);
    std::vector<float> scratch;
    const Fit fit = FitScale(run, scheme, static_cast<double>(max), scratch);
    *scale = StoredTensorScale(fit.scale);
    threshold = Threshold(fit, *scale);
  }
  team.Run([&](Worker& worker) {
    const Range range = worker.Share(weights.size());
    SetTrits(weights.subspan(range.begin, range.end - range.begin), threshold,
             trits.data() + range.begin);
  });
}

// Rows or groups: each row is cut into runs of `run_cols`, the last one may be shorter.
void QuantizeRuns(std::span<const float> weights, size_t rows, size_t cols, size_t run_cols,
                  Scheme scheme, const Team& team, std::span<int8_t> trits,
                  std::span<float> scales) {
  const size_t runs = DivCeil(cols, run_cols);
  // Reserved here, because nothing may throw inside a team.
  std::vector<std::vector<float>> scratch(team.threads());
  for (std::vector<float>& floats : scratch) floats.reserve(std::min(run_cols, cols));
  team.Run([&](Worker& worker) {
    const Range range = worker.Share(rows);
    for (size_t index = range.begin * runs; index < range.end * runs; ++index) {
      const size_t col = index % runs * run_cols;
      const size_t begin = index / runs * cols + col;
      Run run(weights.subspan(begin, std::min(run_cols, cols - col)));
      const float max = std::bit_cast<float>(MaxMagnitudeBits(run.weights()));
      scales[index] = 0.0f;
      float threshold = 0.0f;
      if (max > 0) {
        const Fit fit = FitScale(run, scheme, static_cast<double>(max), scratch[worker.index()]);
        scales[index] = StoredScale(fit.scale);
        threshold = Threshold(fit, scales[index]);
      }
      SetTrits(run.weights(), threshold, trits.data() + begin);
    }
  });
}

// The largest |w|. Throws for the first weight, row by row, that is not finite.
float CheckFinite(std::span<const float> weights, size_t cols, const Team& team) {
  std::vector<uint32_t> max(team.threads());
  team.Run([&](Worker& worker) {
    const Range range = worker.Share(weights.size());
    max[worker.index()] = MaxMagnitudeBits(weights.subspan(range.begin, range.end - range.begin));
  });
  const uint32_t bits = *std::max_element(max.begin(), max.end());
  if (bits >= kInfinityBits) {
    const auto bad = std::find_if(weights.begin(), weights.end(),
                                  [](float w) { return MagnitudeBits(w) >= kInfinityBits; });
    const size_t index = static_cast<size_t>(bad - weights.begin());
    Check(false, "[quantize_weights] weights must be finite, got ", *bad, " at row ", index / cols,
          ", column ", index % cols);
  }
  return std::bit_cast<float>(bits);
}

}  // namespace

Scheme SchemeFromName(std::string_view name) {
  if (name == "ls") return Scheme::kLeastSquares;
  if (name == "absmean") return Scheme::kAbsMean;
  if (name == "absmax") return Scheme::kAbsMax;
  Check(name == "twn", "[quantize_weights] a scheme is ls, absmean, absmax or twn, got '", name,
        "'");
  return Scheme::kTwn;
}

size_t ScaleCount(ScaleKind kind, size_t group_size, size_t rows, size_t cols) {
  Check(rows > 0 && cols > 0, "[quantize_weights] a matrix has rows and columns, got ", rows, " x ",
        cols);
  switch (kind) {
    case ScaleKind::kTensor:
      return 1;
    case ScaleKind::kRow:
      return rows;
    case ScaleKind::kGroup:
      Check(group_size > 0 && group_size % kChunkCols == 0,
            "[quantize_weights] a group size is a positive multiple of ", kChunkCols, ", got ",
            group_size);
      return rows * DivCeil(cols, group_size);
    default:
      Check(false, "[quantize_weights] trits need a scale per tensor, row or group");
      return 0;
  }
}

void QuantizeWeights(std::span<const float> weights, size_t rows, size_t cols, Scheme scheme,
                     ScaleKind kind, size_t group_size, const Team& most_threads,
                     std::span<int8_t> trits, std::span<float> scales) {
  Check(scales.size() == ScaleCount(kind, group_size, rows, cols) &&
            weights.size() == rows * cols && trits.size() == rows * cols,
        "[quantize_weights] sizes do not match ", rows, " x ", cols);
  const Team team = TeamFor(weights.size(), most_threads);
  const float max = CheckFinite(weights, cols, team);
  if (kind == ScaleKind::kTensor) {
    QuantizeTensor(weights, max, scheme, team, trits, scales.data());
  } else {
    const size_t run_cols = kind == ScaleKind::kRow ? cols : group_size;
    QuantizeRuns(weights, rows, cols, run_cols, scheme, team, trits, scales);
  }
  const size_t per_row = std::max<size_t>(1, scales.size() / rows);
  for (size_t i = 0; i < scales.size(); ++i) {
    Check(scales[i] <= kLargestF16, "[quantize_weights] the scale ", scales[i], " of row ",
          i / per_row, ", group ", i % per_row,
          " is above 65504, the largest 16-bit float: scale the weights down");
  }
}

}  // namespace tf
