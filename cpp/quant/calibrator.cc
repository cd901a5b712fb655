// SPDX-License-Identifier: Apache-2.0
// Moments in parts of a few hundred tokens; rounding in tiles of eight rows that share the factor.
#include "quant/calibrator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "kernels/second_moments.h"
#include "quant/packer.h"
#include "quant/stored_scale.h"
#include "quant/weight_scan.h"

namespace tf {
namespace {

constexpr size_t kPartTokens = 256;
constexpr size_t kTile = 8;  // rows that are rounded together
constexpr double kTwnThreshold = 0.7;

void CheckActivations(std::span<const float> x, size_t cols) {
  if (MaxMagnitudeBits(x) < kInfinityBits) return;
  const auto bad =
      std::ranges::find_if(x, [](float v) { return MagnitudeBits(v) >= kInfinityBits; });
  const size_t index = static_cast<size_t>(bad - x.begin());
  Check(false, "[second_moments] activations must be finite, got ", *bad, " at token ",
        index / cols, ", column ", index % cols);
}

size_t Panels(size_t cols) { return DivCeil(cols, kMomentPanel); }

// One run of a row: values and importances, most important first where the rule sorts.
struct Weight {
  double size;
  double importance;
};

double FitScale(std::span<Weight> run) {
  std::ranges::sort(run, [](const Weight& a, const Weight& b) { return a.size > b.size; });
  double sum = 0, mass = 0, best = 0, best_energy = -1;
  for (const Weight& weight : run) {
    sum += weight.importance * weight.size;
    mass += weight.importance;
    const double energy = sum * sum / mass;
    if (energy > best_energy) {
      best_energy = energy;
      best = sum / mass;
    }
  }
  return best;
}

double ErrorOf(std::span<const Weight> run, double scale) {
  double error = 0;
  for (const Weight& weight : run) {
    const double rest = weight.size > scale / 2 ? weight.size - scale : weight.size;
    error += weight.importance * rest * rest;
  }
  return error;
}

double MeanSize(std::span<const Weight> run, double threshold) {
  double sum = 0;
  size_t count = 0;
  for (const Weight& weight : run) {
    if (weight.size <= threshold) continue;
    sum += weight.size;
    ++count;
  }
  return count == 0 ? 0.0 : sum / static_cast<double>(count);
}

// 0 for a run that is all zero.
double ScaleOf(std::span<Weight> run, ScaleRule rule) {
  if (rule == ScaleRule::kFit) return FitScale(run);
  const double mean = MeanSize(run, -1.0);
  if (rule == ScaleRule::kAbsMean) return mean;
  if (rule == ScaleRule::kTwn) return MeanSize(run, kTwnThreshold * mean);
  double best = 0, least = std::numeric_limits<double>::infinity();
  for (int step = 10; step <= 60; ++step) {
    const double scale = mean * step / 20.0, error = ErrorOf(run, scale);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

// Rounds kTile rows. Everything of a column lies side by side: [cols][kTile].
class TileRounder {
 public:
  TileRounder(size_t cols, std::span<const double> factor, std::span<const double> importance,
              ScaleRule rule, size_t run_cols)
      : cols_(cols),
        factor_(factor),
        importance_(importance),
        rule_(rule),
        run_cols_(run_cols),
        weights_(cols * kTile),
        errors_(cols * kTile),
        unrounded_(std::min(run_cols, cols) * kTile),
        run_(std::min(run_cols, cols)) {}

  // `rows` <= kTile rows of target and trits; `scales` [rows, runs], or null with `scale` for all.
  void Round(const double* target, size_t rows, float scale, float* scales, int8_t* trits) {
    for (size_t r = 0; r < kTile; ++r) {
      for (size_t k = 0; k < cols_; ++k) {
        weights_[k * kTile + r] = r < rows ? target[r * cols_ + k] : 0.0;
      }
    }
    std::ranges::fill(errors_.span(), 0.0);
    const size_t runs = DivCeil(cols_, run_cols_);
    for (size_t run = 0; run < runs; ++run) {
      const size_t begin = run * run_cols_, end = std::min(cols_, begin + run_cols_);
      if (scales != nullptr) Anticipate(begin, end);
      double run_scales[kTile];
      for (size_t r = 0; r < kTile; ++r) {
        run_scales[r] = scales == nullptr ? static_cast<double>(scale) : Choose(begin, end, r);
        if (scales != nullptr && r < rows) {
          scales[r * runs + run] = static_cast<float>(run_scales[r]);
        }
      }
      for (size_t k = begin; k < end; ++k) {
        RoundColumn(k, rows, run_scales, trits);
        if (!factor_.empty()) Feed(k, k + 1, k + 1, end);
      }
      if (!factor_.empty()) Feed(begin, end, end, cols_);
    }
  }

 private:
  // What the columns begin .. end would be, each with the feedback of all on its left, if they were
  // not rounded: the weights that a scale is chosen for.
  void Anticipate(size_t begin, size_t end) {
    for (size_t k = begin; k < end; ++k) {
      double sums[kTile] = {};
      if (!factor_.empty()) {
        std::copy_n(errors_.data() + k * kTile, kTile, sums);
        for (size_t j = begin; j < k; ++j) {
          const double factor = factor_[j * cols_ + k];
          const double* error = unrounded_.data() + (j - begin) * kTile;
          for (size_t r = 0; r < kTile; ++r) sums[r] += error[r] * factor;
        }
        for (double& sum : sums) sum /= -factor_[k * cols_ + k];
      }
      std::copy_n(sums, kTile, unrounded_.data() + (k - begin) * kTile);
    }
  }

  // Weight k of row r with the feedback of the columns on its left. errors_ holds that sum until
  // the column is rounded, its error after.
  double Compensated(size_t k, size_t r) const {
    const double weight = weights_[k * kTile + r];
    return factor_.empty() ? weight : weight + errors_[k * kTile + r] / factor_[k * cols_ + k];
  }

  double Choose(size_t begin, size_t end, size_t r) {
    for (size_t k = begin; k < end; ++k) {
      const double weight = weights_[k * kTile + r] - unrounded_[(k - begin) * kTile + r];
      run_[k - begin] = {std::abs(weight), importance_[k]};
    }
    const double scale = ScaleOf(std::span(run_).first(end - begin), rule_);
    return scale > 0 ? static_cast<double>(StoredScale(scale)) : 0.0;
  }

  void RoundColumn(size_t k, size_t rows, const double* scales, int8_t* trits) {
    for (size_t r = 0; r < kTile; ++r) {
      const double weight = Compensated(k, r), half = scales[r] / 2;
      const int trit = scales[r] > 0 ? (weight > half) - (weight < -half) : 0;
      if (r < rows) trits[r * cols_ + k] = static_cast<int8_t>(trit);
      errors_[k * kTile + r] = weights_[k * kTile + r] - trit * scales[r];
    }
  }

  // Adds the errors of the columns first .. last to the feedback of begin .. end.
  void Feed(size_t first, size_t last, size_t begin, size_t end) {
    for (size_t k = begin; k < end; ++k) {
      double sums[kTile];
      double* sum = errors_.data() + k * kTile;
      std::copy_n(sum, kTile, sums);
      for (size_t j = first; j < last; ++j) {
        const double factor = factor_[j * cols_ + k];
        const double* error = errors_.data() + j * kTile;
        for (size_t r = 0; r < kTile; ++r) sums[r] += error[r] * factor;
      }
      std::copy_n(sums, kTile, sum);
    }
  }

  size_t cols_;
  std::span<const double> factor_;
  std::span<const double> importance_;
  ScaleRule rule_;
  size_t run_cols_;
  AlignedArray<double> weights_;
  AlignedArray<double> errors_;
  AlignedArray<double> unrounded_;  // errors of one run, see Anticipate
  std::vector<Weight> run_;
};

}  // namespace

ScaleRule ScaleRuleFromName(std::string_view name) {
  if (name == "fit") return ScaleRule::kFit;
  if (name == "grid") return ScaleRule::kGrid;
  if (name == "absmean") return ScaleRule::kAbsMean;
  Check(name == "twn", "[calibrate] a rule is fit, grid, absmean or twn, got '", name, "'");
  return ScaleRule::kTwn;
}

void SumSecondMoments(std::span<const float> x, size_t cols, const Team& team,
                      std::span<double> sums) {
  Check(cols > 0 && x.size() % cols == 0 && sums.size() == cols * cols,
        "[second_moments] activations are [tokens, ", cols, "] and sums [", cols, ", ", cols,
        "], got ", x.size(), " and ", sums.size(), " values");
  CheckActivations(x, cols);
  const size_t tokens = x.size() / cols;
  AlignedArray<double> packed(MomentDoubles(std::min(tokens, kPartTokens), cols));
  for (size_t begin = 0; begin < tokens; begin += kPartTokens) {
    const size_t part = std::min(kPartTokens, tokens - begin);
    team.Run([&](Worker& worker) {
      PackMoments(x.data() + begin * cols, part, cols, worker.Share(Panels(cols)), packed.data());
      worker.Barrier();
      AddSecondMoments(worker, packed.data(), cols, part, sums.data());
    });
  }
}

void SumCrossMoments(std::span<const float> a, size_t cols_a, std::span<const float> b,
                     size_t cols_b, const Team& team, std::span<double> sums) {
  Check(cols_a > 0 && cols_b > 0 && a.size() % cols_a == 0 &&
            b.size() == a.size() / cols_a * cols_b && sums.size() == cols_a * cols_b,
        "[second_moments] activations are [tokens, ", cols_a, "] and [tokens, ", cols_b,
        "] and sums [", cols_a, ", ", cols_b, "], got ", a.size(), ", ", b.size(), " and ",
        sums.size(), " values");
  CheckActivations(a, cols_a);
  CheckActivations(b, cols_b);
  const size_t tokens = a.size() / cols_a, most = std::min(tokens, kPartTokens);
  AlignedArray<double> packed_a(MomentDoubles(most, cols_a));
  AlignedArray<double> packed_b(MomentDoubles(most, cols_b));
  for (size_t begin = 0; begin < tokens; begin += kPartTokens) {
    const size_t part = std::min(kPartTokens, tokens - begin);
    team.Run([&](Worker& worker) {
      PackMoments(a.data() + begin * cols_a, part, cols_a, worker.Share(Panels(cols_a)),
                  packed_a.data());
      PackMoments(b.data() + begin * cols_b, part, cols_b, worker.Share(Panels(cols_b)),
                  packed_b.data());
      worker.Barrier();
      AddMoments(worker, packed_a.data(), cols_a, packed_b.data(), cols_b, part, sums.data());
    });
  }
}

void RoundWithFeedback(std::span<const double> target, size_t rows, size_t cols,
                       std::span<const double> factor, std::span<const double> importance,
                       ScaleRule rule, ScaleKind kind, size_t group_size, const Team& team,
                       std::span<int8_t> trits, std::span<float> scales) {
  Check(scales.size() == ScaleCount(kind, group_size, rows, cols) && target.size() == rows * cols &&
            trits.size() == rows * cols && importance.size() == cols &&
            (factor.empty() || factor.size() == cols * cols),
        "[calibrate] sizes do not match ", rows, " x ", cols);
  const auto finite = [](double value) { return std::isfinite(value); };
  Check(std::ranges::all_of(target, finite), "[calibrate] the target must be finite");
  Check(std::ranges::all_of(importance, [](double h) { return h > 0 && std::isfinite(h); }),
        "[calibrate] importances must be positive and finite");
  for (size_t k = 0; k < (factor.empty() ? 0 : cols); ++k) {
    const double diagonal = factor[k * cols + k];
    Check(diagonal > 0 && std::ranges::all_of(factor.subspan(k * cols + k, cols - k), finite),
          "[calibrate] the factor is finite with a positive diagonal, got ", diagonal, " in row ",
          k);
  }
  const bool given = kind == ScaleKind::kTensor;
  const size_t run_cols = kind == ScaleKind::kGroup ? group_size : cols;
  const size_t runs = DivCeil(cols, run_cols), tiles = DivCeil(rows, kTile);
  const Team small(std::clamp<size_t>(tiles, 1, team.threads()));
  // Made here, because nothing may throw inside a team.
  std::vector<TileRounder> rounders;
  for (size_t i = 0; i < small.threads(); ++i) {
    rounders.emplace_back(cols, factor, importance, rule, run_cols);
  }
  small.Run([&](Worker& worker) {
    const Range share = worker.Share(tiles);
    for (size_t tile = share.begin; tile < share.end; ++tile) {
      const size_t row = tile * kTile;
      rounders[worker.index()].Round(
          target.data() + row * cols, std::min(kTile, rows - row), given ? scales[0] : 0.0f,
          given ? nullptr : scales.data() + row * runs, trits.data() + row * cols);
    }
  });
  for (size_t i = 0; i < scales.size(); ++i) {
    Check(scales[i] <= kLargestF16, "[calibrate] the scale ", scales[i], " of row ", i / runs,
          " is above 65504, the largest 16-bit float: scale the weights down");
  }
}

}  // namespace tf
