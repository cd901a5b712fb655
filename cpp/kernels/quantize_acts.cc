// SPDX-License-Identifier: Apache-2.0
// Per-token int8 quantization; see quantize_acts.h.
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
  auto largest = hn::Zero(d);
  size_t i = 0;
  for (; i + lanes <= size; i += lanes) largest = hn::Max(largest, hn::Abs(hn::LoadU(d, x + i)));
  alignas(64) float parts[16];
  hn::StoreU(largest, d, parts);
  float result = 0.0f;
  for (size_t lane = 0; lane < lanes; ++lane) result = std::max(result, parts[lane]);
  for (; i < size; ++i) result = std::max(result, std::abs(x[i]));
  return result;
}

void QuantizeToken(const float* HWY_RESTRICT x, size_t size, int8_t* HWY_RESTRICT codes,
                   float* HWY_RESTRICT scale, int32_t* HWY_RESTRICT chunk_sums) {
  // Two roundings, as PyTorch's 127 / tensor: the models were trained with these very scales.
  const float factor = 127.0f * (1.0f / std::max(AbsMax(x, size), 1e-5f));
  *scale = factor;
  size_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::CappedTag<float, 16> d;
  const hn::Rebind<int8_t, decltype(d)> d8;
  const auto factors = hn::Set(d, factor);
  const size_t lanes = hn::Lanes(d);
  // |x * factor| stays below 127.5, so the saturation of DemoteTo never acts on finite input.
  for (; i + lanes <= size; i += lanes) {
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), factors))), d8,
               codes + i);
  }
#endif
  for (; i < size; ++i) {
    codes[i] = static_cast<int8_t>(std::clamp(std::nearbyint(x[i] * factor), -128.0f, 127.0f));
  }
  std::memset(codes + size, 0, PaddedCols(size) - size);
  for (size_t chunk = 0; chunk < ChunkCount(size); ++chunk) {
    int32_t sum = 0;
    for (size_t j = 0; j < kChunkCols; ++j) sum += codes[chunk * kChunkCols + j];
    chunk_sums[chunk] = sum;
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(QuantizeToken);

void QuantizeActs(const float* x, size_t size, int8_t* codes, float* scale, int32_t* chunk_sums) {
  HWY_DYNAMIC_DISPATCH(QuantizeToken)(x, size, codes, scale, chunk_sums);
}

}  // namespace tf
#endif  // HWY_ONCE
