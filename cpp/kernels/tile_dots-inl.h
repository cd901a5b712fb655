// SPDX-License-Identifier: Apache-2.0
// Sums of code * activation over the tiles of one panel for few lanes: the heart of the ternary
// GEMV.

#if defined(TERNARYFORGE_KERNELS_TILE_DOTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_TILE_DOTS_INL_H_
#undef TERNARYFORGE_KERNELS_TILE_DOTS_INL_H_
#else
#define TERNARYFORGE_KERNELS_TILE_DOTS_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "formats/t16.h"
#include "kernels/t20_decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

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

// The same for T20 tiles, each plane by itself: sums[(plane * kLanes + lane) * 16 + row]. Plane n
// meets the activations from acts + n * plane_stride on.
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

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a tile

// How far ahead of its use a tile is asked for: what memory sends in some 200 ns.
inline constexpr size_t kPrefetchBytes = 8192;

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

// One pass over the panel with 32-bit sums of every plane.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void PassInPlace(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                            size_t tiles, int32_t* HWY_RESTRICT sums) {
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
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v) {
      const auto low = hn::Add(acc[0][lane][v], hn::ShiftRight<2>(acc[1][lane][v]));
      const auto top = kShiftTop<kDot> ? acc[3][lane][v] : hn::ShiftRight<6>(acc[3][lane][v]);
      const auto high = hn::Add(hn::ShiftRight<4>(acc[2][lane][v]), top);
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
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kPass; ++v) {
      hn::StoreU(hn::Add(acc[0][lane][v], hn::ShiftRight<2>(acc[1][lane][v])), d32,
                 sums + lane * kPanelRows + v * (dot::kDotBytes / 4));
    }
  }
}

// Two lanes of two vectors fill sixteen registers: g++ 12 spills where more is around.
template <simd::DotKind kDot, size_t kLanes>
HWY_NOINLINE void PassFoldingApart(const uint8_t* HWY_RESTRICT tile,
                                   const int8_t* HWY_RESTRICT acts, size_t tiles,
                                   int32_t* HWY_RESTRICT sums) {
  PassFolding<kDot, kLanes>(tile, acts, tiles, sums);
}

// sums[lane * 16 + row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot, size_t kLanes>
HWY_INLINE void DotT16(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                       size_t tiles, int32_t* HWY_RESTRICT sums) {
  for (size_t v = 0; v < kVectors; v += kPassVectors<kDot, kLanes>) {
    const uint8_t* part = tile + v * dot::kDotBytes;
    int32_t* part_sums = sums + v * (dot::kDotBytes / 4);
    if constexpr (kInPlace<kDot>) {
      PassInPlace<kDot, kLanes>(part, acts, tiles, part_sums);
    } else if constexpr (kLanes == 1) {
      PassFolding<kDot, kLanes>(part, acts, tiles, part_sums);
    } else {
      PassFoldingApart<kDot, kLanes>(part, acts, tiles, part_sums);
    }
  }
}

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

#endif  // TERNARYFORGE_KERNELS_TILE_DOTS_INL_H_
