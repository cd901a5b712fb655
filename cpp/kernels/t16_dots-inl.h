// SPDX-License-Identifier: Apache-2.0
// Sums of code * activation over the T16 tiles of one panel for few lanes: the heart of the ternary
// GEMV.

#if defined(TERNARYFORGE_KERNELS_T16_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_T16_DOTS_INL_H_
#undef TERNARYFORGE_KERNELS_T16_DOTS_INL_H_
#else
#define TERNARYFORGE_KERNELS_T16_DOTS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "formats/t16.h"
#include "simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace dot = simd::HWY_NAMESPACE;

// How far ahead of its use a tile is asked for: what memory sends in some 200 ns.
inline constexpr size_t kPrefetchBytes = 8192;

#if HWY_TARGET == HWY_SCALAR

// sums[lane * 16 + row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot, size_t kLanes>
void DotT16(const uint8_t* tile, const int8_t* acts, size_t tiles, int32_t* sums) {
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

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a tile

// Whether the planes can stay where they lie in the byte, each with its own 32-bit sums: that of
// plane n is exactly 4^n times the sum of its codes.
template <simd::DotKind kDot>
inline constexpr bool kInPlace = kDot != simd::DotKind::kPortable;

// Vectors of a tile that one pass over the panel takes: as many as leave registers for the sums.
// Where that is not all, the next pass finds the panel in the cache.
template <simd::DotKind kDot, size_t kLanes>
inline constexpr size_t kPassVectors = kLanes <= (kInPlace<kDot> ? 1 : 2) && kVectors > 1 ? 2 : 1;

// The top plane of T16 does not fit an i8 operand where it lies: kSigned shifts it down.
template <simd::DotKind kDot>
inline constexpr bool kShiftTop = kDot == simd::DotKind::kSigned;

// What a pass over T16 tiles gives to use(sums): sums[lane][vector].
template <simd::DotKind kDot, size_t kLanes>
using PassSums = dot::DotSums[kLanes][kPassVectors<kDot, kLanes>];

// One pass over the panel with 32-bit sums of every plane.
template <simd::DotKind kDot, size_t kLanes, typename Use>
HWY_INLINE void PassInPlace(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                            size_t tiles, const Use& use) {
  constexpr size_t kPass = kPassVectors<kDot, kLanes>;
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
    hwy::Prefetch(tile + kPrefetchBytes);
    dot::DotCodes packed[kPass];
    for (size_t v = 0; v < kPass; ++v) packed[v] = hn::LoadU(d8, tile + v * dot::kDotBytes);
    for (size_t plane = 0; plane < 4; ++plane) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto four = dot::BroadcastActs(acts + 4 * (plane * kLanes + lane));
        for (size_t v = 0; v < kPass; ++v) {
          const auto codes = kShiftTop<kDot> && plane == 3 ? hn::ShiftRight<6>(packed[v])
                                                           : hn::And(packed[v], masks[plane]);
          acc[plane][lane][v] = dot::DotStep<kDot>(acc[plane][lane][v], codes, four);
        }
      }
    }
  }
  PassSums<kDot, kLanes> sums;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v) {
      const auto low = hn::Add(acc[0][lane][v], hn::ShiftRight<2>(acc[1][lane][v]));
      const auto top = kShiftTop<kDot> ? acc[3][lane][v] : hn::ShiftRight<6>(acc[3][lane][v]);
      const auto high = hn::Add(hn::ShiftRight<4>(acc[2][lane][v]), top);
      sums[lane][v] = hn::Add(low, high);
    }
  }
  use(sums);
}

// One pass over the panel with 16-bit sums of products, which become 32-bit ones every
// kFoldTiles tiles: planes 0 and 2 as they are, planes 1 and 3 four times too large. A pair of
// products of the latter lies in -2048 .. 2032, and 16 of them in -32768 .. 32512: eight tiles.
template <simd::DotKind kDot, size_t kLanes, typename Use>
HWY_INLINE void PassFolding(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                            size_t tiles, const Use& use) {
  constexpr size_t kFoldTiles = 8;
  constexpr size_t kPass = kPassVectors<kDot, kLanes>;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  const dot::DotPairsTag d16;
  const dot::DotCodes masks[2] = {hn::Set(d8, 0x03), hn::Set(d8, 0x0C)};
  dot::DotSums acc[2][kLanes][kPass];  // of planes 0 and 2, of planes 1 and 3
  for (auto& plane : acc) {
    for (auto& lane : plane) {
      for (auto& vector : lane) vector = hn::Zero(d32);
    }
  }
  for (size_t begin = 0; begin < tiles; begin += kFoldTiles) {
    dot::DotPairs pairs[2][kLanes][kPass];
    for (auto& plane : pairs) {
      for (auto& lane : plane) {
        for (auto& vector : lane) vector = hn::Zero(d16);
      }
    }
    const size_t count = std::min(kFoldTiles, tiles - begin);
    for (size_t t = 0; t < count; ++t, tile += kTileBytes, acts += kT16TileCols * kLanes) {
      hwy::Prefetch(tile + kPrefetchBytes);
      dot::DotCodes packed[kPass], codes[kPass];
      for (size_t v = 0; v < kPass; ++v) packed[v] = hn::LoadU(d8, tile + v * dot::kDotBytes);
      for (size_t plane = 0; plane < 4; ++plane) {
        for (size_t v = 0; v < kPass; ++v) {
          if (plane == 2)
            packed[v] = hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, packed[v])));
          codes[v] = hn::And(packed[v], masks[plane % 2]);
        }
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const auto four = dot::BroadcastActs(acts + 4 * (plane * kLanes + lane));
          for (size_t v = 0; v < kPass; ++v) {
            auto& sum = pairs[plane % 2][lane][v];
            sum = dot::AddPairProducts(sum, codes[v], four);
          }
        }
      }
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t v = 0; v < kPass; ++v) {
        acc[0][lane][v] = dot::FoldPairs(acc[0][lane][v], pairs[0][lane][v]);
        acc[1][lane][v] = dot::FoldPairs(acc[1][lane][v], pairs[1][lane][v]);
      }
    }
  }
  PassSums<kDot, kLanes> sums;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v)
      sums[lane][v] = hn::Add(acc[0][lane][v], hn::ShiftRight<2>(acc[1][lane][v]));
  }
  use(sums);
}

// Two lanes of two vectors fill sixteen registers: g++ 12 spills where more is around.
template <simd::DotKind kDot, size_t kLanes>
HWY_NOINLINE void PassFoldingApart(const uint8_t* HWY_RESTRICT tile,
                                   const int8_t* HWY_RESTRICT acts, size_t tiles,
                                   PassSums<kDot, kLanes>& sums) {
  PassFolding<kDot, kLanes>(tile, acts, tiles, [&](const PassSums<kDot, kLanes>& found) HWY_ATTR {
    for (size_t i = 0; i < kLanes * kPassVectors<kDot, kLanes>; ++i)
      sums[i % kLanes][i / kLanes] = found[i % kLanes][i / kLanes];
  });
}

// Sums of code * act over `tiles` tiles of one panel, codes trit + 1: use(first, sums) for every
// pass, where sums[lane][v] are those of the rows of vector first + v.
template <simd::DotKind kDot, size_t kLanes, typename Use>
HWY_INLINE void SumT16(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                       size_t tiles, const Use& use) {
  for (size_t first = 0; first < kVectors; first += kPassVectors<kDot, kLanes>) {
    const uint8_t* part = tile + first * dot::kDotBytes;
    const auto use_part = [&](const PassSums<kDot, kLanes>& sums) HWY_ATTR { use(first, sums); };
    if constexpr (kInPlace<kDot>) {
      PassInPlace<kDot, kLanes>(part, acts, tiles, use_part);
    } else if constexpr (kLanes == 1) {
      PassFolding<kDot, kLanes>(part, acts, tiles, use_part);
    } else {
      PassSums<kDot, kLanes> sums;
      PassFoldingApart<kDot, kLanes>(part, acts, tiles, sums);
      use_part(sums);
    }
  }
}

// sums[lane * 16 + row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void DotT16(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                       size_t tiles, int32_t* HWY_RESTRICT sums) {
  SumT16<kDot, kLanes>(
      tile, acts, tiles, [&](size_t first, const PassSums<kDot, kLanes>& found) HWY_ATTR {
        for (size_t lane = 0; lane < kLanes; ++lane) {
          for (size_t v = 0; v < kPassVectors<kDot, kLanes>; ++v)
            hn::StoreU(found[lane][v], dot::DotSumsTag(),
                       sums + lane * kPanelRows + (first + v) * (dot::kDotBytes / 4));
        }
      });
}

#endif

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_T16_DOTS_INL_H_
