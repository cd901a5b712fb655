// SPDX-License-Identifier: Apache-2.0
// Moments in parts of a few hundred tokens; rounding in tiles of rows that share the factor.
#include "quant/calibrator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "kernels/second_moments.h"
#include "kernels/tile_products.h"
#include "quant/moment_factor.h"
#include "quant/nearest_level.h"
#include "quant/packer.h"
#include "quant/stored_scale.h"
#include "quant/weight_scan.h"

namespace tf {
namespace {

constexpr size_t kPartTokens = 256;
constexpr size_t kTile = 2 * kProductRows;  // rows that are rounded together, with feedback
constexpr size_t kFedColumns = 128;         // whose errors go to all columns behind them at once
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

struct Weight {
  double size;
  double importance;
};

// Where the nearest level of one weight grows by one as the scale falls: below `scale`. What that
// adds to the sums of h|w|l and of h l^2.
struct Step {
  double scale;
  double product;
  double square;
};

double FitScale(std::span<const Weight> run, int max_level, std::span<Step> steps) {
  size_t count = 0;
  for (const Weight& weight : run) {
    for (int level = 0; level < max_level; ++level) {
      steps[count++] = {weight.size / (level + 0.5), weight.importance * weight.size,
                        weight.importance * (2 * level + 1)};
    }
  }
  steps = steps.first(count);
  std::ranges::sort(steps, [](const Step& a, const Step& b) { return a.scale > b.scale; });
  double products = 0, squares = 0, best = 0, best_energy = -1;
  for (const Step& step : steps) {
    products += step.product;
    squares += step.square;
    const double energy = products * products / squares;
    if (energy > best_energy) {
      best_energy = energy;
      best = products / squares;
    }
  }
  return best;
}

double ErrorOf(std::span<const Weight> run, int max_level, double scale) {
  double error = 0;
  for (const Weight& weight : run) {
    const double rest = weight.size - NearestLevel(weight.size, scale, max_level) * scale;
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
double ScaleOf(std::span<const Weight> run, int max_level, ScaleRule rule, std::span<Step> steps) {
  if (rule == ScaleRule::kFit) return FitScale(run, max_level, steps);
  const double mean = MeanSize(run, -1.0);
  if (rule == ScaleRule::kAbsMean) return mean;
  if (rule == ScaleRule::kTwn) return MeanSize(run, kTwnThreshold * mean);
  const double first_plane = max_level == 1 ? 1.0 : 3.0;
  double best = 0, least = std::numeric_limits<double>::infinity();
  for (int step = 10; step <= 60; ++step) {
    const double scale = mean * step / 20.0 / first_plane, error = ErrorOf(run, max_level, scale);
    if (error < least) {
      least = error;
      best = scale;
    }
  }
  return best;
}

// One without feedback, so that a row may be a whole matrix.
size_t TileRows(std::span<const double> factor) { return factor.empty() ? 1 : kTile; }

// Rounds a tile of rows. Everything of a column lies side by side: [cols][tile].
class TileRounder {
 public:
  TileRounder(size_t cols, std::span<const double> factor, std::span<const double> importance,
              Alphabet alphabet, ScaleRule rule, size_t run_cols)
      : cols_(cols),
        tile_(TileRows(factor)),
        factor_(factor),
        importance_(importance),
        max_level_(MaxLevel(alphabet)),
        rule_(rule),
        run_cols_(run_cols),
        weights_(cols * tile_),
        errors_(cols * tile_),
        unrounded_(std::min(run_cols, cols) * tile_),
        run_(std::min(run_cols, cols)),
        steps_(run_.size() * static_cast<size_t>(max_level_)) {}

  // `rows` of target and levels, at most those of a tile; `scales` [rows, runs], or null with
  // `scale` for all.
  void Round(const double* target, size_t rows, float scale, float* scales, int8_t* levels) {
    for (size_t r = 0; r < tile_; ++r) {
      for (size_t k = 0; k < cols_; ++k) {
        weights_[k * tile_ + r] = r < rows ? target[r * cols_ + k] : 0.0;
      }
    }
    std::ranges::fill(errors_.span(), 0.0);
    const size_t runs = DivCeil(cols_, run_cols_);
    for (size_t run = 0; run < runs; ++run) {
      const size_t begin = run * run_cols_, end = std::min(cols_, begin + run_cols_);
      if (scales != nullptr) Anticipate(begin, end);
      double run_scales[kTile];
      for (size_t r = 0; r < tile_; ++r) {
        run_scales[r] = scales == nullptr ? static_cast<double>(scale) : Choose(begin, end, r);
        if (scales != nullptr && r < rows) {
          scales[r * runs + run] = static_cast<float>(run_scales[r]);
        }
      }
      for (size_t first = begin; first < end; first += kFedColumns) {
        const size_t last = std::min(end, first + kFedColumns);
        for (size_t k = first; k < last; ++k) {
          RoundColumn(k, rows, run_scales, levels);
          Feed({k, k + 1}, {k + 1, last});
        }
        Feed({first, last}, {last, cols_});
      }
    }
  }

 private:
  // What the columns begin .. end would be, each with the feedback of all on its left, if they were
  // not rounded: the weights that a scale is chosen for.
  void Anticipate(size_t begin, size_t end) {
    double* errors = unrounded_.data();
    if (begin == 0 || factor_.empty()) {
      std::fill_n(errors, (end - begin) * tile_, 0.0);
      return;
    }
    std::copy_n(errors_.data() + begin * tile_, (end - begin) * tile_, errors);
    const double* block = factor_.data() + begin * cols_ + begin;
    for (size_t k = 0; k < end - begin; ++k) {
      for (size_t r = 0; r < tile_; ++r) errors[k * tile_ + r] /= -block[k * cols_ + k];
      AddTileProducts(block, cols_, false, {k, k + 1}, {k + 1, end - begin}, tile_, errors, errors);
    }
  }

  // Weight k of row r with the feedback of the columns on its left. errors_ holds that sum until
  // the column is rounded, its error after.
  double Compensated(size_t k, size_t r) const {
    const double weight = weights_[k * tile_ + r];
    return factor_.empty() ? weight : weight + errors_[k * tile_ + r] / factor_[k * cols_ + k];
  }

  double Choose(size_t begin, size_t end, size_t r) {
    for (size_t k = begin; k < end; ++k) {
      const double weight = weights_[k * tile_ + r] - unrounded_[(k - begin) * tile_ + r];
      run_[k - begin] = {std::abs(weight), importance_[k]};
    }
    const double scale = ScaleOf(std::span(run_).first(end - begin), max_level_, rule_, steps_);
    return scale > 0 ? static_cast<double>(StoredScale(scale)) : 0.0;
  }

  void RoundColumn(size_t k, size_t rows, const double* scales, int8_t* levels) {
    for (size_t r = 0; r < tile_; ++r) {
      const double scale = scales[r];
      const int level = scale > 0 ? NearestLevel(Compensated(k, r), scale, max_level_) : 0;
      if (r < rows) levels[r * cols_ + k] = static_cast<int8_t>(level);
      errors_[k * tile_ + r] = weights_[k * tile_ + r] - level * scale;
    }
  }

  // Adds the errors of the columns `from` to the feedback of the columns `to`.
  void Feed(Range from, Range to) {
    if (factor_.empty()) return;
    AddTileProducts(factor_.data(), cols_, false, from, to, tile_, errors_.data(), errors_.data());
  }

  size_t cols_;
  size_t tile_;  // rows
  std::span<const double> factor_;
  std::span<const double> importance_;
  int max_level_;
  ScaleRule rule_;
  size_t run_cols_;
  AlignedArray<double> weights_;
  AlignedArray<double> errors_;
  AlignedArray<double> unrounded_;  // errors of one run, see Anticipate
  std::vector<Weight> run_;
  std::vector<Step> steps_;
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
                       Alphabet alphabet, ScaleRule rule, ScaleKind kind, size_t group_size,
                       const Team& team, std::span<int8_t> levels, std::span<float> scales) {
  Check(scales.size() == ScaleCount(kind, group_size, rows, cols) && target.size() == rows * cols &&
            levels.size() == rows * cols && importance.size() == cols &&
            (factor.empty() || factor.size() == cols * cols),
        "[calibrate] sizes do not match ", rows, " x ", cols);
  Check(alphabet == Alphabet::kTrit || rule == ScaleRule::kFit || rule == ScaleRule::kGrid,
        "[calibrate] two planes take the rule fit or grid");
  const auto finite = [](double value) { return std::isfinite(value); };
  Check(std::ranges::all_of(target, finite), "[calibrate] the target must be finite");
  Check(std::ranges::all_of(importance, [](double h) { return h > 0 && std::isfinite(h); }),
        "[calibrate] importances must be positive and finite");
  if (!factor.empty()) CheckMomentFactor(factor, cols);
  const bool given = kind == ScaleKind::kTensor;
  const size_t run_cols = kind == ScaleKind::kGroup ? group_size : cols;
  const size_t runs = DivCeil(cols, run_cols);
  const size_t height = TileRows(factor), tiles = DivCeil(rows, height);
  const Team small(std::clamp<size_t>(tiles, 1, team.threads()));
  // Made here, because nothing may throw inside a team.
  std::vector<TileRounder> rounders;
  for (size_t i = 0; i < small.threads(); ++i) {
    rounders.emplace_back(cols, factor, importance, alphabet, rule, run_cols);
  }
  small.Run([&](Worker& worker) {
    const Range share = worker.Share(tiles);
    for (size_t tile = share.begin; tile < share.end; ++tile) {
      const size_t row = tile * height;
      rounders[worker.index()].Round(
          target.data() + row * cols, std::min(height, rows - row), given ? scales[0] : 0.0f,
          given ? nullptr : scales.data() + row * runs, levels.data() + row * cols);
    }
  });
  for (size_t i = 0; i < scales.size(); ++i) {
    Check(scales[i] <= kLargestF16, "[calibrate] the scale ", scales[i], " of row ", i / runs,
          " is above 65504, the largest 16-bit float: scale the weights down");
  }
}

}  // namespace tf
