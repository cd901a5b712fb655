// SPDX-License-Identifier: Apache-2.0
// GEMV on T16 tiles; see ternary_gemv.h.
#include "kernels/ternary_gemv.h"

#include <algorithm>
#include <cstring>

#include "formats/t16.h"
#include "kernels/epilogue.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemv.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR

// sums[lane * 16 + row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot, size_t kLanes>
void PanelDot(const uint8_t* tile, const int8_t* acts, size_t tiles, int32_t* sums) {
  std::memset(sums, 0, kLanes * kPanelRows * sizeof(int32_t));
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols * kLanes) {
    for (size_t byte = 0; byte < kTileBytes; ++byte) {
      for (size_t plane = 0; plane < 4; ++plane) {
        const int code = (tile[byte] >> (2 * plane)) & 3;
        for (size_t lane = 0; lane < kLanes; ++lane) {
          sums[lane * kPanelRows + byte / 4] +=
              code * acts[4 * plane * kLanes + 4 * lane + byte % 4];
        }
      }
    }
  }
}

#else

namespace dot = simd::HWY_NAMESPACE;

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a tile

// Vectors of a tile that one pass over the panel takes: as many as leave registers for the sums.
// Where that is not all, the next pass finds the panel in the cache.
template <size_t kLanes>
inline constexpr size_t kPassVectors = kLanes == 1 && kVectors > 1 ? 2 : 1;

// Whether the planes can stay where they lie in the byte, each with its own 32-bit sums: that of
// plane n is exactly 4^n times the sum of its codes.
template <simd::DotKind kDot>
inline constexpr bool kInPlace = kDot == simd::DotKind::kNative;

// One pass over the panel with 32-bit sums of every plane.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void PassInPlace(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                            size_t tiles, int32_t* HWY_RESTRICT sums) {
  constexpr size_t kPass = kPassVectors<kLanes>;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  const dot::DotCodes masks[4] = {hn::Set(d8, 0x03), hn::Set(d8, 0x0C), hn::Set(d8, 0x30),
                                  hn::Set(d8, 0xC0)};
  dot::DotSums acc[4][kLanes][kPass];
  for (auto& plane : acc) {
    for (auto& lane : plane) {
      for (auto& vector : lane) vector = hn::Zero(d32);
    }
  }
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols * kLanes) {
    hwy::Prefetch(tile + 2048);
    dot::DotCodes packed[kPass];
    for (size_t v = 0; v < kPass; ++v) packed[v] = hn::LoadU(d8, tile + v * dot::kDotBytes);
    for (size_t plane = 0; plane < 4; ++plane) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto four = dot::BroadcastActs(acts + 4 * (plane * kLanes + lane));
        for (size_t v = 0; v < kPass; ++v) {
          acc[plane][lane][v] =
              dot::DotStep<kDot>(acc[plane][lane][v], hn::And(packed[v], masks[plane]), four);
        }
      }
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v) {
      const auto low = hn::Add(acc[0][lane][v], hn::ShiftRight<2>(acc[1][lane][v]));
      const auto high =
          hn::Add(hn::ShiftRight<4>(acc[2][lane][v]), hn::ShiftRight<6>(acc[3][lane][v]));
      hn::StoreU(hn::Add(low, high), d32, sums + lane * kPanelRows + v * (dot::kDotBytes / 4));
    }
  }
}

// One pass over the panel with 16-bit sums of products, which become 32-bit ones every
// kFoldTiles tiles: planes 0 and 2 as they are, planes 1 and 3 four times too large. A pair of
// products of the latter lies in -2048 .. 2032, and 16 of them in -32768 .. 32512: eight tiles.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void PassFolding(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                            size_t tiles, int32_t* HWY_RESTRICT sums) {
  constexpr size_t kFoldTiles = 8;
  constexpr size_t kPass = kPassVectors<kLanes>;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  const dot::DotPairsTag d16;
  const auto mask = hn::Set(d8, 0x03), mask_by_4 = hn::Set(d8, 0x0C);
  dot::DotSums acc[kLanes][kPass];
  for (auto& lane : acc) {
    for (auto& vector : lane) vector = hn::Zero(d32);
  }
  for (size_t begin = 0; begin < tiles; begin += kFoldTiles) {
    dot::DotPairs pairs[kLanes][kPass], pairs_by_4[kLanes][kPass];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t v = 0; v < kPass; ++v) pairs[lane][v] = pairs_by_4[lane][v] = hn::Zero(d16);
    }
    const size_t count = std::min(kFoldTiles, tiles - begin);
    for (size_t t = 0; t < count; ++t, tile += kTileBytes, acts += kT16TileCols * kLanes) {
      hwy::Prefetch(tile + 2048);
      for (size_t v = 0; v < kPass; ++v) {
        const auto low = hn::LoadU(d8, tile + v * dot::kDotBytes);
        const auto high = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, low)));
        const auto plane0 = hn::And(low, mask), plane1 = hn::And(low, mask_by_4),
                   plane2 = hn::And(high, mask), plane3 = hn::And(high, mask_by_4);
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const auto products = [&](dot::DotCodes codes, size_t plane) HWY_ATTR {
            return dot::PairProducts(codes, dot::BroadcastActs(acts + 4 * (plane * kLanes + lane)));
          };
          pairs[lane][v] =
              hn::Add(pairs[lane][v], hn::Add(products(plane0, 0), products(plane2, 2)));
          pairs_by_4[lane][v] =
              hn::Add(pairs_by_4[lane][v], hn::Add(products(plane1, 1), products(plane3, 3)));
        }
      }
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t v = 0; v < kPass; ++v) {
        const auto by_4 = dot::FoldPairs(hn::Zero(d32), pairs_by_4[lane][v]);
        acc[lane][v] =
            hn::Add(dot::FoldPairs(acc[lane][v], pairs[lane][v]), hn::ShiftRight<2>(by_4));
      }
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v) {
      hn::StoreU(acc[lane][v], d32, sums + lane * kPanelRows + v * (dot::kDotBytes / 4));
    }
  }
}

// sums[lane * 16 + row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void PanelDot(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                         size_t tiles, int32_t* HWY_RESTRICT sums) {
  for (size_t v = 0; v < kVectors; v += kPassVectors<kLanes>) {
    const uint8_t* part = tile + v * dot::kDotBytes;
    int32_t* part_sums = sums + v * (dot::kDotBytes / 4);
    if constexpr (kInPlace<kDot>) {
      PassInPlace<kDot, kLanes>(part, acts, tiles, part_sums);
    } else {
      PassFolding<kDot, kLanes>(part, acts, tiles, part_sums);
    }
  }
}

#endif

template <simd::DotKind kDot, size_t kLanes>
void GemvPanels(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                size_t panel_begin, size_t panel_end, float* HWY_RESTRICT out, size_t out_stride) {
  const size_t tiles = T16TilesPerPanel(weight.cols());
  const Epilogue epilogue(weight, acts);
  alignas(64) int32_t sums[kLanes * kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* stream = weight.bytes().data() + panel * tiles * kTileBytes;
    alignas(64) float totals[kLanes * kPanelRows] = {};
    for (size_t group = 0; group < epilogue.groups(); ++group) {
      const Range range = epilogue.GroupTiles(group);
      PanelDot<kDot, kLanes>(stream + range.begin * kTileBytes,
                             acts.codes + range.begin * kT16TileCols * kLanes,
                             range.end - range.begin, sums);
      for (size_t token = 0; token < tokens; ++token) {
        epilogue.AddGroup(panel, group, token, sums + token * acts.lanes_per_token * kPanelRows,
                          kPanelRows, totals + token * kPanelRows);
      }
    }
    for (size_t token = 0; token < tokens; ++token) {
      epilogue.Store(panel, token, totals + token * kPanelRows, out + token * out_stride);
    }
  }
}

template <simd::DotKind kDot>
void GemvLanes(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
               size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const auto run = acts.block == 1   ? GemvPanels<kDot, 1>
                   : acts.block == 2 ? GemvPanels<kDot, 2>
                                     : GemvPanels<kDot, 4>;
  run(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

template <simd::DotKind kDot>
void DotPanels(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
               size_t panel_end, int32_t* HWY_RESTRICT out) {
  const size_t tiles = T16TilesPerPanel(weight.cols());
  int32_t code_sum = 0;
  for (size_t i = 0; i < weight.cols(); ++i) code_sum += codes[i];
  alignas(64) int32_t sums[kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    PanelDot<kDot, 1>(weight.bytes().data() + panel * tiles * kTileBytes, codes, tiles, sums);
    const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
    for (size_t row = 0; row < rows; ++row) out[panel * kPanelRows + row] = sums[row] - code_sum;
  }
}

void Gemv(simd::DotKind dot, const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
          size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const auto run = dot == simd::DotKind::kNative ? GemvLanes<simd::DotKind::kNative>
                                                 : GemvLanes<simd::DotKind::kPortable>;
  run(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

void Dot(simd::DotKind dot, const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
         size_t panel_end, int32_t* out) {
  const auto run = dot == simd::DotKind::kNative ? DotPanels<simd::DotKind::kNative>
                                                 : DotPanels<simd::DotKind::kPortable>;
  run(weight, codes, panel_begin, panel_end, out);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemv);
HWY_EXPORT(Dot);

void TernaryGemv(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Gemv)(simd::ActiveDot(), weight, acts, tokens, panel_begin, panel_end, out,
                             out_stride);
}

void TernaryDot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
                size_t panel_end, int32_t* out) {
  HWY_DYNAMIC_DISPATCH(Dot)(simd::ActiveDot(), weight, codes, panel_begin, panel_end, out);
}

}  // namespace tf
#endif  // HWY_ONCE
