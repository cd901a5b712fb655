// SPDX-License-Identifier: Apache-2.0
// Two triangular solves for tiles of rows that share the factor.
#include "quant/moment_factor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "kernels/tile_products.h"

namespace tf {
namespace {

constexpr size_t kTile = 2 * kProductRows;
constexpr size_t kFedColumns = 128;  // whose solutions go to all other columns at once

// Solves x R R^T = lacking for kTile rows. Everything of a column lies side by side: [cols][kTile].
class Corrector {
 public:
  Corrector(size_t cols, const double* factor)
      : cols_(cols), factor_(factor), solved_(cols * kTile), sums_(cols * kTile) {}

  void Add(const double* lacking, size_t rows, double* target) {
    const size_t blocks = DivCeil(cols_, kFedColumns);
    std::ranges::fill(sums_.span(), 0.0);
    for (size_t block = blocks; block-- > 0;) {  // y R^T = lacking, from the last column
      const Range columns{block * kFedColumns, std::min(cols_, (block + 1) * kFedColumns)};
      for (size_t k = columns.end; k-- > columns.begin;) {
        for (size_t r = 0; r < kTile; ++r) {
          Solve(k, r, r < rows ? lacking[r * cols_ + k] : 0.0);
        }
        Feed(true, {k, k + 1}, {columns.begin, k});
      }
      Feed(true, columns, {0, columns.begin});
    }
    std::ranges::fill(sums_.span(), 0.0);
    for (size_t block = 0; block < blocks; ++block) {  // x R = y, from the first
      const Range columns{block * kFedColumns, std::min(cols_, (block + 1) * kFedColumns)};
      for (size_t k = columns.begin; k < columns.end; ++k) {
        for (size_t r = 0; r < kTile; ++r) {
          Solve(k, r, solved_[k * kTile + r]);
          if (r < rows) target[r * cols_ + k] += solved_[k * kTile + r];
        }
        Feed(false, {k, k + 1}, {k + 1, columns.end});
      }
      Feed(false, columns, {columns.end, cols_});
    }
  }

 private:
  void Solve(size_t k, size_t r, double right) {
    solved_[k * kTile + r] = (right - sums_[k * kTile + r]) / factor_[k * cols_ + k];
  }

  void Feed(bool transposed, Range from, Range to) {
    AddTileProducts(factor_, cols_, transposed, from, to, kTile, solved_.data(), sums_.data());
  }

  size_t cols_;
  const double* factor_;
  AlignedArray<double> solved_, sums_;
};

}  // namespace

void CheckMomentFactor(std::span<const double> factor, size_t cols) {
  for (size_t k = 0; k < cols; ++k) {
    const double diagonal = factor[k * cols + k];
    const auto row = factor.subspan(k * cols + k, cols - k);
    Check(diagonal > 0 && std::ranges::all_of(row, [](double r) { return std::isfinite(r); }),
          "[calibrate] the factor is finite with a positive diagonal, got ", diagonal, " in row ",
          k);
  }
}

void AddCorrection(std::span<double> target, size_t rows, size_t cols,
                   std::span<const double> lacking, std::span<const double> factor,
                   const Team& team) {
  Check(
      target.size() == rows * cols && lacking.size() == rows * cols && factor.size() == cols * cols,
      "[calibrate] sizes do not match ", rows, " x ", cols);
  CheckMomentFactor(factor, cols);
  const size_t tiles = DivCeil(rows, kTile);
  const Team small(std::clamp<size_t>(tiles, 1, team.threads()));
  std::vector<Corrector> correctors;  // made here, because nothing may throw inside a team
  for (size_t i = 0; i < small.threads(); ++i) correctors.emplace_back(cols, factor.data());
  small.Run([&](Worker& worker) {
    const Range share = worker.Share(tiles);
    for (size_t row = share.begin * kTile; row < std::min(rows, share.end * kTile); row += kTile) {
      correctors[worker.index()].Add(lacking.data() + row * cols, std::min(kTile, rows - row),
                                     target.data() + row * cols);
    }
  });
}

}  // namespace tf
