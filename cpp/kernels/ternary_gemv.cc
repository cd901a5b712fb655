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
#include "kernels/t16_dots-inl.h"
#include "kernels/t20_dots-inl.h"

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

#if HWY_TARGET != HWY_SCALAR

// Whether the planes of T20 tiles leave registers for the totals.
template <simd::DotKind kDot>
inline constexpr bool kPlanesInRegisters = HWY_TARGET == HWY_AVX3 && kInPlace<kDot>;

// totals[row] of one token, whose lanes are all that `acts` has, over the groups of a panel: what
// Epilogue::AddGroup gives, but with sums and totals in registers, since a group is too short for a
// way through memory. T20 only where kPlanesInRegisters.
template <simd::DotKind kDot, bool kPermute, size_t kLanes>
HWY_INLINE void SumGroups(const TileRuns& runs, const Epilogue& epilogue, const int8_t* acts,
                          size_t group_cols, size_t scales_ahead, size_t panel,
                          const uint8_t* stream, float* HWY_RESTRICT totals) {
  Part total[kParts];
  for (Part& part : total) part = hn::Zero(PartTag());
  // high, low: the sums of the first and the last lane.
  const auto add = [&](size_t group, size_t p, Epilogue::Sums high, Epilogue::Sums low) HWY_ATTR {
    const auto sums = kLanes == 2 ? Epilogue::Join(high, low) : high;
    total[p] = Epilogue::AddExact(total[p], sums, epilogue.ActSum(group, 0),
                                  epilogue.LoadScales(panel, group).part[p]);
  };
  if constexpr (kPlanesInRegisters<kDot>) {
    for (size_t group = 0; group < runs.PlaneGroups(); group += kT20Planes) {
      const TileRun run = runs.Run(group, 0);
      for (size_t plane = 0; plane < kT20Planes; ++plane)
        epilogue.PrefetchScales(panel, group + plane, scales_ahead);
      PassT20InPlace<kDot, kPermute, kLanes>(
          stream + run.byte, acts + run.col * kLanes, group_cols * kLanes, run.tiles,
          [&](const dot::DotSums(&sums)[kT20Planes][kLanes]) HWY_ATTR {
            for (size_t plane = 0; plane < kT20Planes; ++plane)
              add(group + plane, 0, sums[plane][0], sums[plane][kLanes - 1]);
          });
    }
  }
  for (size_t group = runs.PlaneGroups(); group < runs.groups(); ++group) {
    const TileRun run = runs.Run(group, 0);
    epilogue.PrefetchScales(panel, group, scales_ahead);
    SumT16<kDot, kLanes>(stream + run.byte, acts + run.col * kLanes, run.tiles,
                         [&](size_t first, const PassSums<kDot, kLanes>& sums) HWY_ATTR {
                           for (size_t v = 0; v < kPassVectors<kDot, kLanes>; ++v)
                             add(group, first + v, sums[0][v], sums[kLanes - 1][v]);
                         });
  }
  for (size_t p = 0; p < kParts; ++p) hn::StoreU(total[p], PartTag(), totals + p * kPartLanes);
}

#endif

template <simd::DotKind kDot, bool kPermute, size_t kLanes>
void GemvPanels(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                size_t panel_begin, size_t panel_end, float* HWY_RESTRICT out, size_t out_stride) {
  const TileRuns runs(weight);
  const Epilogue epilogue(weight, acts);
  const bool is_t20 = weight.layout() == Layout::kT20;
  const size_t group_cols = weight.scales().group_size;
  const size_t scales_ahead = DivCeil(kPrefetchBytes * runs.groups(), runs.PanelBytes());
  alignas(64) int32_t sums[kT20Planes * kLanes * kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* stream = weight.bytes().data() + panel * runs.PanelBytes();
    alignas(64) float totals[kLanes * kPanelRows] = {};
#if HWY_TARGET != HWY_SCALAR
    if constexpr (kLanes <= 2) {
      if (group_cols != 0 && tokens == 1 && (kPlanesInRegisters<kDot> || !is_t20)) {
        SumGroups<kDot, kPermute, kLanes>(runs, epilogue, acts.codes, group_cols, scales_ahead,
                                          panel, stream, totals);
        epilogue.Store(panel, 0, totals, out);
        continue;
      }
    }
#endif
    const auto add = [&](size_t group, const int32_t* lane_sums) HWY_ATTR {
      epilogue.PrefetchScales(panel, group, scales_ahead);
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
    for (size_t group = 0; group < runs.PlaneGroups(); group += kT20Planes) {
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
