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

// sums[row] = sum of code * act over `tiles` tiles of one panel; codes are trit + 1.
template <simd::DotKind kDot>
HWY_INLINE void PanelDot(const uint8_t* HWY_RESTRICT tile, const int8_t* HWY_RESTRICT acts,
                         size_t tiles, int32_t* HWY_RESTRICT sums) {
#if HWY_TARGET == HWY_SCALAR
  std::memset(sums, 0, kPanelRows * sizeof(int32_t));
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols) {
    for (size_t byte = 0; byte < kTileBytes; ++byte) {
      for (size_t plane = 0; plane < 4; ++plane) {
        sums[byte / 4] += ((tile[byte] >> (2 * plane)) & 3) * acts[4 * plane + byte % 4];
      }
    }
  }
#else
  namespace simd_hwy = simd::HWY_NAMESPACE;
  const simd_hwy::DotBytesTag d8;
  const simd_hwy::DotSumsTag d32;
  const hn::RebindToSigned<simd_hwy::DotBytesTag> di8;
  constexpr size_t kVectors = kTileBytes / simd_hwy::kDotBytes;
  // Planes stay where they lie in the byte: the accumulator of plane n is exactly 4^n times its
  // sum.
  simd_hwy::DotSums plane0[kVectors], plane1[kVectors], plane2[kVectors], plane3[kVectors];
  for (size_t v = 0; v < kVectors; ++v)
    plane0[v] = plane1[v] = plane2[v] = plane3[v] = hn::Zero(d32);
  const auto mask0 = hn::Set(d8, 0x03), mask1 = hn::Set(d8, 0x0C), mask2 = hn::Set(d8, 0x30),
             mask3 = hn::Set(d8, 0xC0);
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT16TileCols) {
    hwy::Prefetch(tile + 2048);
    int32_t four[4];
    std::memcpy(four, acts, sizeof(four));
    const auto acts0 = hn::BitCast(di8, hn::Set(d32, four[0])),
               acts1 = hn::BitCast(di8, hn::Set(d32, four[1])),
               acts2 = hn::BitCast(di8, hn::Set(d32, four[2])),
               acts3 = hn::BitCast(di8, hn::Set(d32, four[3]));
    for (size_t v = 0; v < kVectors; ++v) {
      const auto codes = hn::LoadU(d8, tile + v * simd_hwy::kDotBytes);
      plane0[v] = simd_hwy::DotStep<kDot>(plane0[v], hn::And(codes, mask0), acts0);
      plane1[v] = simd_hwy::DotStep<kDot>(plane1[v], hn::And(codes, mask1), acts1);
      plane2[v] = simd_hwy::DotStep<kDot>(plane2[v], hn::And(codes, mask2), acts2);
      plane3[v] = simd_hwy::DotStep<kDot>(plane3[v], hn::And(codes, mask3), acts3);
    }
  }
  for (size_t v = 0; v < kVectors; ++v) {
    const auto low = hn::Add(plane0[v], hn::ShiftRight<2>(plane1[v]));
    const auto high = hn::Add(hn::ShiftRight<4>(plane2[v]), hn::ShiftRight<6>(plane3[v]));
    hn::StoreU(hn::Add(low, high), d32, sums + v * (simd_hwy::kDotBytes / 4));
  }
#endif
}

template <simd::DotKind kDot>
void GemvPanels(const PackedTensor& weight, const Int8Acts& acts, size_t panel_begin,
                size_t panel_end, float* HWY_RESTRICT out) {
  const size_t tiles = T16TilesPerPanel(weight.cols());
  const Epilogue epilogue(weight, acts);
  alignas(64) int32_t sums[kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* stream = weight.bytes().data() + panel * tiles * kTileBytes;
    alignas(64) float totals[kPanelRows] = {};
    for (size_t group = 0; group < epilogue.groups(); ++group) {
      const Range range = epilogue.GroupTiles(group);
      PanelDot<kDot>(stream + range.begin * kTileBytes, acts.codes + range.begin * kT16TileCols,
                     range.end - range.begin, sums);
      epilogue.AddGroup(panel, group, 0, sums, totals);
    }
    epilogue.Store(panel, 0, totals, out);
  }
}

template <simd::DotKind kDot>
void DotPanels(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
               size_t panel_end, int32_t* HWY_RESTRICT out) {
  const size_t tiles = T16TilesPerPanel(weight.cols());
  int32_t code_sum = 0;
  for (size_t i = 0; i < weight.cols(); ++i) code_sum += codes[i];
  alignas(64) int32_t sums[kPanelRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    PanelDot<kDot>(weight.bytes().data() + panel * tiles * kTileBytes, codes, tiles, sums);
    const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
    for (size_t row = 0; row < rows; ++row) out[panel * kPanelRows + row] = sums[row] - code_sum;
  }
}

void Gemv(simd::DotKind dot, const PackedTensor& weight, const Int8Acts& acts, size_t panel_begin,
          size_t panel_end, float* out) {
  if (dot == simd::DotKind::kNative)
    return GemvPanels<simd::DotKind::kNative>(weight, acts, panel_begin, panel_end, out);
  GemvPanels<simd::DotKind::kPortable>(weight, acts, panel_begin, panel_end, out);
}

void Dot(simd::DotKind dot, const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
         size_t panel_end, int32_t* out) {
  if (dot == simd::DotKind::kNative)
    return DotPanels<simd::DotKind::kNative>(weight, codes, panel_begin, panel_end, out);
  DotPanels<simd::DotKind::kPortable>(weight, codes, panel_begin, panel_end, out);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemv);
HWY_EXPORT(Dot);

void GemvT16I8(const PackedTensor& weight, const Int8Acts& acts, size_t panel_begin,
               size_t panel_end, float* out) {
  HWY_DYNAMIC_DISPATCH(Gemv)(simd::ActiveDot(), weight, acts, panel_begin, panel_end, out);
}

void DotT16I8(const PackedTensor& weight, const int8_t* codes, size_t panel_begin, size_t panel_end,
              int32_t* out) {
  HWY_DYNAMIC_DISPATCH(Dot)(simd::ActiveDot(), weight, codes, panel_begin, panel_end, out);
}

}  // namespace tf
#endif  // HWY_ONCE
