// SPDX-License-Identifier: Apache-2.0
// Panels of 16 rows times float activations: group by group, four tokens together. Shared by the
// kernels on run-time tiles.

#if defined(TERNARYFORGE_KERNELS_FLOAT_PANELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_FLOAT_PANELS_INL_H_
#undef TERNARYFORGE_KERNELS_FLOAT_PANELS_INL_H_
#else
#define TERNARYFORGE_KERNELS_FLOAT_PANELS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstring>

#include <hwy/highway.h>

#include "formats/packed_tensor.h"
#include "formats/t16.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// out[token * out_stride + row] for kTokens tokens and the rows of one panel.
// add.operator()<kTokens>(panel, group, x, sums) adds code * x of a group's columns to
// sums[token * 16 + row].
template <size_t kTokens, class AddGroup>
void FloatPanel(const PackedTensor& weight, size_t groups, size_t panel, const float* x, float* out,
                size_t out_stride, const AddGroup& add) {
  const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
  alignas(64) float totals[kTokens * kPanelRows] = {};
  for (size_t group = 0; group < groups; ++group) {
    alignas(64) float sums[kTokens * kPanelRows] = {};
    add.template operator()<kTokens>(panel, group, x, sums);
    for (size_t token = 0; token < kTokens; ++token) {
      for (size_t row = 0; row < rows; ++row) {
        totals[token * kPanelRows + row] +=
            sums[token * kPanelRows + row] * weight.ScaleAt(panel * kPanelRows + row, group);
      }
    }
  }
  for (size_t token = 0; token < kTokens; ++token) {
    std::memcpy(out + token * out_stride + panel * kPanelRows, totals + token * kPanelRows,
                rows * sizeof(float));
  }
}

template <class AddGroup>
void FloatPanels(const PackedTensor& weight, size_t groups, const float* x, size_t tokens,
                 size_t x_stride, size_t panel_begin, size_t panel_end, float* out,
                 size_t out_stride, const AddGroup& add) {
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    size_t token = 0;
    for (; token + 4 <= tokens; token += 4) {
      FloatPanel<4>(weight, groups, panel, x + token * x_stride, out + token * out_stride,
                    out_stride, add);
    }
    for (; token < tokens; ++token) {
      FloatPanel<1>(weight, groups, panel, x + token * x_stride, out + token * out_stride,
                    out_stride, add);
    }
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_FLOAT_PANELS_INL_H_
