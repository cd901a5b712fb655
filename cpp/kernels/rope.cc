// SPDX-License-Identifier: Apache-2.0
// Rotation of the two halves of a head.
#include "kernels/rope.h"

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rope.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

void RotateHalves(float* head, const float* cos, const float* sin, size_t half) {
  float* second_half = head + half;
  const size_t whole = half - half % kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes a = Load(head + i);
    const Lanes b = Load(second_half + i);
    const Lanes c = Load(cos + i);
    const Lanes s = Load(sin + i);
    Store(NegMulAdd(b, s, Mul(a, c)), head + i);
    Store(MulAdd(a, s, Mul(b, c)), second_half + i);
  }
  const size_t rest = half - whole;
  if (rest == 0) return;
  const Lanes a = LoadFirst(head + whole, rest);
  const Lanes b = LoadFirst(second_half + whole, rest);
  const Lanes c = LoadFirst(cos + whole, rest);
  const Lanes s = LoadFirst(sin + whole, rest);
  StoreFirst(NegMulAdd(b, s, Mul(a, c)), head + whole, rest);
  StoreFirst(MulAdd(a, s, Mul(b, c)), second_half + whole, rest);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(RotateHalves);

void RotateHalves(float* head, const float* cos, const float* sin, size_t half) {
  HWY_DYNAMIC_DISPATCH(RotateHalves)(head, cos, sin, half);
}

}  // namespace tf
#endif  // HWY_ONCE
