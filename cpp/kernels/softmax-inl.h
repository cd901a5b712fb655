// SPDX-License-Identifier: Apache-2.0
// The two passes that softmax, its normaliser and attention share.

#if defined(TERNARYFORGE_KERNELS_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_SOFTMAX_INL_H_
#undef TERNARYFORGE_KERNELS_SOFTMAX_INL_H_
#else
#define TERNARYFORGE_KERNELS_SOFTMAX_INL_H_
#endif

#include <limits>

#include "hwy/highway.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// The largest of size >= 1 values.
HWY_INLINE float MaxValue(const float* x, size_t size) {
  const size_t whole = size - size % kLanes;
  Lanes max = Broadcast(-std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < whole; i += kLanes) max = Max(max, Load(x + i));
  float result = MaxLane(max);
  for (size_t i = whole; i < size; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// x = cap * tanh(x / cap), with tanh(y) = 1 - 2 / (exp(2 y) + 1): off by at most 2e-7 * cap.
HWY_INLINE void CapSoftly(float* x, size_t size, float cap) {
  const Lanes factor = Broadcast(2.0f / cap);
  const auto capped = [&](const Lanes& value) HWY_ATTR {
    const Lanes above = Add(Exp(Mul(value, factor)), Broadcast(1.0f));
    return Mul(Broadcast(cap), Sub(Broadcast(1.0f), Div(Broadcast(2.0f), above)));
  };
  const size_t whole = size - size % kLanes;
  for (size_t i = 0; i < whole; i += kLanes) Store(capped(Load(x + i)), x + i);
  const size_t rest = size - whole;
  if (rest != 0) StoreFirst(capped(LoadFirst(x + whole, rest)), x + whole, rest);
}

// The sum of exp(x - max). With kStore, `exps` receives the terms; it may be `x`.
template <bool kStore>
HWY_INLINE float SumExp(const float* x, size_t size, float max, float* exps) {
  const size_t whole = size - size % kLanes;
  const size_t rest = size - whole;
  const Lanes shift = Broadcast(max);
  Lanes sum = ZeroLanes();
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes exp = Exp(Sub(Load(x + i), shift));
    if constexpr (kStore) Store(exp, exps + i);
    sum = Add(sum, exp);
  }
  if (rest != 0) {
    HWY_ALIGN float padded[kLanes];
    for (size_t l = 0; l < kLanes; ++l) {
      padded[l] = l < rest ? x[whole + l] : -std::numeric_limits<float>::infinity();
    }
    const Lanes exp = Exp(Sub(Load(padded), shift));
    if constexpr (kStore) StoreFirst(exp, exps + whole, rest);
    sum = Add(sum, exp);
  }
  return SumLanes(sum);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
