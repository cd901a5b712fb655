// SPDX-License-Identifier: Apache-2.0
// Products of a quantized head with 15-bit activations; see head.h.
#include "kernels/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/head.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "simd/dot-inl.h"

#ifndef TERNARYFORGE_KERNELS_HEAD_ONCE
#define TERNARYFORGE_KERNELS_HEAD_ONCE
namespace tf {

// The error of a product is at most residual * residuals[row] + norm * norms[row] + constant.
struct HeadBound {
  float residual;
  float norm;
  float constant;
};

struct HeadArgs {
  const QuantizedHead& head;
  const HeadActs& acts;
  size_t tokens;
  size_t panel_begin;
  size_t panel_end;
  const HeadBound* bounds;  // of each token, or null
  float* out;
  size_t out_stride;
};

}  // namespace tf
#endif

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr size_t kTokensAtOnce = 4;
// Half a microsecond ahead at the speed of one core: memory answers within that.
inline constexpr size_t kPrefetchBytes = 8192;

// Products of 16 rows become logits or bounds.
HWY_INLINE void StorePanel(const HeadArgs& args, size_t panel, size_t token, const float* sums) {
  const size_t row = panel * kHeadPanelRows;
  const size_t count = HWY_MIN(kHeadPanelRows, args.head.rows() - row);
  const float* scales = args.head.row_scales() + row;
  const float* residuals = args.head.residuals() + row;
  const float* norms = args.head.norms() + row;
  const float scale = args.acts.scale(token);
  float* out = args.out + token * args.out_stride + row;
  for (size_t r = 0; r < count; ++r) out[r] = sums[r] * scales[r] * scale;
  if (args.bounds == nullptr) return;
  const HeadBound& bound = args.bounds[token];
  for (size_t r = 0; r < count; ++r) {
    out[r] += bound.residual * residuals[r] + bound.norm * norms[r] + bound.constant;
  }
}

#if HWY_TARGET == HWY_SCALAR

// The code of row `row`, column `col` of a group.
template <size_t kBits>
HWY_INLINE int32_t CodeAt(const uint8_t* group, size_t row, size_t col) {
  const size_t step = col / 4, byte = row * 4 + col % 4;
  if constexpr (kBits == 8) return group[step * 64 + byte];
  const int32_t low = group[step / 2 * 64 + byte] >> (step % 2 * 4) & 15;
  if constexpr (kBits == 4) return low;
  return low | ((group[128 + byte] >> (2 * step) & 3) << 4);
}

template <size_t kBits, size_t kTokens, simd::DotKind kDot>
HWY_INLINE void Panel(const HeadArgs& args, size_t panel, size_t token) {
  constexpr size_t kCols = HeadGroupCols(kBits), kBytes = HeadGroupBytes(kBits);
  const size_t groups = args.head.groups();
  for (size_t t = token; t < token + kTokens; ++t) {
    float sums[kHeadPanelRows] = {};
    for (size_t g = 0; g < groups; ++g) {
      const uint8_t* group = args.head.codes() + (panel * groups + g) * kBytes;
      const uint8_t* scales = args.head.group_scales() + (panel * groups + g) * kHeadPanelRows;
      for (size_t row = 0; row < kHeadPanelRows; ++row) {
        int32_t sum = 0;
        for (size_t col = 0; col < kCols; ++col) {
          const size_t i = g * kCols + col;
          sum +=
              CodeAt<kBits>(group, row, col) * (128 * args.acts.high(t)[i] + args.acts.low(t)[i]);
        }
        sums[row] +=
            (static_cast<float>(sum) + args.acts.offsets(t)[g]) * static_cast<float>(scales[row]);
      }
    }
    StorePanel(args, panel, t, sums);
  }
}

#else

namespace simd_hwy = simd::HWY_NAMESPACE;
using simd_hwy::DotBytesTag;
using simd_hwy::DotCodes;
using simd_hwy::DotSums;
using simd_hwy::DotSumsTag;
using FloatTag = hn::RebindToFloat<DotSumsTag>;
inline constexpr size_t kVectors = 64 / simd_hwy::kDotBytes;  // of 16 rows

HWY_INLINE DotCodes ShiftBytes(DotCodes bytes, size_t right) {
  const hn::Repartition<uint16_t, DotBytesTag> d16;
  const auto words = hn::BitCast(d16, bytes);
  return hn::BitCast(DotBytesTag(), right == 2   ? hn::ShiftRight<2>(words)
                                    : right == 4 ? hn::ShiftRight<4>(words)
                                                 : words);
}

// Bits 4 and 5 of the codes of step kStep, from the third vector of a group of 6 bits.
template <size_t kStep>
HWY_INLINE DotCodes HighBits(DotCodes bytes) {
  const hn::Repartition<uint16_t, DotBytesTag> d16;
  const auto words = hn::BitCast(d16, bytes);
  const auto moved = kStep == 0   ? hn::ShiftLeft<4>(words)
                     : kStep == 1 ? hn::ShiftLeft<2>(words)
                     : kStep == 2 ? words
                                  : hn::ShiftRight<2>(words);
  return hn::And(hn::BitCast(DotBytesTag(), moved), hn::Set(DotBytesTag(), 0x30));
}

// Integer sums of one group for the rows of one vector. Without a dot instruction, pairs of
// products are added in 16 bits for as many steps as fit: codes are at most 63 (6 bits) or 15 (4
// bits, and the nibbles of 8), high parts at most 127, low parts at most 64.
template <size_t kBits, size_t kTokens, simd::DotKind kDot>
struct GroupSums {
  static constexpr bool kPairs = kDot == simd::DotKind::kPortable;
  static constexpr size_t kMaxCode = kBits == 6 ? 63 : 15;
  static constexpr size_t kHighSteps = 32767 / (2 * kMaxCode * 127);
  static constexpr size_t kLowSteps = 32767 / (2 * kMaxCode * 64);
  static constexpr size_t kSteps = HeadGroupCols(kBits) / 4;

  HWY_INLINE GroupSums(const HeadArgs& args, size_t token, size_t col) {
    for (size_t t = 0; t < kTokens; ++t) {
      high_acts[t] = args.acts.high(token + t) + col;
      low_acts[t] = args.acts.low(token + t) + col;
      high[t] = low[t] = hn::Zero(DotSumsTag());
      high_pairs[t] = low_pairs[t] = hn::Zero(simd_hwy::DotPairsTag());
    }
  }

  // Steps 0 .. kSteps - 1 in their order.
  HWY_INLINE void Step(DotCodes codes, size_t step) {
    for (size_t t = 0; t < kTokens; ++t) {
      const auto high_four = simd_hwy::BroadcastActs(high_acts[t] + 4 * step);
      const auto low_four = simd_hwy::BroadcastActs(low_acts[t] + 4 * step);
      if constexpr (kPairs) {
        AddPairs<kHighSteps>(codes, high_four, step, high_pairs[t], high[t]);
        AddPairs<kLowSteps>(codes, low_four, step, low_pairs[t], low[t]);
      } else {
        high[t] = simd_hwy::DotStep<kDot>(high[t], codes, high_four);
        low[t] = simd_hwy::DotStep<kDot>(low[t], codes, low_four);
      }
    }
  }

  template <size_t kFoldSteps>
  static HWY_INLINE void AddPairs(DotCodes codes, simd_hwy::DotActs acts, size_t step,
                                  simd_hwy::DotPairs& pairs, DotSums& sums) {
    const auto products = simd_hwy::PairProducts(codes, acts);
    pairs = step % kFoldSteps == 0 ? products : hn::Add(pairs, products);
    if ((step + 1) % kFoldSteps == 0 || step + 1 == kSteps) sums = simd_hwy::FoldPairs(sums, pairs);
  }

  // At most 255 * 16319 * 32 < 2^27.
  HWY_INLINE DotSums Total(size_t t) const { return hn::Add(hn::ShiftLeft<7>(high[t]), low[t]); }

  const int8_t* high_acts[kTokens];
  const int8_t* low_acts[kTokens];
  DotSums high[kTokens], low[kTokens];
  simd_hwy::DotPairs high_pairs[kTokens], low_pairs[kTokens];
};

// totals[t] = sum of code * activation over one group.
template <size_t kBits, size_t kTokens, simd::DotKind kDot>
HWY_INLINE void GroupTotals(const HeadArgs& args, const uint8_t* group, size_t token, size_t col,
                            DotSums* totals) {
  const DotBytesTag d8;
  const auto nibble = hn::Set(d8, 0x0F);
  GroupSums<kBits, kTokens, kDot> sums(args, token, col);
  if constexpr (kBits == 6) {
    const auto first = hn::LoadU(d8, group), second = hn::LoadU(d8, group + 64);
    const auto high = hn::LoadU(d8, group + 128);
    sums.Step(hn::Or(hn::And(first, nibble), HighBits<0>(high)), 0);
    sums.Step(hn::Or(hn::And(ShiftBytes(first, 4), nibble), HighBits<1>(high)), 1);
    sums.Step(hn::Or(hn::And(second, nibble), HighBits<2>(high)), 2);
    sums.Step(hn::Or(hn::And(ShiftBytes(second, 4), nibble), HighBits<3>(high)), 3);
  } else if constexpr (kBits == 4) {
    for (size_t v = 0; v < 4; ++v) {
      const auto bytes = hn::LoadU(d8, group + v * 64);
      sums.Step(hn::And(bytes, nibble), 2 * v);
      sums.Step(hn::And(ShiftBytes(bytes, 4), nibble), 2 * v + 1);
    }
  } else if constexpr (kDot == simd::DotKind::kNative) {
    for (size_t step = 0; step < 8; ++step) sums.Step(hn::LoadU(d8, group + step * 64), step);
  } else {  // nibbles, since codes above 128 overflow pairs of products
    GroupSums<kBits, kTokens, kDot> upper(args, token, col);
    for (size_t step = 0; step < 8; ++step) {
      const auto bytes = hn::LoadU(d8, group + step * 64);
      sums.Step(hn::And(bytes, nibble), step);
      upper.Step(hn::And(ShiftBytes(bytes, 4), nibble), step);
    }
    for (size_t t = 0; t < kTokens; ++t) {
      totals[t] = hn::Add(sums.Total(t), hn::ShiftLeft<4>(upper.Total(t)));
    }
    return;
  }
  for (size_t t = 0; t < kTokens; ++t) totals[t] = sums.Total(t);
}

template <size_t kBits, size_t kTokens, simd::DotKind kDot>
HWY_INLINE void Panel(const HeadArgs& args, size_t panel, size_t token) {
  constexpr size_t kCols = HeadGroupCols(kBits), kBytes = HeadGroupBytes(kBits);
  constexpr size_t kVectorRows = kHeadPanelRows / kVectors;
  const FloatTag df;
  const hn::Rebind<uint8_t, DotSumsTag> du8;
  const size_t groups = args.head.groups();
  const uint8_t* group = args.head.codes() + panel * groups * kBytes;
  const uint8_t* scales = args.head.group_scales() + panel * groups * kHeadPanelRows;
  hn::Vec<FloatTag> sums[kTokens][kVectors];
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t v = 0; v < kVectors; ++v) sums[t][v] = hn::Zero(df);
  }
  for (size_t g = 0; g < groups; ++g, group += kBytes, scales += kHeadPanelRows) {
    for (size_t i = 0; i < kBytes; i += 64) hwy::Prefetch(group + kPrefetchBytes + i);
    for (size_t v = 0; v < kVectors; ++v) {
      DotSums totals[kTokens];
      GroupTotals<kBits, kTokens, kDot>(args, group + v * simd_hwy::kDotBytes, token, g * kCols,
                                        totals);
      const auto scale =
          hn::ConvertTo(df, hn::PromoteTo(DotSumsTag(), hn::LoadU(du8, scales + v * kVectorRows)));
      for (size_t t = 0; t < kTokens; ++t) {
        const auto offset = hn::Set(df, args.acts.offsets(token + t)[g]);
        const auto value = hn::Add(hn::ConvertTo(df, totals[t]), offset);
        sums[t][v] = hn::MulAdd(value, scale, sums[t][v]);
      }
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    HWY_ALIGN float all[kHeadPanelRows];
    for (size_t v = 0; v < kVectors; ++v) hn::Store(sums[t][v], df, all + v * kVectorRows);
    StorePanel(args, panel, token + t, all);
  }
}

#endif

template <size_t kBits, simd::DotKind kDot>
HWY_INLINE void Panels(const HeadArgs& args) {
  for (size_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
    size_t token = 0;
    for (; token + kTokensAtOnce <= args.tokens; token += kTokensAtOnce) {
      Panel<kBits, kTokensAtOnce, kDot>(args, panel, token);
    }
    for (; token < args.tokens; ++token) Panel<kBits, 1, kDot>(args, panel, token);
  }
}

template <simd::DotKind kDot>
HWY_INLINE void PanelsOfBits(const HeadArgs& args) {
  switch (args.head.bits()) {
    case 4:
      return Panels<4, kDot>(args);
    case 6:
      return Panels<6, kDot>(args);
    default:
      return Panels<8, kDot>(args);
  }
}

void HeadPanels(simd::DotKind dot, const HeadArgs& args) {
  if (dot == simd::DotKind::kNative) return PanelsOfBits<simd::DotKind::kNative>(args);
  PanelsOfBits<simd::DotKind::kPortable>(args);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(HeadPanels);

// The bound of docs/design/0009-head.md for one token.
HeadBound BoundOf(const QuantizedHead& head, const HeadActs& acts, size_t token) {
  const double norm = acts.norm(token), residual = acts.residual(token);
  const double cols = static_cast<double>(head.cols());
  // Roundings of the longest chain of the exact product, and of this one, generously.
  const double exact = (cols / 16 + 24) * 2 * 0x1p-24;
  const double ours = (static_cast<double>(head.groups()) + 24) * 2 * 0x1p-24;
  const double tiny = (2 * cols + 64) * 0x1p-149;  // results too small for a normal float
  const double row_scale = static_cast<double>(head.largest_row_scale());
  const double scales = (1 + row_scale) * (1 + static_cast<double>(acts.scale(token)));
  // Above the three terms' own roundings, normal or not.
  const auto above = [](double x) { return static_cast<float>(x * (1 + 1e-5) + 0x1p-120); };
  return {
      .residual = above(norm * (1 + exact)),
      .norm = above(residual + exact * norm + ours * (norm + residual)),
      .constant = above(tiny * scales),
  };
}

}  // namespace

void HeadProducts(const QuantizedHead& head, const HeadActs& acts, size_t tokens,
                  size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(HeadPanels)
  (simd::ActiveDot(), {head, acts, tokens, panel_begin, panel_end, nullptr, out, out_stride});
}

void HeadUpperBounds(const QuantizedHead& head, const HeadActs& acts, size_t tokens,
                     size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HeadBound bounds[kMaxBoundTokens];
  for (size_t t = 0; t < tokens; ++t) bounds[t] = BoundOf(head, acts, t);
  HWY_DYNAMIC_DISPATCH(HeadPanels)
  (simd::ActiveDot(), {head, acts, tokens, panel_begin, panel_end, bounds, out, out_stride});
}

}  // namespace tf
#endif  // HWY_ONCE
