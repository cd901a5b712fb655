// SPDX-License-Identifier: Apache-2.0
// GEMM on run-time tiles with quantized activations; see ternary_gemm.h.
#include "kernels/ternary_gemm.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats/t16.h"
#include "kernels/tile_runs.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/ternary_gemm.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/epilogue-inl.h"
#include "kernels/unpack-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// A block of steps (see unpack-inl.h) is unpacked once for all lanes; two panels of it take 16 KiB
// of the cache.
inline constexpr size_t kBlockSteps = 128;
inline constexpr size_t kPanels = 2;                     // unpacked together
inline constexpr size_t kMaxLanes = 12 * kMaxLaneBlock;  // summed together
inline constexpr size_t kSumRows = kPanels * kPanelRows;

#if HWY_TARGET == HWY_SCALAR

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

inline constexpr size_t kVectors = kTileBytes / dot::kDotBytes;  // in a step

// Adds the dots of `steps` steps to sums[lane * kSumRows + row] for kLanes lanes and kCount vectors
// of codes, `next` bytes apart; the rows of a vector follow those of the one before.
template <simd::DotKind kDot, size_t kLanes, size_t kCount>
HWY_INLINE void AddVectorDots(const uint8_t* HWY_RESTRICT codes, size_t next, size_t steps,
                              const int8_t* HWY_RESTRICT acts, size_t block,
                              int32_t* HWY_RESTRICT sums) {
  constexpr size_t kRows = dot::kDotBytes / 4;
  const dot::DotBytesTag d8;
  const dot::DotSumsTag d32;
  if constexpr (kDot != simd::DotKind::kPortable) {
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
            pairs[lane][v] = dot::AddPairProducts(pairs[lane][v], code[v], four);
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

// As many lanes as leave registers for two vectors of codes and an activation: 16 registers hold
// the sums of six lanes, 32 those of twelve.
inline constexpr size_t kTileLanes = kVectors == 1 ? 12 : HWY_TARGET == HWY_AVX2 ? 6 : 4;

// AddVectorDots for the first `lanes` <= kTileLanes lanes, or a few more, with no use.
template <simd::DotKind kDot, size_t kCount, size_t kLanes = kTileLanes>
HWY_INLINE void AddTileDots(const uint8_t* codes, size_t next, size_t steps, const int8_t* acts,
                            size_t block, size_t lanes, int32_t* sums) {
  constexpr size_t kLess = kLanes - kTileLanes / 3;
  if constexpr (kTileLanes % 3 == 0 && kLess > 0) {
    if (lanes <= kLess) {
      return AddTileDots<kDot, kCount, kLess>(codes, next, steps, acts, block, lanes, sums);
    }
  }
  AddVectorDots<kDot, kLanes, kCount>(codes, next, steps, acts, block, sums);
}

// Adds the dots of `steps` unpacked steps of one or two panels to sums[lane * kSumRows + panel * 16
// + row] for `lanes` lanes of one block (or more, up to a multiple of four, with no use).
template <simd::DotKind kDot>
HWY_INLINE void AddDots(const uint8_t* codes, size_t steps, const int8_t* acts, size_t block,
                        size_t lanes, size_t panels, int32_t* sums) {
  constexpr size_t kRows = dot::kDotBytes / 4;
  constexpr size_t kPanelStride = kBlockSteps * kTileBytes;
  for (size_t lane = 0; lane < lanes; lane += kTileLanes) {
    const int8_t* lane_acts = acts + 4 * lane;
    int32_t* lane_sums = sums + lane * kSumRows;
    if constexpr (kVectors == 1) {
      if (panels == 2) {
        AddTileDots<kDot, 2>(codes, kPanelStride, steps, lane_acts, block, lanes - lane, lane_sums);
      } else {
        AddTileDots<kDot, 1>(codes, 0, steps, lane_acts, block, lanes - lane, lane_sums);
      }
    } else {
      for (size_t v = 0; v < panels * kVectors; v += 2) {
        AddTileDots<kDot, 2>(codes + v / kVectors * kPanelStride + v % kVectors * dot::kDotBytes,
                             dot::kDotBytes, steps, lane_acts, block, lanes - lane,
                             lane_sums + v * kRows);
      }
    }
  }
}

#endif

// What the tokens of one call share.
struct Job {
  const PackedTensor& weight;
  const QuantizedActs& acts;
  const TileRuns& runs;
  const Epilogue& epilogue;
  bool permute;
};

// Adds one run of `panels` neighbouring panels to the sums of `lanes` lanes.
template <simd::DotKind kDot>
void AddRun(const Job& job, const TileRun& run, size_t panel, size_t panels, size_t first_lane,
            size_t lanes, uint8_t* HWY_RESTRICT codes, int32_t* HWY_RESTRICT sums) {
  const QuantizedActs& acts = job.acts;
  const size_t block_tiles = 4 * kBlockSteps / run.TileCols();
  for (size_t tile = 0; tile < run.tiles; tile += block_tiles) {
    const size_t tiles = std::min(block_tiles, run.tiles - tile);
    for (size_t p = 0; p < panels; ++p) {
      const uint8_t* stream = job.weight.bytes().data() + (panel + p) * job.runs.PanelBytes();
      UnpackTiles(run, stream + run.byte + tile * kTileBytes, tiles,
                  kPanels * job.runs.PanelBytes(), job.permute,
                  codes + p * kBlockSteps * kTileBytes);
    }
    const size_t col = run.col + tile * run.TileCols();
    for (size_t lane = 0; lane < lanes; lane += acts.block) {
      const int8_t* from =
          acts.codes + (first_lane + lane) / acts.block * acts.block_stride + col * acts.block;
      AddDots<kDot>(codes, RunSteps(run, tiles), from, acts.block,
                    std::min(acts.block, lanes - lane), panels, sums + lane * kSumRows);
    }
  }
}

// `panels` neighbouring panels from `panel` on, `tokens` tokens from `first_token` on.
template <simd::DotKind kDot>
void GemmPanels(const Job& job, size_t first_token, size_t tokens, size_t panel, size_t panels,
                float* HWY_RESTRICT out, size_t out_stride) {
  alignas(64) uint8_t codes[kPanels * kBlockSteps * kTileBytes];
  alignas(64) int32_t sums[kMaxLanes * kSumRows];
  alignas(64) float totals[kMaxLanes * kSumRows];
  const size_t lanes_per_token = job.acts.lanes_per_token;
  const size_t lanes = tokens * lanes_per_token;
  std::memset(totals, 0, tokens * kSumRows * sizeof(float));
  for (size_t group = 0; group < job.runs.groups(); ++group) {
    std::memset(sums, 0, RoundUp(lanes, 4) * kSumRows * sizeof(int32_t));
    for (size_t run = 0; run < job.runs.RunsPerGroup(); ++run) {
      AddRun<kDot>(job, job.runs.Run(group, run), panel, panels, first_token * lanes_per_token,
                   lanes, codes, sums);
    }
    for (size_t token = 0; token < tokens; ++token) {
      for (size_t p = 0; p < panels; ++p) {
        job.epilogue.AddGroup(panel + p, group, first_token + token,
                              sums + token * lanes_per_token * kSumRows + p * kPanelRows, kSumRows,
                              totals + token * kSumRows + p * kPanelRows);
      }
    }
  }
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t p = 0; p < panels; ++p) {
      job.epilogue.Store(panel + p, first_token + token, totals + token * kSumRows + p * kPanelRows,
                         out + (first_token + token) * out_stride);
    }
  }
}

template <simd::DotKind kDot>
void GemmAll(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
             size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  const TileRuns runs(weight);
  const Epilogue epilogue(weight, acts);
  const Job job = {weight, acts, runs, epilogue, simd::HasBytePermute()};
  const size_t tokens_at_once = kMaxLanes / acts.lanes_per_token;
  for (size_t panel = panel_begin; panel < panel_end; panel += kPanels) {
    const size_t panels = std::min(kPanels, panel_end - panel);
    for (size_t token = 0; token < tokens; token += tokens_at_once) {
      GemmPanels<kDot>(job, token, std::min(tokens_at_once, tokens - token), panel, panels, out,
                       out_stride);
    }
  }
}

void Gemm(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens, size_t panel_begin,
          size_t panel_end, float* out, size_t out_stride) {
  simd::HWY_NAMESPACE::WithDot(simd::ActiveDot(), [&]<simd::DotKind kDot>() HWY_ATTR {
    GemmAll<kDot>(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
  });
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Gemm);

void TernaryGemm(const PackedTensor& weight, const QuantizedActs& acts, size_t tokens,
                 size_t panel_begin, size_t panel_end, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Gemm)(weight, acts, tokens, panel_begin, panel_end, out, out_stride);
}

}  // namespace tf
#endif  // HWY_ONCE
