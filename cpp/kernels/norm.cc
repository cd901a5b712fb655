// SPDX-License-Identifier: Apache-2.0
// RMSNorm: one pass for the sum of squares, one for the products.
#include "kernels/norm.h"

#include <cmath>

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, float* out) {
  const size_t whole = size - size % kLanes;
  const size_t rest = size - whole;
  Lanes squares = ZeroLanes();
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes value = Load(x + i);
    squares = MulAdd(value, value, squares);
  }
  if (rest != 0) {
    const Lanes value = LoadFirst(x + whole, rest);
    squares = MulAdd(value, value, squares);
  }
  const float mean = SumLanes(squares) / static_cast<float>(size);
  const Lanes factor = Broadcast(1.0f / std::sqrt(mean + epsilon));
  for (size_t i = 0; i < whole; i += kLanes) {
    Store(Mul(Mul(Load(x + i), factor), Load(weight + i)), out + i);
  }
  if (rest != 0) {
    const Lanes product = Mul(LoadFirst(x + whole, rest), factor);
    StoreFirst(Mul(product, LoadFirst(weight + whole, rest)), out + whole, rest);
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(RmsNorm);

void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, size, epsilon, out);
}

}  // namespace tf
#endif  // HWY_ONCE
