// SPDX-License-Identifier: Apache-2.0
// Coordinate descent over levels between joint solutions for the scales, in tiles of eight rows.
#include "quant/descent.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "quant/nearest_level.h"
#include "quant/packer.h"
#include "quant/stored_scale.h"

namespace tf {
namespace {

constexpr size_t kTile = 8;

// sums [cols][kTile] += moments[:, begin .. end] * values[begin .. end][kTile].
void Multiply(const double* moments, size_t cols, size_t begin, size_t end, const double* values,
              double* sums) {
  constexpr size_t kTogether = 4;  // columns for which a sum is loaded and stored once
  static constexpr double kZeros[kTile] = {};
  for (size_t j = begin; j < end; j += kTogether) {
    const double* value[kTogether];
    const double* moment[kTogether];
    for (size_t i = 0; i < kTogether; ++i) {
      value[i] = j + i < end ? values + (j + i) * kTile : kZeros;
      moment[i] = moments + std::min(j + i, end - 1) * cols;
    }
    for (size_t k = 0; k < cols; ++k) {
      double* sum = sums + k * kTile;
      for (size_t r = 0; r < kTile; ++r) {
        sum[r] += moment[0][k] * value[0][r] + moment[1][k] * value[1][r] +
                  moment[2][k] * value[2][r] + moment[3][k] * value[3][r];
      }
    }
  }
}

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
        gradient_(cols),
        matrix_(runs_ * runs_),
        right_(runs_),
        scales_(runs_) {}

  // `rows` <= kTile rows of target and levels; `scales` [rows, runs], or the one that all share.
  void Run(const double* target, size_t rows, size_t rounds, size_t sweeps, int8_t* levels,
           float* scales) {
    Interleave(target, rows);
    std::ranges::fill(aimed_.span(), 0.0);
    Multiply(moments_.data(), cols_, 0, cols_, values_.data(), aimed_.data());
    for (size_t round = 0; round <= rounds; ++round) {
      Interleave(levels, rows);
      std::ranges::fill(images_.span(), 0.0);
      for (size_t run = 0; run < runs_; ++run) {
        Multiply(moments_.data(), cols_, run * run_cols_, std::min(cols_, (run + 1) * run_cols_),
                 values_.data(), images_.data() + run * cols_ * kTile);
      }
      for (size_t r = 0; r < rows; ++r) {
        RunRow(r, round == rounds ? 0 : sweeps, levels + r * cols_,
               fixed_scale_ ? scales : scales + r * runs_);
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

  void RunRow(size_t r, size_t sweeps, int8_t* levels, float* scales) {
    MakeSystem(r, levels);
    if (!fixed_scale_) Refit(r, levels, scales);
    for (size_t run = 0; run < runs_; ++run) {
      scales_[run] = static_cast<double>(scales[fixed_scale_ ? 0 : run]);
    }
    for (size_t k = 0; k < cols_; ++k) {
      gradient_[k] = aimed_[k * kTile + r];
      for (size_t run = 0; run < runs_; ++run) {
        gradient_[k] -= scales_[run] * images_[(run * cols_ + k) * kTile + r];
      }
    }
    for (size_t sweep = 0; sweep < sweeps; ++sweep) {
      if (!Sweep(levels)) break;
    }
  }

  // The error as a quadratic function of the scales: matrix_, right_.
  void MakeSystem(size_t r, const int8_t* levels) {
    std::ranges::fill(matrix_, 0.0);
    std::ranges::fill(right_, 0.0);
    for (size_t k = 0; k < cols_; ++k) {
      if (levels[k] == 0) continue;
      const size_t run = k / run_cols_;
      right_[run] += levels[k] * aimed_[k * kTile + r];
      for (size_t other = 0; other < runs_; ++other) {
        matrix_[run * runs_ + other] += levels[k] * images_[(other * cols_ + k) * kTile + r];
      }
    }
  }

  void Refit(size_t r, int8_t* levels, float* scales) {
    for (size_t run = 0; run < runs_; ++run) scales_[run] = static_cast<double>(scales[run]);
    const double before = ErrorOfScales();
    std::vector<double> old = scales_;
    Solve(matrix_, right_, scales_);
    for (double& scale : scales_) {
      const double stored = static_cast<double>(StoredScale(std::abs(scale)));
      scale = scale == 0 ? 0.0 : std::copysign(stored, scale);
    }
    if (!(ErrorOfScales() < before)) {
      scales_ = old;
      return;
    }
    for (size_t run = 0; run < runs_; ++run) {
      scales[run] = static_cast<float>(std::abs(scales_[run]));
      if (scales_[run] >= 0) continue;
      for (size_t k = run * run_cols_; k < std::min(cols_, (run + 1) * run_cols_); ++k) {
        levels[k] = static_cast<int8_t>(-levels[k]);
      }
      for (size_t k = 0; k < cols_; ++k) {
        double& image = images_[(run * cols_ + k) * kTile + r];
        image = -image;
      }
    }
  }

  // But for what does not depend on the scales.
  double ErrorOfScales() const {
    double error = 0;
    for (size_t i = 0; i < runs_; ++i) {
      double row = -2 * right_[i];
      for (size_t j = 0; j < runs_; ++j) row += matrix_[i * runs_ + j] * scales_[j];
      error += scales_[i] * row;
    }
    return error;
  }

  // Visits every level once; whether one has changed.
  bool Sweep(int8_t* levels) {
    bool changed = false;
    for (size_t k = 0; k < cols_; ++k) {
      const double scale = scales_[k / run_cols_], own = moments_[k * cols_ + k];
      if (scale == 0) continue;
      // The change d of a weight changes the error by d (d own - 2 gradient): best near
      // gradient / own.
      const double wish = levels[k] + gradient_[k] / (own * scale);
      const int level = NearestLevel(wish, 1.0, max_level_);
      if (level == levels[k]) continue;
      const double change = (level - levels[k]) * scale;
      if (change * (change * own - 2 * gradient_[k]) >= 0) continue;
      levels[k] = static_cast<int8_t>(level);
      const double* moment = moments_.data() + k * cols_;
      for (size_t i = 0; i < cols_; ++i) gradient_[i] -= change * moment[i];
      changed = true;
    }
    return changed;
  }

  size_t cols_;
  int max_level_;
  size_t runs_, run_cols_;
  bool fixed_scale_;
  std::span<const double> moments_;
  AlignedArray<double> aimed_;   // moments * target
  AlignedArray<double> values_;  // target or levels, row beside row
  AlignedArray<double> images_;  // moments * levels by run
  AlignedArray<double> gradient_;
  std::vector<double> matrix_, right_, scales_;
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
