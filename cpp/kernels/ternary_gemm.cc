// SPDX-License-Identifier: Apache-2.0
// GEMM on T16 tiles with quantized activations; see ternary_gemm.h.
#include "kernels/ternary_gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats/t16.h"
#include "kernels/epilogue.h"

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

// A step is four columns: 64 bytes of unpacked codes of one panel, row r in bytes 4 r .. 4 r + 3.
// A block of steps is unpacked once for all lanes; with two panels it takes 16 KiB of the cache.
inline constexpr size_t kBlockSteps = 128;
inline constexpr size_t kPanels = 2;      // unpacked together
inline constexpr size_t kMaxLanes = 128;  // summed together
inline constexpr size_t kSumRows = kPanels * kPanelRows;

#if HWY_TARGET == HWY_SCALAR

void UnpackTiles(const uint8_t* tile, size_t tiles, uint8_t* codes) {
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes) {
    for (size_t plane = 0; plane < 4; ++plane, codes += kTileBytes) {
      for (size_t i = 0; i < kTileBytes; ++i) codes[i] = (tile[i] >> (2 * plane)) & 3;
    }
  }
}

template <simd::DotKind kDot>
void AddDots(const uint8_t* codes, size_t steps, const int8_t* acts, size_t block, size_t lanes,
             size_t panels, int32_t* sums) {
  for (size_t panel = 0; panel < panels; ++panel, codes += kBlockSteps * kTileBytes) {
    for (size_t step = 0; step < steps; ++step) {
      for (size_t i = 0; i < kTileBytes; ++i) {
        for (size_t lane = 0; lane < lanes; ++lane) {
          sums[lane * kSumRows + panel * kPanelRows + i / 4] +=
              codes[step * kTileBytes + i] * acts[4 * (step * block + lane) + i % 4];
        }
      }
    }
  }
}

#else

namespace dot = simd::HWY_NAMESPACE;

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a step

void UnpackTiles(const uint8_t* HWY_RESTRICT tile, size_t tiles, uint8_t* HWY_RESTRICT codes) {
  const dot::DotBytesTag d8;
  const dot::DotPairsTag d16;
  const auto mask = hn::Set(d8, 3);
  for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, codes += 4 * kTileBytes) {
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

// Adds the dots of `steps` steps to sums[lane * kSumRows + row] for kLanes lanes and kCount vectors
// of codes, `next` bytes apart; the rows of a vector follow those of the one before.
template <simd::DotKind kDot, size_t kLanes, size_t kCount>
HWY_INLINE void AddVectorDots(const uint8_t* HWY_RESTRICT codes, size_t next, size_t steps,
                              const int8_t* HWY_RESTRICT acts, size_t block,
                              int32_t* HWY_RESTRICT sums) {
  constexpr size_t kRows = dot::kDotBytes / 4;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  if constexpr (kDot == simd::DotKind::kNative) {
    dot::DotSums acc[kLanes][kCount];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t v = 0; v < kCount; ++v)
        acc[lane][v] = hn::LoadU(d32, sums + lane * kSumRows + v * kRows);
    }
    for (size_t step = 0; step < steps; ++step, codes += kTileBytes, acts += 4 * block) {
      dot::DotCodes code[kCount];
      for (size_t v = 0; v < kCount; ++v) code[v] = hn::LoadU(d8, codes + v * next);
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto four = dot::BroadcastActs(acts + 4 * lane);
        for (size_t v = 0; v < kCount; ++v)
          acc[lane][v] = dot::DotStep<kDot>(acc[lane][v], code[v], four);
      }
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t v = 0; v < kCount; ++v)
        hn::StoreU(acc[lane][v], d32, sums + lane * kSumRows + v * kRows);
    }
  } else {
    // A pair of products of codes up to 2 lies in -512 .. 508, and 64 of them in -32768 .. 32512.
    constexpr size_t kFoldSteps = 64;
    for (size_t begin = 0; begin < steps; begin += kFoldSteps) {
      dot::DotPairs pairs[kLanes][kCount];
      for (auto& lane : pairs) {
        for (auto& vector : lane) vector = hn::Zero(dot::DotPairsTag());
      }
      const size_t count = std::min(kFoldSteps, steps - begin);
      for (size_t step = 0; step < count; ++step, codes += kTileBytes, acts += 4 * block) {
        dot::DotCodes code[kCount];
        for (size_t v = 0; v < kCount; ++v) code[v] = hn::LoadU(d8, codes + v * next);
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const auto four = dot::BroadcastActs(acts + 4 * lane);
          for (size_t v = 0; v < kCount; ++v)
            pairs[lane][v] = hn::Add(pairs[lane][v], dot::PairProducts(code[v], four));
        }
      }
      for (size_t lane = 0; lane < kLanes; ++lane) {
        for (size_t v = 0; v < kCount; ++v) {
          int32_t* to = sums + lane * kSumRows + v * kRows;
          hn::StoreU(dot::FoldPairs(hn::LoadU(d32, to), pairs[lane][v]), d32, to);
        }
      }
    }
  }
}

// Adds the dots of `steps` unpacked steps of one or two panels to sums[lane * kSumRows + panel * 16
// + row] for `lanes` <= 8 lanes of one block (or more, up to a multiple of four, with no use).
template <simd::DotKind kDot>
HWY_INLINE void AddDots(const uint8_t* codes, size_t steps, const int8_t* acts, size_t block,
                        size_t lanes, size_t panels, int32_t* sums) {
  constexpr size_t kRows = dot::kDotBytes / 4;
  constexpr size_t kPanelStride = kBlockSteps * kTileBytes;
  if constexpr (kVectors == 1) {
    if (panels == 2) {
      return lanes > 4 ? AddVectorDots<kDot, 8, 2>(codes, kPanelStride, steps, acts, block, sums)
                       : AddVectorDots<kDot, 4, 2>(codes, kPanelStride, steps, acts, block, sums);
    }
    return lanes > 4 ? AddVectorDots<kDot, 8, 1>(codes, 0, steps, acts, block, sums)
                     : AddVectorDots<kDot, 4, 1>(codes, 0, steps, acts, block, sums);
  } else {
    for (size_t lane = 0; lane < lanes; lane += 4) {
      for (size_t v = 0; v < panels * kVectors; v += 2) {
        AddVectorDots<kDot, 4, 2>(
            codes + v / kVectors * kPanelStride + v % kVectors * dot::kDotBytes, dot::kDotBytes,
            steps, acts + 4 * lane, block, sums + lane * kSumRows + v * kRows);
      }
    }
  }
}

#endif

// `panels` neighbouring panels from `panel` on, all tokens of acts.
template <simd::DotKind kDot>
void GemmPanels(const PackedTensor& weight, const QuantizedActs& acts, const Epilogue& epilogue,
                size_t first_token, size_t tokens, size_t panel, size_t panels,
                float* HWY_RESTRICT out, size_t out_stride) {
  alignas(64) uint8_t codes[kPanels * kBlockSteps * kTileBytes];
  alignas(64) int32_t sums[kMaxLanes * kSumRows];
  alignas(64) float totals[kMaxLanes * kSumRows];
  constexpr size_t kBlockTiles = kBlockSteps / 4;
  const size_t lanes = tokens * acts.lanes_per_token;
  const size_t summed = RoundUp(lanes, 4);
  const size_t first_lane = first_token * acts.lanes_per_token;
  std::memset(totals, 0, tokens * kSumRows * sizeof(float));
  for (size_t group = 0; group < epilogue.groups(); ++group) {
    const Range range = epilogue.GroupTiles(group);
    std::memset(sums, 0, summed * kSumRows * sizeof(int32_t));
    for (size_t tile = range.begin; tile < range.end; tile += kBlockTiles) {
      const size_t tiles = std::min(kBlockTiles, range.end - tile);
      for (size_t p = 0; p < panels; ++p) {
        const uint8_t* stream = weight.bytes().data() + (panel + p) * T16PanelBytes(weight.cols());
        UnpackTiles(stream + tile * kTileBytes, tiles, codes + p * kBlockSteps * kTileBytes);
      }
      for (size_t lane = 0; lane < lanes; lane += acts.block) {
        AddDots<kDot>(codes, 4 * tiles,
                      acts.codes + (first_lane + lane) / acts.block * acts.block_stride +
                          tile * kT16TileCols * acts.block,
                      acts.block, std::min(acts.block, lanes - lane), panels,
                      sums + lane * kSumRows);
      }
    }
    for (size_t token = 0; token < tokens; ++token) {
      for (size_t p = 0; p < panels; ++p) {
        epilogue.AddGroup(panel + p, group, first_token + token,
                          sums + token * acts.lanes_per_token * kSumRows + p * kPanelRows, kSumRows,
                          totals + token * kSumRows + p * kPanelRows);
      }
    }
  }
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t p = 0; p < panels; ++p) {
      epilogue.Store(panel + p, first_token + token, totals + token * kSumRows + p * kPanelRows,
                     out + (first_token + token) * out_stride);
    }
  }
}

template <simd::DotKind kDot>
void GemmAll(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
             size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const Epilogue epilogue(weight, acts);
  const size_t tokens_at_once = kMaxLanes / acts.lanes_per_token;
  for (size_t panel = panel_begin; panel < panel_end; panel += kPanels) {
    const size_t panels = std::min(kPanels, panel_end - panel);
    for (size_t token = 0; token < tokens; token += tokens_at_once) {
      GemmPanels<kDot>(weight, acts, epilogue, token, std::min(tokens_at_once, tokens - token),
                       panel, panels, out, out_stride);
    }
  }
}

void Gemm(simd::DotKind dot, const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
          size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const auto run = dot == simd::DotKind::kNative ? GemmAll<simd::DotKind::kNative>
                                                 : GemmAll<simd::DotKind::kPortable>;
  run(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemm);

void TernaryGemm(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Gemm)(simd::ActiveDot(), weight, acts, tokens, panel_begin, panel_end, out,
                             out_stride);
}

}  // namespace tf
#endif  // HWY_ONCE
