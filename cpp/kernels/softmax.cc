// SPDX-License-Identifier: Apache-2.0
// Softmax in three passes: maximum, exponentials with their sum, division.
#include "kernels/softmax.h"

#include <cmath>

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/softmax.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/softmax-inl.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

void Softmax(float* x, size_t size) {
  const Lanes sum = Broadcast(SumExp<true>(x, size, MaxValue(x, size), x));
  const size_t whole = size - size % kLanes;
  const size_t rest = size - whole;
  for (size_t i = 0; i < whole; i += kLanes) Store(Div(Load(x + i), sum), x + i);
  if (rest != 0) StoreFirst(Div(LoadFirst(x + whole, rest), sum), x + whole, rest);
}

void MaxAndSumExp(const float* x, size_t size, float* max, float* sum) {
  *max = MaxValue(x, size);
  *sum = SumExp<false>(x, size, *max, nullptr);
}

void SoftCap(float* x, size_t size, float cap) { CapSoftly(x, size, cap); }

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(Softmax);
HWY_EXPORT(MaxAndSumExp);
HWY_EXPORT(SoftCap);

void Softmax(float* x, size_t size) { HWY_DYNAMIC_DISPATCH(Softmax)(x, size); }

void SoftCap(float* x, size_t size, float cap) { HWY_DYNAMIC_DISPATCH(SoftCap)(x, size, cap); }

float LogSumExp(const float* x, size_t size) {
  float max = 0.0f;
  float sum = 0.0f;
  HWY_DYNAMIC_DISPATCH(MaxAndSumExp)(x, size, &max, &sum);
  // In double, so that the sum is rounded to float once.
  return static_cast<float>(static_cast<double>(max) + std::log(static_cast<double>(sum)));
}

}  // namespace tf
#endif  // HWY_ONCE
