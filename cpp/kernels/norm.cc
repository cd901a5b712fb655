// SPDX-License-Identifier: Apache-2.0
// Norms: one pass for each sum, one for the products.
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

void LayerNorm(const float* x, const float* weight, const float* bias, size_t size, float epsilon,
               float* out) {
  const size_t whole = size - size % kLanes;
  const size_t rest = size - whole;
  const float count = static_cast<float>(size);
  Lanes sum = ZeroLanes();
  for (size_t i = 0; i < whole; i += kLanes) sum = Add(sum, Load(x + i));
  if (rest != 0) sum = Add(sum, LoadFirst(x + whole, rest));
  const Lanes mean = Broadcast(SumLanes(sum) / count);

  Lanes squares = ZeroLanes();
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes centred = Sub(Load(x + i), mean);
    squares = MulAdd(centred, centred, squares);
  }
  if (rest != 0) {
    float centred[kLanes] = {};
    StoreFirst(Sub(LoadFirst(x + whole, rest), mean), centred, rest);  // zeros behind the row
    squares = MulAdd(Load(centred), Load(centred), squares);
  }
  const Lanes factor = Broadcast(1.0f / std::sqrt(SumLanes(squares) / count + epsilon));
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes scaled = Mul(Sub(Load(x + i), mean), factor);
    Store(MulAdd(scaled, Load(weight + i), Load(bias + i)), out + i);
  }
  if (rest != 0) {
    const Lanes scaled = Mul(Sub(LoadFirst(x + whole, rest), mean), factor);
    StoreFirst(MulAdd(scaled, LoadFirst(weight + whole, rest), LoadFirst(bias + whole, rest)),
               out + whole, rest);
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(RmsNorm);
HWY_EXPORT(LayerNorm);

void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNorm)(x, weight, size, epsilon, out);
}

void LayerNorm(const float* x, const float* weight, const float* bias, size_t size, float epsilon,
               float* out) {
  HWY_DYNAMIC_DISPATCH(LayerNorm)(x, weight, bias, size, epsilon, out);
}

}  // namespace tf
#endif  // HWY_ONCE
