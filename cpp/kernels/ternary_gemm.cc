// SPDX-License-Identifier: Apache-2.0
// GEMM on T16 tiles with int8 activations; see ternary_gemm.h.
#include "kernels/ternary_gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats/t16.h"
#include "kernels/epilogue.h"
#include "kernels/ternary_gemv.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemm.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR

namespace simd_hwy = simd::HWY_NAMESPACE;

// Tokens that share one pass over a panel: as many accumulators as leave registers for the codes.
inline constexpr size_t kVectors = kTileBytes / simd_hwy::kDotBytes;
inline constexpr size_t kTileTokens = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;

// sums[token * 16 + row] = sum of code * act over `tiles` tiles of one panel.
template <simd::DotKind kDot>
HWY_INLINE void PanelDots(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                          size_t stride, size_t tiles, int32_t* HWY_RESTRICT sums) {
  const simd_hwy::DotBytesTag d8;
  const simd_hwy::DotSumsTag d32;
  const hn::RebindToSigned<simd_hwy::DotBytesTag> di8;
  const hn::RebindToUnsigned<simd_hwy::DotSumsTag> du32;
  const auto mask = hn::Set(d8, 3);
  simd_hwy::DotSums acc[kTileTokens][kVectors];
  for (auto& token : acc) {
    for (auto& vector : token) vector = hn::Zero(d32);
  }
  const auto step = [&](const simd_hwy::DotCodes(&codes)[kVectors],
                        const int8_t* four_acts) HWY_ATTR {
    for (size_t token = 0; token < kTileTokens; ++token) {
      int32_t four;
      std::memcpy(&four, four_acts + token * stride, sizeof(four));
      const auto broadcast = hn::BitCast(di8, hn::Set(d32, four));
      for (size_t v = 0; v < kVectors; ++v)
        acc[token][v] = simd_hwy::DotStep<kDot>(acc[token][v], codes[v], broadcast);
    }
  };
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols) {
    simd_hwy::DotCodes packed[kVectors], codes[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      packed[v] = hn::LoadU(d8, tile + v * simd_hwy::kDotBytes);
      codes[v] = hn::And(packed[v], mask);
    }
    step(codes, acts);
    for (size_t v = 0; v < kVectors; ++v) {
      codes[v] = hn::And(hn::BitCast(d8, hn::ShiftRight<2>(hn::BitCast(du32, packed[v]))), mask);
    }
    step(codes, acts + 4);
    for (size_t v = 0; v < kVectors; ++v) {
      codes[v] = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(du32, packed[v]))), mask);
    }
    step(codes, acts + 8);
    for (size_t v = 0; v < kVectors; ++v) {
      codes[v] = hn::And(hn::BitCast(d8, hn::ShiftRight<6>(hn::BitCast(du32, packed[v]))), mask);
    }
    step(codes, acts + 12);
  }
  for (size_t token = 0; token < kTileTokens; ++token) {
    for (size_t v = 0; v < kVectors; ++v) {
      hn::StoreU(acc[token][v], d32, sums + token * kPanelRows + v * (simd_hwy::kDotBytes / 4));
    }
  }
}

#else

inline constexpr size_t kTileTokens = 1;

template <simd::DotKind kDot>
void PanelDots(const uint8_t* tile, const int8_t* acts, size_t /*stride*/, size_t tiles,
               int32_t* sums) {
  std::memset(sums, 0, kPanelRows * sizeof(int32_t));
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols) {
    for (size_t byte = 0; byte < kTileBytes; ++byte) {
      for (size_t plane = 0; plane < 4; ++plane) {
        sums[byte / 4] += ((tile[byte] >> (2 * plane)) & 3) * acts[4 * plane + byte % 4];
      }
    }
  }
}

#endif

// Whole groups of kTileTokens tokens; returns how many tokens that were.
template <simd::DotKind kDot>
size_t GemmPanels(const PackedTensor& weight, const Int8Acts& acts, size_t tokens,
                  size_t panel_begin, size_t panel_end, float* HWY_RESTRICT out,
                  size_t out_stride) {
  const size_t whole = tokens / kTileTokens * kTileTokens;
  const size_t tiles = T16TilesPerPanel(weight.cols());
  const Epilogue epilogue(weight, acts);
  alignas(64) int32_t sums[kTileTokens * kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* stream = weight.bytes().data() + panel * tiles * kTileBytes;
    for (size_t first = 0; first < whole; first += kTileTokens) {
      alignas(64) float totals[kTileTokens * kPanelRows] = {};
      for (size_t group = 0; group < epilogue.groups(); ++group) {
        const Range range = epilogue.GroupTiles(group);
        PanelDots<kDot>(stream + range.begin * kTileBytes,
                        acts.codes + first * acts.stride + range.begin * kT16TileCols, acts.stride,
                        range.end - range.begin, sums);
        for (size_t token = 0; token < kTileTokens; ++token) {
          epilogue.AddGroup(panel, group, first + token, sums + token * kPanelRows,
                            totals + token * kPanelRows);
        }
      }
      for (size_t token = 0; token < kTileTokens; ++token) {
        epilogue.Store(panel, first + token, totals + token * kPanelRows,
                       out + (first + token) * out_stride);
      }
    }
  }
  return whole;
}

size_t Gemm(simd::DotKind dot, const PackedTensor& weight, const Int8Acts& acts, size_t tokens,
            size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  if (dot == simd::DotKind::kNative) {
    return GemmPanels<simd::DotKind::kNative>(weight, acts, tokens, panel_begin, panel_end, out,
                                              out_stride);
  }
  return GemmPanels<simd::DotKind::kPortable>(weight, acts, tokens, panel_begin, panel_end, out,
                                              out_stride);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemm);

void GemmT16I8(const PackedTensor& weight, const Int8Acts& acts, size_t tokens, size_t panel_begin,
               size_t panel_end, float* out, size_t out_stride) {
  const size_t done = HWY_DYNAMIC_DISPATCH(Gemm)(simd::ActiveDot(), weight, acts, tokens,
                                                 panel_begin, panel_end, out, out_stride);
  for (size_t token = done; token < tokens; ++token) {
    const Int8Acts one = {acts.codes + token * acts.stride, acts.stride, acts.scales + token,
                          acts.chunk_sums + token * acts.chunk_stride, acts.chunk_stride};
    GemvT16I8(weight, one, panel_begin, panel_end, out + token * out_stride);
  }
}

}  // namespace tf
#endif  // HWY_ONCE
