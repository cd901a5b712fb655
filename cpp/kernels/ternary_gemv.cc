// SPDX-License-Identifier: Apache-2.0
// GEMV on run-time tiles; see ternary_gemv.h.
#include "kernels/ternary_gemv.h"

#include <algorithm>

#include "base/check.h"
#include "formats/t16.h"
#include "kernels/tile_runs.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemv.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/epilogue-inl.h"
#include "kernels/tile_dots-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// sums[lane * 16 + row] over all columns of one panel, for matrices without groups.
template <simd::DotKind kDot, bool kPermute, size_t kLanes>
HWY_INLINE void DotPanel(const TileRuns& runs, bool is_t20, const uint8_t* panel,
                         const int8_t* acts, int32_t* sums) {
  const TileRun run = runs.Run(0, 0);
  if (!is_t20) return DotT16<kDot, kLanes>(panel, acts, run.tiles, sums);
  alignas(64) int32_t planes[kT20Planes * kLanes * kPanelRows];
  DotT20<kDot, kPermute, kLanes>(panel, acts, runs.shape().plane_cols * kLanes, run.tiles, planes);
  for (size_t i = 0; i < kLanes * kPanelRows; ++i) {
    sums[i] = planes[i];
    for (size_t plane = 1; plane < kT20Planes; ++plane)
      sums[i] += planes[plane * kLanes * kPanelRows + i];
  }
}

#if HWY_TARGET == HWY_AVX3
// Adds the groups that are planes of T20 tiles to the 16 totals of one token of one lane, as
// Epilogue::AddGroup does, but with sums and totals in registers: a group is too short for a way
// through memory. (Two lanes leave too few registers: slower.)
template <bool kPermute>
HWY_INLINE void AddPlaneGroups(const TileRuns& runs, const Epilogue& epilogue, const int8_t* acts,
                               size_t group_cols, size_t panel, const uint8_t* stream,
                               float* HWY_RESTRICT totals) {
  const hn::RebindToUnsigned<dot::DotSumsTag> du32;
  Part total = hn::Zero(PartTag());
  for (size_t group = 0; group < runs.PlaneGroups(); group += kT20Planes) {
    const TileRun run = runs.Run(group, 0);
    PassT20InPlace<simd::DotKind::kNative, kPermute, 1>(
        stream + run.byte, acts + run.col, group_cols, run.tiles,
        [&](const dot::DotSums(&all)[kT20Planes][1]) HWY_ATTR {
          for (size_t plane = 0; plane < kT20Planes; ++plane) {
            const auto act_sum = hn::Set(du32, epilogue.ActSum(group + plane, 0));
            const auto exact = hn::Sub(hn::BitCast(du32, all[plane][0]), act_sum);
            const Part value = hn::ConvertTo(PartTag(), hn::BitCast(dot::DotSumsTag(), exact));
            total =
                hn::Add(total, hn::Mul(value, epilogue.LoadScales(panel, group + plane).part[0]));
          }
        });
  }
  hn::StoreU(total, PartTag(), totals);
}
#endif

template <simd::DotKind kDot, bool kPermute, size_t kLanes>
void GemvPanels(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                size_t panel_begin, size_t panel_end, float* HWY_RESTRICT out, size_t out_stride) {
  const TileRuns runs(weight);
  const Epilogue epilogue(weight, acts);
  const bool is_t20 = weight.layout() == Layout::kT20;
  const size_t group_cols = weight.scales().group_size;
  alignas(64) int32_t sums[kT20Planes * kLanes * kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* stream = weight.bytes().data() + panel * runs.PanelBytes();
    alignas(64) float totals[kLanes * kPanelRows] = {};
    const auto add = [&](size_t group, const int32_t* lane_sums) HWY_ATTR {
      for (size_t token = 0; token < tokens; ++token) {
        epilogue.AddGroup(panel, group, token,
                          lane_sums + token * acts.lanes_per_token * kPanelRows, kPanelRows,
                          totals + token * kPanelRows);
      }
    };
    if (group_cols == 0) {
      DotPanel<kDot, kPermute, kLanes>(runs, is_t20, stream, acts.codes, sums);
      add(0, sums);
    }
    size_t plane_groups = runs.PlaneGroups();
#if HWY_TARGET == HWY_AVX3
    if constexpr (kDot == simd::DotKind::kNative && kLanes == 1) {
      if (plane_groups != 0) {
        AddPlaneGroups<kPermute>(runs, epilogue, acts.codes, group_cols, panel, stream, totals);
        plane_groups = 0;
      }
    }
#endif
    for (size_t group = 0; group < plane_groups; group += kT20Planes) {
      const TileRun run = runs.Run(group, 0);
      DotT20<kDot, kPermute, kLanes>(stream + run.byte, acts.codes + run.col * kLanes,
                                     group_cols * kLanes, run.tiles, sums);
      for (size_t plane = 0; plane < kT20Planes; ++plane)
        add(group + plane, sums + plane * kLanes * kPanelRows);
    }
    for (size_t group = runs.PlaneGroups(); group_cols != 0 && group < runs.groups(); ++group) {
      const TileRun run = runs.Run(group, 0);
      DotT16<kDot, kLanes>(stream + run.byte, acts.codes + run.col * kLanes, run.tiles, sums);
      add(group, sums);
    }
    for (size_t token = 0; token < tokens; ++token) {
      epilogue.Store(panel, token, totals + token * kPanelRows, out + token * out_stride);
    }
  }
}

template <simd::DotKind kDot, bool kPermute>
void GemvLanes(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
               size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const auto run = acts.block == 1   ? GemvPanels<kDot, kPermute, 1>
                   : acts.block == 2 ? GemvPanels<kDot, kPermute, 2>
                                     : GemvPanels<kDot, kPermute, 4>;
  run(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

template <simd::DotKind kDot, bool kPermute>
void DotPanels(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
               size_t panel_end, int32_t* HWY_RESTRICT out) {
  const TileRuns runs(weight);
  int32_t code_sum = 0;
  for (size_t i = 0; i < weight.cols(); ++i) code_sum += codes[i];
  alignas(64) int32_t sums[kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    DotPanel<kDot, kPermute, 1>(runs, weight.layout() == Layout::kT20,
                                weight.bytes().data() + panel * runs.PanelBytes(), codes, sums);
    const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
    for (size_t row = 0; row < rows; ++row) out[panel * kPanelRows + row] = sums[row] - code_sum;
  }
}

// Calls run.template operator()<kDot, kPermute>() with what the active target has.
template <typename Run>
void WithTarget(const Run& run) {
#if HWY_TARGET == HWY_AVX3
  if (simd::HasBytePermute()) return run.template operator()<simd::DotKind::kNative, true>();
#endif
  simd::HWY_NAMESPACE::WithDot(simd::ActiveDot(), [&]<simd::DotKind kDot>() HWY_ATTR {
    run.template operator()<kDot, false>();
  });
}

void Gemv(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens, size_t panel_begin,
          size_t panel_end, float* out, size_t out_stride) {
  WithTarget([&]<simd::DotKind kDot, bool kPermute>() {
    GemvLanes<kDot, kPermute>(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
  });
}

void Dot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin, size_t panel_end,
         int32_t* out) {
  WithTarget([&]<simd::DotKind kDot, bool kPermute>() {
    DotPanels<kDot, kPermute>(weight, codes, panel_begin, panel_end, out);
  });
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemv);
HWY_EXPORT(Dot);

void TernaryGemv(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Gemv)(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

void TernaryDot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
                size_t panel_end, int32_t* out) {
  Check(weight.scales().kind != ScaleKind::kGroup,
        "[ternary_dot] one sum a row; scales are per group");
  HWY_DYNAMIC_DISPATCH(Dot)(weight, codes, panel_begin, panel_end, out);
}

}  // namespace tf
#endif  // HWY_ONCE
