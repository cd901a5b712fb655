// SPDX-License-Identifier: Apache-2.0
// Coordinate descent over levels between joint solutions for the scales, in tiles of rows that
// share the moments.
#include "quant/descent.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "kernels/tile_products.h"
#include "quant/nearest_level.h"
#include "quant/packer.h"
#include "quant/stored_scale.h"

namespace tf {
namespace {

constexpr size_t kTile = kProductRows;

// Conjugate gradients for a x = b with a [n, n] symmetric, positive semidefinite; exact after n
// steps but for rounding.
void Solve(const std::vector<double>& a, const std::vector<double>& b, std::vector<double>& x) {
  const size_t n = b.size();
  std::vector<double> rest(n), direction(n), image(n);
  const auto multiply = [&](const std::vector<double>& v, std::vector<double>& out) {
    for (size_t i = 0; i < n; ++i) {
      out[i] = 0;
      for (size_t j = 0; j < n; ++j) out[i] += a[i * n + j] * v[j];
    }
  };
  const auto dot = [&](const std::vector<double>& u, const std::vector<double>& v) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += u[i] * v[i];
    return sum;
  };
  multiply(x, image);
  for (size_t i = 0; i < n; ++i) direction[i] = rest[i] = b[i] - image[i];
  double energy = dot(rest, rest);
  const double enough = 1e-20 * dot(b, b);
  for (size_t step = 0; step < 2 * n && energy > enough; ++step) {
    multiply(direction, image);
    const double curvature = dot(direction, image);
    if (curvature <= 0) return;
    const double length = energy / curvature;
    for (size_t i = 0; i < n; ++i) {
      x[i] += length * direction[i];
      rest[i] -= length * image[i];
    }
    const double next = dot(rest, rest);
    for (size_t i = 0; i < n; ++i) direction[i] = rest[i] + next / energy * direction[i];
    energy = next;
  }
}

// The rows of one tile on their way down.
class Tile {
 public:
  Tile(size_t cols, std::span<const double> moments, Alphabet alphabet, size_t run_cols,
       bool fixed_scale)
      : cols_(cols),
        max_level_(MaxLevel(alphabet)),
        runs_(DivCeil(cols, run_cols)),
        run_cols_(run_cols),
        fixed_scale_(fixed_scale),
        moments_(moments),
        aimed_(cols * kTile),
        values_(cols * kTile),
        images_(runs_ * cols * kTile),
        gradients_(kTile * cols),
        systems_(runs_ * (runs_ + 1) * kTile),
        matrix_(runs_ * runs_),
        right_(runs_),
        solved_(runs_),
        scales_(runs_ * kTile) {}

  // `rows` <= kTile rows of target and levels; `scales` [rows, runs], or the one that all share.
  void Run(const double* target, size_t rows, size_t rounds, size_t sweeps, int8_t* levels,
           float* scales) {
    Interleave(target, rows);
    std::ranges::fill(aimed_.span(), 0.0);
    Multiply({0, cols_}, aimed_.data());
    for (size_t round = 0; round <= rounds; ++round) {
      Interleave(levels, rows);
      std::ranges::fill(images_.span(), 0.0);
      for (size_t run = 0; run < runs_; ++run) {
        Multiply(ColumnsOf(run), images_.data() + run * cols_ * kTile);
      }
      if (!fixed_scale_) MakeSystems();
      for (size_t r = 0; r < rows; ++r) {
        float* own = fixed_scale_ ? scales : scales + r * runs_;
        if (!fixed_scale_) Refit(r, levels + r * cols_, own);
        for (size_t run = 0; run < runs_; ++run) {
          scales_[run * kTile + r] = static_cast<double>(own[fixed_scale_ ? 0 : run]);
        }
      }
      if (round == rounds) break;
      MakeGradients();
      for (size_t r = 0; r < rows; ++r) {
        for (size_t sweep = 0; sweep < sweeps; ++sweep) {
          if (!Sweep(r, levels + r * cols_)) break;
        }
      }
    }
  }

 private:
  template <typename Value>
  void Interleave(const Value* from, size_t rows) {
    for (size_t r = 0; r < kTile; ++r) {
      for (size_t k = 0; k < cols_; ++k) {
        values_[k * kTile + r] = r < rows ? static_cast<double>(from[r * cols_ + k]) : 0.0;
      }
    }
  }

  Range ColumnsOf(size_t run) const {
    return {run * run_cols_, std::min(cols_, (run + 1) * run_cols_)};
  }

  // sums [cols][kTile] += moments * values_, of some of the columns.
  void Multiply(Range columns, double* sums) {
    AddTileProducts(moments_.data(), cols_, false, columns, {0, cols_}, kTile, values_.data(),
                    sums);
  }

  // The error of every row as a quadratic function of its scales: of a run, its products with the
  // images of all runs, then with aimed_.
  void MakeSystems() {
    std::ranges::fill(systems_.span(), 0.0);
    for (size_t run = 0; run < runs_; ++run) {
      const Range columns = ColumnsOf(run);
      for (size_t other = 0; other <= runs_; ++other) {
        const double* image =
            other < runs_ ? images_.data() + other * cols_ * kTile : aimed_.data();
        double* sums = systems_.data() + (run * (runs_ + 1) + other) * kTile;
        for (size_t i = columns.begin * kTile; i < columns.end * kTile; i += kTile) {
          for (size_t r = 0; r < kTile; ++r) sums[r] += values_[i + r] * image[i + r];
        }
      }
    }
  }

  void Refit(size_t r, int8_t* levels, float* scales) {
    for (size_t run = 0; run < runs_; ++run) {
      const double* sums = systems_.data() + run * (runs_ + 1) * kTile + r;
      for (size_t other = 0; other < runs_; ++other) {
        matrix_[run * runs_ + other] = sums[other * kTile];
      }
      right_[run] = sums[runs_ * kTile];
      solved_[run] = static_cast<double>(scales[run]);
    }
    const double before = ErrorOfScales();
    Solve(matrix_, right_, solved_);
    for (double& scale : solved_) {
      const double stored = static_cast<double>(StoredScale(std::abs(scale)));
      scale = scale == 0 ? 0.0 : std::copysign(stored, scale);
    }
    if (!(ErrorOfScales() < before)) return;
    for (size_t run = 0; run < runs_; ++run) {
      scales[run] = static_cast<float>(std::abs(solved_[run]));
      if (solved_[run] >= 0) continue;
      const Range columns = ColumnsOf(run);
      for (size_t k = columns.begin; k < columns.end; ++k) {
        levels[k] = static_cast<int8_t>(-levels[k]);
      }
      for (size_t k = 0; k < cols_; ++k) {
        double& image = images_[(run * cols_ + k) * kTile + r];
        image = -image;
      }
    }
  }

  // aimed_ less the images of all runs, row after row.
  void MakeGradients() {
    for (size_t k = 0; k < cols_; ++k) {
      double gradient[kTile];
      std::copy_n(aimed_.data() + k * kTile, kTile, gradient);
      for (size_t run = 0; run < runs_; ++run) {
        const double* image = images_.data() + (run * cols_ + k) * kTile;
        const double* scale = scales_.data() + run * kTile;
        for (size_t r = 0; r < kTile; ++r) gradient[r] -= scale[r] * image[r];
      }
      for (size_t r = 0; r < kTile; ++r) gradients_[r * cols_ + k] = gradient[r];
    }
  }

  // But for what does not depend on the scales.
  double ErrorOfScales() const {
    double error = 0;
    for (size_t i = 0; i < runs_; ++i) {
      double row = -2 * right_[i];
      for (size_t j = 0; j < runs_; ++j) row += matrix_[i * runs_ + j] * solved_[j];
      error += solved_[i] * row;
    }
    return error;
  }

  // Visits every level of a row once; whether one has changed.
  bool Sweep(size_t r, int8_t* levels) {
    double* gradient = gradients_.data() + r * cols_;
    bool changed = false;
    for (size_t k = 0; k < cols_; ++k) {
      const double scale = scales_[k / run_cols_ * kTile + r], own = moments_[k * cols_ + k];
      if (scale == 0) continue;
      // The change d of a weight changes the error by d (d own - 2 gradient): best near
      // gradient / own.
      const double wish = levels[k] + gradient[k] / (own * scale);
      const int level = NearestLevel(wish, 1.0, max_level_);
      if (level == levels[k]) continue;
      const double change = (level - levels[k]) * scale;
      if (change * (change * own - 2 * gradient[k]) >= 0) continue;
      levels[k] = static_cast<int8_t>(level);
      const double* moment = moments_.data() + k * cols_;
      for (size_t i = 0; i < cols_; ++i) gradient[i] -= change * moment[i];
      changed = true;
    }
    return changed;
  }

  size_t cols_;
  int max_level_;
  size_t runs_, run_cols_;
  bool fixed_scale_;
  std::span<const double> moments_;
  AlignedArray<double> aimed_;                   // moments * target
  AlignedArray<double> values_;                  // target or levels, row beside row
  AlignedArray<double> images_;                  // moments * levels by run
  AlignedArray<double> gradients_;               // row after row
  AlignedArray<double> systems_;                 // [runs][runs + 1][kTile], see MakeSystems
  std::vector<double> matrix_, right_, solved_;  // of one row
  std::vector<double> scales_;                   // [runs][kTile]
};

}  // namespace

void Descend(std::span<const double> target, size_t rows, size_t cols,
             std::span<const double> moments, Alphabet alphabet, ScaleKind kind, size_t group_size,
             size_t rounds, size_t sweeps, const Team& team, std::span<int8_t> levels,
             std::span<float> scales) {
  Check(scales.size() == ScaleCount(kind, group_size, rows, cols) && target.size() == rows * cols &&
            levels.size() == rows * cols && moments.size() == cols * cols,
        "[calibrate] sizes do not match ", rows, " x ", cols);
  for (size_t k = 0; k < cols; ++k) {
    Check(moments[k * cols + k] > 0, "[calibrate] second moments have a positive diagonal, got ",
          moments[k * cols + k], " in column ", k);
  }
  const bool fixed = kind == ScaleKind::kTensor;
  const size_t run_cols = kind == ScaleKind::kGroup ? group_size : cols;
  const size_t runs = DivCeil(cols, run_cols), tiles = DivCeil(rows, kTile);
  const Team small(std::clamp<size_t>(tiles, 1, team.threads()));
  // Made here, because nothing may throw inside a team.
  std::vector<Tile> workspaces;
  for (size_t i = 0; i < small.threads(); ++i) {
    workspaces.emplace_back(cols, moments, alphabet, run_cols, fixed);
  }
  small.Run([&](Worker& worker) {
    const Range share = worker.Share(tiles);
    for (size_t tile = share.begin; tile < share.end; ++tile) {
      const size_t row = tile * kTile;
      workspaces[worker.index()].Run(target.data() + row * cols, std::min(kTile, rows - row),
                                     rounds, sweeps, levels.data() + row * cols,
                                     fixed ? scales.data() : scales.data() + row * runs);
    }
  });
  for (size_t i = 0; i < scales.size(); ++i) {
    Check(scales[i] <= kLargestF16, "[calibrate] the scale ", scales[i], " of row ", i / runs,
          " is above 65504, the largest 16-bit float: scale the weights down");
  }
}

}  // namespace tf
