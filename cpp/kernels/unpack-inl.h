// SPDX-License-Identifier: Apache-2.0
// Run-time tiles to bytes: shared by the GEMM kernels, which spend little time here.
//
// A step is four columns of a panel: 64 bytes, row r in bytes 4 r .. 4 r + 3, codes trit + 1.

#if defined(TERNARYFORGE_KERNELS_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_UNPACK_INL_H_
#undef TERNARYFORGE_KERNELS_UNPACK_INL_H_
#else
#define TERNARYFORGE_KERNELS_UNPACK_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "kernels/t20_decode-inl.h"
#include "kernels/tile_runs.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Steps that `tiles` tiles of a run have: one for a plane of T20, four for T16.
HWY_INLINE size_t RunSteps(const TileRun& run, size_t tiles) { return tiles * run.TileCols() / 4; }

#if HWY_TARGET == HWY_SCALAR

// `tiles` tiles of a run, the first of which stands at `tile`, into RunSteps(run, tiles) steps.
// Asks memory for those `ahead` bytes further on.
inline void UnpackTiles(const TileRun& run, const uint8_t* tile, size_t tiles, size_t /*ahead*/,
                        bool /*permute*/, uint8_t* codes) {
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes) {
    if (run.plane != TileRun::kAllPlanes) {
      for (size_t i = 0; i < kTileBytes; ++i)
        codes[i] = static_cast<uint8_t>(tile[i] / kT20Powers[run.plane] % 3);
      codes += kTileBytes;
      continue;
    }
    for (size_t plane = 0; plane < 4; ++plane, codes += kTileBytes) {
      for (size_t i = 0; i < kTileBytes; ++i) codes[i] = (tile[i] >> (2 * plane)) & 3;
    }
  }
}

#else

inline void UnpackT16(const uint8_t* HWY_RESTRICT tile, size_t tiles, size_t ahead,
                      uint8_t* HWY_RESTRICT codes) {
  const dot::DotBytesTag d8;
  const dot::DotPairsTag d16;
  const auto mask = hn::Set(d8, 3);
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, codes += 4 * kTileBytes) {
    hwy::Prefetch(tile + ahead);
    for (size_t i = 0; i < kTileBytes; i += dot::kDotBytes) {
      const auto packed = hn::LoadU(d8, tile + i);
      const auto words = hn::BitCast(d16, packed);
      hn::StoreU(hn::And(packed, mask), d8, codes + i);
      hn::StoreU(hn::And(hn::BitCast(d8, hn::ShiftRight<2>(words)), mask), d8,
                 codes + kTileBytes + i);
      hn::StoreU(hn::And(hn::BitCast(d8, hn::ShiftRight<4>(words)), mask), d8,
                 codes + 2 * kTileBytes + i);
      hn::StoreU(hn::And(hn::BitCast(d8, hn::ShiftRight<6>(words)), mask), d8,
                 codes + 3 * kTileBytes + i);
    }
  }
}

template <size_t kPlane>
void UnpackDigits(const uint8_t* HWY_RESTRICT tile, size_t tiles, uint8_t* HWY_RESTRICT codes) {
  const dot::DotBytesTag d8;
  for (size_t i = 0; i < tiles * kTileBytes; i += dot::kDotBytes)
    hn::StoreU(Digit<kPlane>(hn::LoadU(d8, tile + i)), d8, codes + i);
}

#if HWY_TARGET == HWY_AVX3
inline void UnpackFields(const uint8_t* HWY_RESTRICT tile, size_t tiles, int shift,
                         uint8_t* HWY_RESTRICT codes) {
  const dot::DotBytesTag d8;
  const dot::DotPairsTag d16;
  const FieldTable table;
  const auto mask = hn::Set(d8, 3);
  for (size_t i = 0; i < tiles * kTileBytes; i += dot::kDotBytes) {
    const auto fields = table.Fields(Remainder<3>(hn::LoadU(d8, tile + i)));
    const auto shifted = hn::ShiftRightSame(hn::BitCast(d16, fields), shift);
    hn::StoreU(hn::And(hn::BitCast(d8, shifted), mask), d8, codes + i);
  }
}
#endif

// `tiles` tiles of a run, the first of which stands at `tile`, into RunSteps(run, tiles) steps.
// Asks memory for those `ahead` bytes further on.
inline void UnpackTiles(const TileRun& run, const uint8_t* tile, size_t tiles, size_t ahead,
                        [[maybe_unused]] bool permute, uint8_t* codes) {
  if (run.plane == TileRun::kAllPlanes) return UnpackT16(tile, tiles, ahead, codes);
  if (run.plane == 0) {  // the other planes find the tiles in the cache
    for (size_t i = 0; i < tiles * kTileBytes; i += kTileBytes) hwy::Prefetch(tile + ahead + i);
  }
#if HWY_TARGET == HWY_AVX3
  if (permute && run.plane < 4)
    return UnpackFields(tile, tiles, static_cast<int>(2 * run.plane), codes);
#endif
  switch (run.plane) {
    case 0:
      return UnpackDigits<0>(tile, tiles, codes);
    case 1:
      return UnpackDigits<1>(tile, tiles, codes);
    case 2:
      return UnpackDigits<2>(tile, tiles, codes);
    case 3:
      return UnpackDigits<3>(tile, tiles, codes);
    default:
      return UnpackDigits<4>(tile, tiles, codes);
  }
}

#endif

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_UNPACK_INL_H_
