// SPDX-License-Identifier: Apache-2.0
// Per-token quantization; see quantize_acts.h.
#include "kernels/quantize_acts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantize_acts.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The largest magnitude; any order gives the same.
float AbsMax(const float* HWY_RESTRICT x, size_t size) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  constexpr size_t kVectors = 4;  // they do not wait for each other
  hn::Vec<decltype(d)> largest[kVectors];
  for (auto& vector : largest) vector = hn::Zero(d);
  size_t i = 0;
  for (; i + kVectors * lanes <= size; i += kVectors * lanes) {
    for (size_t v = 0; v < kVectors; ++v)
      largest[v] = hn::Max(largest[v], hn::Abs(hn::LoadU(d, x + i + v * lanes)));
  }
  alignas(64) float parts[16];
  hn::StoreU(hn::Max(hn::Max(largest[0], largest[1]), hn::Max(largest[2], largest[3])), d, parts);
  float result = 0.0f;
  for (size_t lane = 0; lane < lanes; ++lane) result = std::max(result, parts[lane]);
  for (; i < size; ++i) result = std::max(result, std::abs(x[i]));
  return result;
}

// Codes of one chunk: code = 256 * high + low under kInt16, else low alone. Returns their sum.
template <ActivationMode kMode>
HWY_INLINE int32_t QuantizeChunk(const float* HWY_RESTRICT x, float factor,
                                 int8_t* HWY_RESTRICT high, int8_t* HWY_RESTRICT low) {
#if HWY_TARGET == HWY_SCALAR
  constexpr float kMax = kMode == ActivationMode::kInt16 ? kInt16MaxCode : kInt8MaxCode;
  int32_t sum = 0;
  for (size_t i = 0; i < kChunkCols; ++i) {
    const float rounded = std::nearbyint(x[i] * factor);
    const auto code = static_cast<int32_t>(std::min(std::max(-kMax, rounded), kMax));
    sum += code;
    low[i] = static_cast<int8_t>(code);
    if constexpr (kMode == ActivationMode::kInt16) {
      high[i] = static_cast<int8_t>((code - low[i]) / 256);
    }
  }
  return sum;
#else
  const hn::CappedTag<float, 16> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const hn::RebindToSigned<decltype(d)> d32;
  auto sums = hn::Zero(d32);
  const auto factors = hn::Set(d, factor);
  // |x * factor| stays below max_code + 0.5, so the saturation of DemoteTo never acts on finite
  // input.
  for (size_t i = 0; i < kChunkCols; i += hn::Lanes(d)) {
    const auto codes = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), factors));
    if constexpr (kMode == ActivationMode::kInt16) {
      const auto lows = hn::ShiftRight<24>(hn::ShiftLeft<24>(codes));
      const auto highs = hn::DemoteTo(d8, hn::ShiftRight<8>(hn::Sub(codes, lows)));
      hn::StoreU(hn::DemoteTo(d8, lows), d8, low + i);
      hn::StoreU(highs, d8, high + i);
      sums = hn::Add(sums, hn::Add(hn::ShiftLeft<8>(hn::PromoteTo(d32, highs)), lows));
    } else {
      const auto stored = hn::DemoteTo(d8, codes);
      hn::StoreU(stored, d8, low + i);
      sums = hn::Add(sums, hn::PromoteTo(d32, stored));
    }
  }
  return hn::GetLane(hn::SumOfLanes(d32, sums));
#endif
}

void Scatter(const int8_t* HWY_RESTRICT from, size_t block, int8_t* HWY_RESTRICT to) {
  for (size_t col = 0; col < kChunkCols; col += 4) std::memcpy(to + col * block, from + col, 4);
}

template <ActivationMode kMode>
void QuantizeToken(const float* HWY_RESTRICT x, size_t size, size_t block,
                   int8_t* HWY_RESTRICT codes, float* HWY_RESTRICT scale,
                   uint32_t* HWY_RESTRICT prefix_sums) {
  constexpr int kMax = kMode == ActivationMode::kInt16 ? kInt16MaxCode : kInt8MaxCode;
  // Two roundings, as PyTorch's 127 / tensor: the models were trained with these very scales.
  const float factor = static_cast<float>(kMax) * (1.0f / std::max(AbsMax(x, size), 1e-5f));
  *scale = factor;
  uint32_t sum = 0;
  prefix_sums[0] = 0;
  for (size_t begin = 0; begin < PaddedCols(size); begin += kChunkCols) {
    alignas(64) int8_t high[kChunkCols], low[kChunkCols];
    if (begin + kChunkCols <= size) {
      sum += static_cast<uint32_t>(QuantizeChunk<kMode>(x + begin, factor, high, low));
    } else {
      alignas(64) float last[kChunkCols] = {};
      if (begin < size) std::memcpy(last, x + begin, (size - begin) * sizeof(float));
      sum += static_cast<uint32_t>(QuantizeChunk<kMode>(last, factor, high, low));
    }
    if (begin < size) prefix_sums[begin / kChunkCols + 1] = sum;
    int8_t* to = codes + begin * block;
    if constexpr (kMode == ActivationMode::kInt16) {
      Scatter(high, block, to);
      Scatter(low, block, to + 4);
    } else if (block == 1) {
      std::memcpy(to, low, kChunkCols);
    } else {
      Scatter(low, block, to);
    }
  }
}

void Quantize(ActivationMode mode, const float* x, size_t size, size_t block, int8_t* codes,
              float* scale, uint32_t* prefix_sums) {
  if (mode == ActivationMode::kInt16) {
    QuantizeToken<ActivationMode::kInt16>(x, size, block, codes, scale, prefix_sums);
  } else {
    QuantizeToken<ActivationMode::kInt8>(x, size, block, codes, scale, prefix_sums);
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Quantize);

void QuantizeActs(ActivationMode mode, const float* x, size_t size, size_t block, int8_t* codes,
                  float* scale, uint32_t* prefix_sums) {
  HWY_DYNAMIC_DISPATCH(Quantize)(mode, x, size, block, codes, scale, prefix_sums);
}

}  // namespace tf
#endif  // HWY_ONCE
