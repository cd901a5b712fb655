// SPDX-License-Identifier: Apache-2.0
// Outer products: tiles of 4 rows and two vectors stay in registers while all tokens go by.
#include "kernels/second_moments.h"

#include <algorithm>

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/second_moments.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

#if HWY_HAVE_FLOAT64
namespace hn = hwy::HWY_NAMESPACE;

// tile [kMomentPanel x kMomentPanel] = a^T b for one panel of each.
void MomentTile(const double* HWY_RESTRICT a, const double* HWY_RESTRICT b, size_t tokens,
                double* HWY_RESTRICT tile) {
  const hn::CappedTag<double, kMomentPanel / 2> d;
  const size_t lanes = hn::Lanes(d);
  for (size_t row = 0; row < kMomentPanel; row += 4) {
    for (size_t col = 0; col < kMomentPanel; col += 2 * lanes) {
      auto s00 = hn::Zero(d), s01 = hn::Zero(d), s10 = hn::Zero(d), s11 = hn::Zero(d);
      auto s20 = hn::Zero(d), s21 = hn::Zero(d), s30 = hn::Zero(d), s31 = hn::Zero(d);
      const double* from_a = a + row;
      const double* from_b = b + col;
      for (size_t t = 0; t < tokens; ++t, from_a += kMomentPanel, from_b += kMomentPanel) {
        const auto b0 = hn::LoadU(d, from_b);
        const auto b1 = hn::LoadU(d, from_b + lanes);
        const auto a0 = hn::Set(d, from_a[0]), a1 = hn::Set(d, from_a[1]);
        s00 = hn::MulAdd(a0, b0, s00);
        s01 = hn::MulAdd(a0, b1, s01);
        s10 = hn::MulAdd(a1, b0, s10);
        s11 = hn::MulAdd(a1, b1, s11);
        const auto a2 = hn::Set(d, from_a[2]), a3 = hn::Set(d, from_a[3]);
        s20 = hn::MulAdd(a2, b0, s20);
        s21 = hn::MulAdd(a2, b1, s21);
        s30 = hn::MulAdd(a3, b0, s30);
        s31 = hn::MulAdd(a3, b1, s31);
      }
      double* to = tile + row * kMomentPanel + col;
      hn::StoreU(s00, d, to);
      hn::StoreU(s01, d, to + lanes);
      hn::StoreU(s10, d, to + kMomentPanel);
      hn::StoreU(s11, d, to + kMomentPanel + lanes);
      hn::StoreU(s20, d, to + 2 * kMomentPanel);
      hn::StoreU(s21, d, to + 2 * kMomentPanel + lanes);
      hn::StoreU(s30, d, to + 3 * kMomentPanel);
      hn::StoreU(s31, d, to + 3 * kMomentPanel + lanes);
    }
  }
}
#else
void MomentTile(const double* a, const double* b, size_t tokens, double* tile) {
  std::fill_n(tile, kMomentPanel * kMomentPanel, 0.0);
  for (size_t t = 0; t < tokens; ++t, a += kMomentPanel, b += kMomentPanel) {
    for (size_t i = 0; i < kMomentPanel; ++i) {
      for (size_t j = 0; j < kMomentPanel; ++j) tile[i * kMomentPanel + j] += a[i] * b[j];
    }
  }
}
#endif

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(MomentTile);

constexpr size_t Panels(size_t cols) { return (cols + kMomentPanel - 1) / kMomentPanel; }

}  // namespace

void PackMoments(const float* x, size_t tokens, size_t cols, Range panels, double* packed) {
  for (size_t panel = panels.begin; panel < panels.end; ++panel) {
    const size_t begin = panel * kMomentPanel, size = std::min(kMomentPanel, cols - begin);
    double* to = packed + panel * kMomentPanel * tokens;
    for (size_t t = 0; t < tokens; ++t, to += kMomentPanel) {
      const float* from = x + t * cols + begin;
      std::copy_n(from, size, to);
      std::fill(to + size, to + kMomentPanel, 0.0);
    }
  }
}

void AddMoments(const Worker& worker, const double* a, size_t cols_a, const double* b,
                size_t cols_b, size_t tokens, double* sums) {
  const auto tile_of = HWY_DYNAMIC_DISPATCH(MomentTile);
  double tile[kMomentPanel * kMomentPanel];
  for (size_t i = worker.index(); i < Panels(cols_a); i += worker.count()) {
    for (size_t j = 0; j < Panels(cols_b); ++j) {
      tile_of(a + i * kMomentPanel * tokens, b + j * kMomentPanel * tokens, tokens, tile);
      for (size_t row = 0; row < std::min(kMomentPanel, cols_a - i * kMomentPanel); ++row) {
        double* to = sums + (i * kMomentPanel + row) * cols_b + j * kMomentPanel;
        for (size_t col = 0; col < std::min(kMomentPanel, cols_b - j * kMomentPanel); ++col) {
          to[col] += tile[row * kMomentPanel + col];
        }
      }
    }
  }
}

void AddSecondMoments(const Worker& worker, const double* a, size_t cols, size_t tokens,
                      double* sums) {
  const auto tile_of = HWY_DYNAMIC_DISPATCH(MomentTile);
  double tile[kMomentPanel * kMomentPanel];
  for (size_t i = worker.index(); i < Panels(cols); i += worker.count()) {
    for (size_t j = i; j < Panels(cols); ++j) {
      tile_of(a + i * kMomentPanel * tokens, a + j * kMomentPanel * tokens, tokens, tile);
      for (size_t r = 0; r < std::min(kMomentPanel, cols - i * kMomentPanel); ++r) {
        for (size_t c = 0; c < std::min(kMomentPanel, cols - j * kMomentPanel); ++c) {
          const size_t row = i * kMomentPanel + r, col = j * kMomentPanel + c;
          sums[row * cols + col] += tile[r * kMomentPanel + c];
          if (i != j) sums[col * cols + row] = sums[row * cols + col];
        }
      }
    }
  }
}

}  // namespace tf
#endif  // HWY_ONCE
