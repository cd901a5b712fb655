// SPDX-License-Identifier: Apache-2.0
// Sums of code * activation over the T20 tiles of one panel for few lanes; see t16_dots-inl.h.

#if defined(TERNARYFORGE_KERNELS_T20_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_T20_DOTS_INL_H_
#undef TERNARYFORGE_KERNELS_T20_DOTS_INL_H_
#else
#define TERNARYFORGE_KERNELS_T20_DOTS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "kernels/t16_dots-inl.h"
#include "kernels/t20_decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

// Sums of code * act over `tiles` T20 tiles of one panel, codes trit + 1, each plane by itself:
// sums[(plane * kLanes + lane) * 16 + row]. Plane n meets the activations from acts + n *
// plane_stride on.
template <simd::DotKind kDot, bool kPermute, size_t kLanes>
void DotT20(const uint8_t* tile, const int8_t* acts, size_t plane_stride, size_t tiles,
            int32_t* sums) {
  std::memset(sums, 0, kT20Planes * kLanes * kPanelRows * sizeof(int32_t));
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += 4 * kLanes) {
    for (size_t byte = 0; byte < kTileBytes; ++byte) {
      for (size_t plane = 0; plane < kT20Planes; ++plane) {
        const int code = tile[byte] / kT20Powers[plane] % 3;
        for (size_t lane = 0; lane < kLanes; ++lane) {
          sums[(plane * kLanes + lane) * kPanelRows + byte / 4] +=
              code * acts[plane * plane_stride + 4 * lane + byte % 4];
        }
      }
    }
  }
}

#else

// x with 3^kPower * x = y modulo 2^32: exact where y is a multiple of 3^kPower, whatever way it
// came about.
template <size_t kPower>
HWY_INLINE dot::DotSums DivideByPower(dot::DotSums y) {
  constexpr auto kPowerOf3 = static_cast<uint32_t>(kT20Powers[kPower]);
  constexpr uint32_t kInverse = [] {  // Newton doubles the right bits: 3, 6, 12, 24, 48
    uint32_t inverse = kPowerOf3;
    for (int i = 0; i < 4; ++i) inverse *= 2 - kPowerOf3 * inverse;
    return inverse;
  }();
  static_assert(kInverse * kPowerOf3 == 1);
  const hn::RebindToUnsigned<dot::DotSumsTag> du32;
  return hn::BitCast(dot::DotSumsTag(), hn::Mul(hn::BitCast(du32, y), hn::Set(du32, kInverse)));
}

// One vector of T20 tiles with 32-bit sums of scaled codes, which are divided at the end: planes 0
// to 3 by 4^n and plane 4 by 81 with the table, else by 3^n. The codes are at most 192; plane 4,
// 162 at most, does not fit an i8 operand, and kSigned takes its two low bits, which are the digit.
// use(sums) gets sums[plane][lane].
template <simd::DotKind kDot, bool kPermute, size_t kLanes, typename Use>
HWY_INLINE void PassT20InPlace(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                               size_t plane_stride, size_t tiles, const Use& use) {
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  dot::DotSums acc[kT20Planes][kLanes];
  for (auto& plane : acc) {
    for (auto& lane : plane) lane = hn::Zero(d32);
  }
#if HWY_TARGET == HWY_AVX3
  const FieldTable table;
#endif
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += 4 * kLanes) {
    hwy::Prefetch(tile + kPrefetchBytes);
    const auto bytes = hn::LoadU(d8, tile);
    dot::DotCodes codes[kT20Planes];
    const auto below_81 = Remainder<3>(bytes);
    codes[4] = hn::Sub(bytes, below_81);
    if constexpr (kShiftTop<kDot>) codes[4] = hn::And(codes[4], hn::Set(d8, 3));
#if HWY_TARGET == HWY_AVX3
    if constexpr (kPermute) {
      const auto fields = table.Fields(below_81);
      codes[0] = hn::And(fields, hn::Set(d8, 0x03));
      codes[1] = hn::And(fields, hn::Set(d8, 0x0C));
      codes[2] = hn::And(fields, hn::Set(d8, 0x30));
      codes[3] = hn::And(fields, hn::Set(d8, 0xC0));
    }
#endif
    if constexpr (!kPermute) {
      const auto below_27 = ModPower<3>(below_81), below_9 = ModPower<2>(below_27);
      codes[0] = ModPower<1>(below_9);
      codes[1] = hn::Sub(below_9, codes[0]);
      codes[2] = hn::Sub(below_27, below_9);
      codes[3] = hn::Sub(below_81, below_27);
    }
    for (size_t plane = 0; plane < kT20Planes; ++plane) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto four = dot::BroadcastActs(acts + plane * plane_stride + 4 * lane);
        acc[plane][lane] = dot::DotStep<kDot>(acc[plane][lane], codes[plane], four);
      }
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    if constexpr (kPermute) {
      acc[1][lane] = hn::ShiftRight<2>(acc[1][lane]);
      acc[2][lane] = hn::ShiftRight<4>(acc[2][lane]);
      acc[3][lane] = hn::ShiftRight<6>(acc[3][lane]);
    } else {
      acc[1][lane] = DivideByPower<1>(acc[1][lane]);
      acc[2][lane] = DivideByPower<2>(acc[2][lane]);
      acc[3][lane] = DivideByPower<3>(acc[3][lane]);
    }
    if constexpr (!kShiftTop<kDot>) acc[4][lane] = DivideByPower<4>(acc[4][lane]);
  }
  use(acc);
}

// One vector of T20 tiles with 16-bit sums of products, which become 32-bit ones every 64 tiles: a
// pair of products lies in -512 .. 508, and 64 of them in -32768 .. 32512.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void PassT20Folding(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                               size_t plane_stride, size_t tiles, int32_t* HWY_RESTRICT sums) {
  constexpr size_t kFoldTiles = 64;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  for (size_t i = 0; i < kT20Planes * kLanes; ++i)
    hn::StoreU(hn::Zero(d32), d32, sums + i * kPanelRows);
  for (size_t begin = 0; begin < tiles; begin += kFoldTiles) {
    dot::DotPairs pairs[kT20Planes][kLanes];
    for (auto& plane : pairs) {
      for (auto& lane : plane) lane = hn::Zero(dot::DotPairsTag());
    }
    const size_t count = std::min(kFoldTiles, tiles - begin);
    for (size_t t = 0; t < count; ++t, tile += kTileBytes, acts += 4 * kLanes) {
      hwy::Prefetch(tile + kPrefetchBytes);
      const auto bytes = hn::LoadU(d8, tile);
      const dot::DotCodes codes[kT20Planes] = {Digit<0>(bytes), Digit<1>(bytes), Digit<2>(bytes),
                                               Digit<3>(bytes), Digit<4>(bytes)};
      for (size_t plane = 0; plane < kT20Planes; ++plane) {
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const auto four = dot::BroadcastActs(acts + plane * plane_stride + 4 * lane);
          pairs[plane][lane] = dot::AddPairProducts(pairs[plane][lane], codes[plane], four);
        }
      }
    }
    for (size_t plane = 0; plane < kT20Planes; ++plane) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        int32_t* to = sums + (plane * kLanes + lane) * kPanelRows;
        hn::StoreU(dot::FoldPairs(hn::LoadU(d32, to), pairs[plane][lane]), d32, to);
      }
    }
  }
}

// The sums over T20 tiles, each plane by itself: sums[(plane * kLanes + lane) * 16 + row]. Plane n
// meets the activations from acts + n * plane_stride on.
template <simd::DotKind kDot, bool kPermute, size_t kLanes>
HWY_INLINE void DotT20(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                       size_t plane_stride, size_t tiles, int32_t* HWY_RESTRICT sums) {
  for (size_t v = 0; v < kVectors; ++v) {
    const uint8_t* part = tile + v * dot::kDotBytes;
    int32_t* part_sums = sums + v * (dot::kDotBytes / 4);
    if constexpr (kInPlace<kDot>) {
      const auto store = [&](const dot::DotSums(&all)[kT20Planes][kLanes]) HWY_ATTR {
        for (size_t i = 0; i < kT20Planes * kLanes; ++i)
          hn::StoreU(all[i / kLanes][i % kLanes], dot::DotSumsTag(), part_sums + i * kPanelRows);
      };
      PassT20InPlace<kDot, kPermute, kLanes>(part, acts, plane_stride, tiles, store);
    } else {
      PassT20Folding<kDot, kLanes>(part, acts, plane_stride, tiles, part_sums);
    }
  }
}

#endif

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_T20_DOTS_INL_H_
