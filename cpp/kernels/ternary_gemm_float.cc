// SPDX-License-Identifier: Apache-2.0
// GEMM on run-time tiles with float activations; see ternary_gemm.h.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats/t16.h"
#include "kernels/ternary_gemm.h"
#include "kernels/tile_runs.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemm_float.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/float_panels-inl.h"
#include "kernels/unpack-inl.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Steps of unpacked codes at a time (see unpack-inl.h).
inline constexpr size_t kFloatSteps = 64;

// Adds trit * x of `cols` columns to sums[token * 16 + row] for kTokens tokens. Every sum goes
// through its columns in their order. A ternary product is exact, so fused and separate
// multiply-add agree.
template <size_t kTokens>
HWY_INLINE void AddColumns(const uint8_t* HWY_RESTRICT codes, size_t cols,
                           const float* HWY_RESTRICT x, size_t x_stride, float* HWY_RESTRICT sums) {
  const PartTag d;
  const hn::Rebind<int32_t, PartTag> d32;
  const auto one = hn::Set(d, 1.0f);
  const auto mask = hn::Set(d32, 3);
  for (size_t row = 0; row < kPanelRows; row += kPartLanes) {
    Part acc0 = hn::LoadU(d, sums + row), acc1 = acc0, acc2 = acc0, acc3 = acc0;
    if constexpr (kTokens == 4) {
      acc1 = hn::LoadU(d, sums + kPanelRows + row);
      acc2 = hn::LoadU(d, sums + 2 * kPanelRows + row);
      acc3 = hn::LoadU(d, sums + 3 * kPanelRows + row);
    }
    for (size_t col = 0; col < cols; ++col) {
      int32_t words[kPartLanes];
      std::memcpy(words, codes + col / 4 * kTileBytes + 4 * row, sizeof(words));
      const auto shifted =
          hn::ShiftRightSame(hn::LoadU(d32, words), static_cast<int>(8 * (col % 4)));
      const auto trits = hn::Sub(hn::ConvertTo(d, hn::And(shifted, mask)), one);
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

// The sums of one run of tiles.
template <size_t kTokens>
void AddFloatRun(const TileRun& run, const uint8_t* panel, size_t cols, const float* x,
                 size_t x_stride, float* sums) {
  alignas(64) uint8_t codes[kFloatSteps * kTileBytes];
  const size_t block_tiles = 4 * kFloatSteps / run.TileCols();
  for (size_t tile = 0; tile < run.tiles; tile += block_tiles) {
    const size_t tiles = std::min(block_tiles, run.tiles - tile);
    const size_t begin = run.col + tile * run.TileCols();
    if (begin >= cols) return;  // padding
    UnpackTiles(run, panel + run.byte + tile * kTileBytes, tiles, tiles * kTileBytes,
                simd::HasBytePermute(), codes);
    AddColumns<kTokens>(codes, std::min(tiles * run.TileCols(), cols - begin), x + begin, x_stride,
                        sums);
  }
}

void GemmFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
               size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const TileRuns runs(weight);
  const auto add_group = [&]<size_t kTokens>(size_t panel, size_t group, const float* from,
                                             float* sums) HWY_ATTR {
    const uint8_t* stream = weight.bytes().data() + panel * runs.PanelBytes();
    for (size_t run = 0; run < runs.RunsPerGroup(); ++run) {
      AddFloatRun<kTokens>(runs.Run(group, run), stream, weight.cols(), from, x_stride, sums);
    }
  };
  FloatPanels(weight, runs.groups(), x, tokens, x_stride, panel_begin, panel_end, out, out_stride,
              add_group);
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
