// SPDX-License-Identifier: Apache-2.0
// Products on T8 tiles; see two_plane_linear.h.
#include "kernels/two_plane_linear.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "formats/t8.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/two_plane_linear.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/epilogue-inl.h"
#include "kernels/float_panels-inl.h"
#include "simd/dot-inl.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace dot = simd::HWY_NAMESPACE;

// Other kernels have functions of these names and this namespace.
namespace {

inline constexpr size_t kMaxPanels = 2;  // multiplied together
inline constexpr size_t kSumRows = kMaxPanels * kPanelRows;

// Columns that share a scale.
size_t GroupCols(const PackedTensor& weight) {
  return weight.scales().kind == ScaleKind::kGroup ? weight.scales().group_size : weight.cols();
}

// Panels that share one pass over the activations of a block of lanes: where a tile is one vector,
// two of them fill the registers that many lanes leave.
#if HWY_TARGET == HWY_AVX3
constexpr size_t PanelsTogether(size_t block) { return block >= 4 ? kMaxPanels : 1; }
#else
constexpr size_t PanelsTogether(size_t /*block*/) { return 1; }
#endif

#if HWY_TARGET == HWY_SCALAR

// sums[lane * kSumRows + panel * 16 + row] = sum of code * act over `tiles` tiles of one panel, or
// of two, the second `panel_bytes` behind the first.
template <simd::DotKind kDot>
void DotTiles(const uint8_t* tile, size_t panel_bytes, size_t panels, size_t tiles,
              const int8_t* acts, size_t block, int32_t* sums) {
  std::memset(sums, 0, block * kSumRows * sizeof(int32_t));
  for (size_t panel = 0; panel < panels; ++panel) {
    for (size_t t = 0; t < tiles; ++t) {
      for (size_t i = 0; i < kTileBytes; ++i) {
        const int byte = tile[panel * panel_bytes + t * kTileBytes + i];
        for (size_t lane = 0; lane < block; ++lane) {
          const int8_t* act = acts + kT8TileCols * t * block + 4 * lane + i % 4;
          sums[lane * kSumRows + panel * kPanelRows + i / 4] +=
              (byte & 15) * act[0] + (byte >> 4) * act[4 * block];
        }
      }
    }
  }
}

#else

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a tile
inline constexpr size_t kPrefetchBytes = 8192;

// Both halves of kCount vectors of packed codes.
template <size_t kCount>
struct Halves {
  dot::DotCodes low[kCount], high[kCount];

  HWY_INLINE Halves(const uint8_t* HWY_RESTRICT tile, size_t next) {
    const dot::DotBytesTag d8;
    const dot::DotPairsTag d16;
    const auto mask = hn::Set(d8, 15);
    for (size_t v = 0; v < kCount; ++v) {
      const auto packed = hn::LoadU(d8, tile + v * next);
      low[v] = hn::And(packed, mask);
      high[v] = hn::And(hn::BitCast(d8, hn::ShiftRight<4>(hn::BitCast(d16, packed))), mask);
    }
  }
};

// The dots of kCount vectors of every tile, `next` bytes apart, with kLanes neighbouring lanes. The
// rows of a vector follow those of the one before in the sums.
template <simd::DotKind kDot, size_t kLanes, size_t kCount>
HWY_INLINE void DotVectors(const uint8_t* HWY_RESTRICT tile, size_t next, size_t tiles,
                           const int8_t* HWY_RESTRICT acts, size_t block,
                           int32_t* HWY_RESTRICT sums) {
  const dot::DotSumsTag d32;
  dot::DotSums acc[kLanes][kCount];
  for (auto& lane : acc) {
    for (auto& vector : lane) vector = hn::Zero(d32);
  }
  if constexpr (kDot != simd::DotKind::kPortable) {
    dot::DotSums more[kLanes][kCount];  // of the high halves, so that steps need not wait
    for (auto& lane : more) {
      for (auto& vector : lane) vector = hn::Zero(d32);
    }
    for (size_t t = 0; t < tiles; ++t, tile += kTileBytes, acts += kT8TileCols * block) {
      hwy::Prefetch(tile + kPrefetchBytes);
      const Halves<kCount> codes(tile, next);
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const auto first = dot::BroadcastActs(acts + 4 * lane);
        const auto second = dot::BroadcastActs(acts + 4 * (block + lane));
        for (size_t v = 0; v < kCount; ++v) {
          acc[lane][v] = dot::DotStep<kDot>(acc[lane][v], codes.low[v], first);
          auto& other = kLanes * kCount > 4 ? acc[lane][v] : more[lane][v];
          other = dot::DotStep<kDot>(other, codes.high[v], second);
        }
      }
    }
    if constexpr (kLanes * kCount <= 4) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        for (size_t v = 0; v < kCount; ++v) acc[lane][v] = hn::Add(acc[lane][v], more[lane][v]);
      }
    }
  } else {
    // A pair of products of codes up to 8 lies in -2048 .. 2032, and 16 of them, those of eight
    // tiles, in -32768 .. 32512.
    constexpr size_t kFoldTiles = 8;
    for (size_t begin = 0; begin < tiles; begin += kFoldTiles) {
      dot::DotPairs pairs[kLanes][kCount];
      for (auto& lane : pairs) {
        for (auto& vector : lane) vector = hn::Zero(dot::DotPairsTag());
      }
      const size_t count = std::min(kFoldTiles, tiles - begin);
      for (size_t t = 0; t < count; ++t, tile += kTileBytes, acts += kT8TileCols * block) {
        hwy::Prefetch(tile + kPrefetchBytes);
        const Halves<kCount> codes(tile, next);
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const auto first = dot::BroadcastActs(acts + 4 * lane);
          const auto second = dot::BroadcastActs(acts + 4 * (block + lane));
          for (size_t v = 0; v < kCount; ++v) {
            pairs[lane][v] =
                hn::Add(pairs[lane][v], hn::Add(dot::PairProducts(codes.low[v], first),
                                                dot::PairProducts(codes.high[v], second)));
          }
        }
      }
      for (size_t lane = 0; lane < kLanes; ++lane) {
        for (size_t v = 0; v < kCount; ++v)
          acc[lane][v] = dot::FoldPairs(acc[lane][v], pairs[lane][v]);
      }
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t v = 0; v < kCount; ++v)
      hn::StoreU(acc[lane][v], d32, sums + lane * kSumRows + v * (dot::kDotBytes / 4));
  }
}

// sums[lane * kSumRows + panel * 16 + row] = sum of code * act over `tiles` tiles of one panel, or
// of two, the second `panel_bytes` behind the first; codes are level + 4.
template <simd::DotKind kDot>
HWY_INLINE void DotTiles(const uint8_t* tile, [[maybe_unused]] size_t panel_bytes,
                         [[maybe_unused]] size_t panels, size_t tiles, const int8_t* acts,
                         size_t block, int32_t* sums) {
  if constexpr (kVectors == 1) {
    if (block == 1) return DotVectors<kDot, 1, 1>(tile, 0, tiles, acts, block, sums);
    if (block == 2) return DotVectors<kDot, 2, 1>(tile, 0, tiles, acts, block, sums);
    // 12 lanes of two panels are 24 sums, which leave eight registers for codes and activations.
    if (panels == 2 && block == 12)
      return DotVectors<kDot, 12, 2>(tile, panel_bytes, tiles, acts, block, sums);
    if (panels == 2 && block == 8)
      return DotVectors<kDot, 8, 2>(tile, panel_bytes, tiles, acts, block, sums);
    for (size_t lane = 0; lane < block; lane += 4) {
      const int8_t* from = acts + 4 * lane;
      int32_t* to = sums + lane * kSumRows;
      if (panels == 2) {
        DotVectors<kDot, 4, 2>(tile, panel_bytes, tiles, from, block, to);
      } else {
        DotVectors<kDot, 4, 1>(tile, 0, tiles, from, block, to);
      }
    }
  } else {
    constexpr size_t kNext = dot::kDotBytes;
    for (size_t v = 0; v < kVectors; v += 2, tile += 2 * kNext, sums += kNext / 2) {
      if (block == 1) {
        DotVectors<kDot, 1, 2>(tile, kNext, tiles, acts, block, sums);
      } else if (block == 2) {
        DotVectors<kDot, 2, 2>(tile, kNext, tiles, acts, block, sums);
      } else {
        for (size_t lane = 0; lane < block; lane += 4) {
          DotVectors<kDot, 4, 2>(tile, kNext, tiles, acts + 4 * lane, block,
                                 sums + lane * kSumRows);
        }
      }
    }
  }
}

#endif

// `panels` neighbouring panels and the tokens of one block of lanes.
template <simd::DotKind kDot>
void RunBlock(const PackedTensor& weight, const Epilogue& epilogue, const QuantizedActs& acts,
              size_t first_token, size_t tokens, size_t panel, size_t panels,
              float* HWY_RESTRICT out, size_t out_stride) {
  const size_t cols = weight.cols(), panel_bytes = T8PanelBytes(cols);
  const size_t group_cols = GroupCols(weight);
  const uint8_t* stream = weight.bytes().data() + panel * panel_bytes;
  const int8_t* codes =
      acts.codes + first_token * acts.lanes_per_token / acts.block * acts.block_stride;
  alignas(64) int32_t sums[kMaxLaneBlock * kSumRows];
  alignas(64) float totals[kMaxLaneBlock * kSumRows] = {};
  for (size_t begin = 0, group = 0; begin < cols; begin += group_cols, ++group) {
    const size_t tiles = T8TilesPerPanel(std::min(group_cols, cols - begin));
    DotTiles<kDot>(stream + begin / kT8TileCols * kTileBytes, panel_bytes, panels, tiles,
                   codes + begin * acts.block, acts.block, sums);
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
void RunTokens(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
               size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const Epilogue epilogue(weight, acts);
  const size_t together = PanelsTogether(acts.block), at_once = acts.block / acts.lanes_per_token;
  for (size_t panel = panel_begin; panel < panel_end; panel += together) {
    const size_t panels = std::min(together, panel_end - panel);
    for (size_t token = 0; token < tokens; token += at_once) {
      RunBlock<kDot>(weight, epilogue, acts, token, std::min(at_once, tokens - token), panel,
                     panels, out, out_stride);
    }
  }
}

template <simd::DotKind kDot>
void RunDots(const PackedTensor& weight, const int8_t* codes, size_t panel_begin, size_t panel_end,
             int32_t* HWY_RESTRICT out) {
  const size_t cols = weight.cols(), panel_bytes = T8PanelBytes(cols);
  int32_t code_sum = 0;
  for (size_t i = 0; i < cols; ++i) code_sum += codes[i];
  alignas(64) int32_t sums[kSumRows];
  for (size_t panel = panel_begin; panel < panel_end; ++panel) {
    DotTiles<kDot>(weight.bytes().data() + panel * panel_bytes, 0, 1, T8TilesPerPanel(cols), codes,
                   1, sums);
    const size_t rows = std::min(kPanelRows, weight.rows() - panel * kPanelRows);
    for (size_t row = 0; row < rows; ++row)
      out[panel * kPanelRows + row] = sums[row] - kT8Bias * code_sum;
  }
}

void Linear(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
            size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  dot::WithDot(simd::ActiveDot(), [&]<simd::DotKind kDot>() HWY_ATTR {
    RunTokens<kDot>(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
  });
}

void Dot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin, size_t panel_end,
         int32_t* out) {
  dot::WithDot(simd::ActiveDot(), [&]<simd::DotKind kDot>() HWY_ATTR {
    RunDots<kDot>(weight, codes, panel_begin, panel_end, out);
  });
}

// Adds level * x of `cols` columns of one panel to sums[token * 16 + row] for kTokens tokens.
template <size_t kTokens>
HWY_INLINE void AddColumns(const uint8_t* HWY_RESTRICT tile, size_t cols,
                           const float* HWY_RESTRICT x, size_t x_stride, float* HWY_RESTRICT sums) {
  const PartTag d;
  const hn::Rebind<int32_t, PartTag> d32;
  const auto bias = hn::Set(d, static_cast<float>(kT8Bias));
  const auto mask = hn::Set(d32, 15);
  for (size_t row = 0; row < kPanelRows; row += kPartLanes) {
    Part acc[kTokens];
    for (size_t token = 0; token < kTokens; ++token)
      acc[token] = hn::LoadU(d, sums + token * kPanelRows + row);
    for (size_t col = 0; col < cols; ++col) {
      int32_t words[kPartLanes];
      std::memcpy(words, tile + col / kT8TileCols * kTileBytes + 4 * row, sizeof(words));
      const auto shift = static_cast<int>(8 * (col % 4) + T8Shift(col));
      const auto codes = hn::And(hn::ShiftRightSame(hn::LoadU(d32, words), shift), mask);
      const auto levels = hn::Sub(hn::ConvertTo(d, codes), bias);
      for (size_t token = 0; token < kTokens; ++token) {
        const auto value = hn::Set(d, x[token * x_stride + col]);
        acc[token] = hn::Add(acc[token], hn::Mul(levels, value));
      }
    }
    for (size_t token = 0; token < kTokens; ++token)
      hn::StoreU(acc[token], d, sums + token * kPanelRows + row);
  }
}

void LinearFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const size_t cols = weight.cols();
  const size_t group_cols = GroupCols(weight);
  const auto add_group = [&]<size_t kTokens>(size_t panel, size_t group, const float* from,
                                             float* sums) HWY_ATTR {
    const size_t begin = group * group_cols;
    const uint8_t* stream = weight.bytes().data() + panel * T8PanelBytes(cols);
    AddColumns<kTokens>(stream + begin / kT8TileCols * kTileBytes,
                        std::min(group_cols, cols - begin), from + begin, x_stride, sums);
  };
  FloatPanels(weight, DivCeil(cols, group_cols), x, tokens, x_stride, panel_begin, panel_end, out,
              out_stride, add_group);
}

}  // namespace

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Linear);
HWY_EXPORT(Dot);
HWY_EXPORT(LinearFloat);

void TwoPlaneLinear(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                    size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Linear)(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

void TwoPlaneDot(const PackedTensor& weight, const int8_t* codes, size_t panel_begin,
                 size_t panel_end, int32_t* out) {
  Check(weight.scales().kind != ScaleKind::kGroup,
        "[two_plane_dot] one sum a row; scales are per group");
  HWY_DYNAMIC_DISPATCH(Dot)(weight, codes, panel_begin, panel_end, out);
}

void TwoPlaneLinearFloat(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                         size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(LinearFloat)(weight, x, tokens, x_stride, panel_begin, panel_end, out,
                                    out_stride);
}

}  // namespace tf
#endif  // HWY_ONCE
