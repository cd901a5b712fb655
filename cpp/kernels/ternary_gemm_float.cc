// SPDX-License-Identifier: Apache-2.0
// GEMM on T16 tiles with float activations; see ternary_gemm.h.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/parallel.h"
#include "formats/t16.h"
#include "kernels/ternary_gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemm_float.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Sums of trit * x for one panel, columns col_begin .. col_end - 1 (col_begin a multiple of 16) and
// kTokens tokens: sums[token * 16 + row].
template <size_t kTokens>
HWY_INLINE void PanelSums(const uint8_t* HWY_RESTRICT stream, const float* HWY_RESTRICT x,
                          size_t x_stride, size_t col_begin, size_t col_end,
                          float* HWY_RESTRICT sums) {
  const hn::CappedTag<float, kPanelRows> d;
  const hn::Rebind<int32_t, decltype(d)> d32;
  const size_t lanes = hn::Lanes(d);
  const auto one = hn::Set(d, 1.0f);
  const auto mask = hn::Set(d32, 3);
  for (size_t row = 0; row < kPanelRows; row += lanes) {
    // A ternary product is exact, so fused and separate multiply-add agree.
    auto acc0 = hn::Zero(d), acc1 = acc0, acc2 = acc0, acc3 = acc0;
    for (size_t col = col_begin; col < col_end; ++col) {
      int32_t words[kPanelRows];
      std::memcpy(words, stream + col / kT16TileCols * kTileBytes + 4 * row, 4 * lanes);
      const int shift = static_cast<int>(8 * (col % 4) + T16Shift(col));
      const auto codes = hn::And(hn::ShiftRightSame(hn::LoadU(d32, words), shift), mask);
      const auto trits = hn::Sub(hn::ConvertTo(d, codes), one);
      acc0 = hn::MulAdd(trits, hn::Set(d, x[col]), acc0);
      if constexpr (kTokens == 4) {
        acc1 = hn::MulAdd(trits, hn::Set(d, x[x_stride + col]), acc1);
        acc2 = hn::MulAdd(trits, hn::Set(d, x[2 * x_stride + col]), acc2);
        acc3 = hn::MulAdd(trits, hn::Set(d, x[3 * x_stride + col]), acc3);
      }
    }
    hn::StoreU(acc0, d, sums + row);
    if constexpr (kTokens == 4) {
      hn::StoreU(acc1, d, sums + kPanelRows + row);
      hn::StoreU(acc2, d, sums + 2 * kPanelRows + row);
      hn::StoreU(acc3, d, sums + 3 * kPanelRows + row);
    }
  }
}

template <size_t kTokens>
void PanelTokens(const PackedTensor& weight, size_t panel, const float* x, size_t x_stride,
                 float* out, size_t out_stride) {
  const Scales& scales = weight.scales();
  const bool grouped = scales.kind == ScaleKind::kGroup;
  const size_t groups = scales.PerRow(weight.cols());
  const size_t group_cols = grouped ? scales.group_size : weight.cols();
  const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
  const uint8_t* stream = weight.bytes().data() + panel * T16PanelBytes(weight.cols());
  alignas(64) float totals[kTokens * kPanelRows] = {};
  alignas(64) float sums[kTokens * kPanelRows];
  for (size_t group = 0; group < groups; ++group) {
    PanelSums<kTokens>(stream, x, x_stride, group * group_cols,
                       std::min((group + 1) * group_cols, weight.cols()), sums);
    for (size_t token = 0; token < kTokens; ++token) {
      for (size_t row = 0; row < rows; ++row) {
        const size_t index =
            scales.kind == ScaleKind::kTensor ? 0 : (panel * kPanelRows + row) * groups + group;
        totals[token * kPanelRows + row] +=
            sums[token * kPanelRows + row] * scales.effective[index];
      }
    }
  }
  for (size_t token = 0; token < kTokens; ++token) {
    std::memcpy(out + token * out_stride + panel * kPanelRows, totals + token * kPanelRows,
                rows * sizeof(float));
  }
}

void GemmFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
               size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    size_t token = 0;
    for (; token + 4 <= tokens; token += 4) {
      PanelTokens<4>(weight, panel, x + token * x_stride, x_stride, out + token * out_stride,
                     out_stride);
    }
    for (; token < tokens; ++token) {
      PanelTokens<1>(weight, panel, x + token * x_stride, x_stride, out + token * out_stride,
                     out_stride);
    }
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(GemmFloat);

void TernaryGemmFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                      size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(GemmFloat)(weight, x, tokens, x_stride, panel_begin, panel_end, out,
                                  out_stride);
}

}  // namespace tf
#endif  // HWY_ONCE
