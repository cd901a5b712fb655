// SPDX-License-Identifier: Apache-2.0
// Gated activations, sixteen values at a time.
#include "kernels/activation.h"

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/activation.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

HWY_INLINE Lanes SiluProduct(const Lanes& gate, const Lanes& up) {
  const Lanes negated = Sub(ZeroLanes(), gate);
  const Lanes silu = Div(gate, Add(Broadcast(1.0f), Exp(negated)));
  return Mul(silu, up);
}

HWY_INLINE Lanes ReluSquaredProduct(const Lanes& gate, const Lanes& up) {
  const Lanes relu = Relu(gate);
  return Mul(Mul(relu, relu), up);
}

HWY_INLINE Lanes GeluProduct(const Lanes& gate, const Lanes& up) {
  const Lanes square = Mul(gate, gate);
  const Lanes inner = Add(Broadcast(1.0f), Mul(Broadcast(0.044715f), square));
  const Lanes z = Mul(Mul(Broadcast(-1.5957691216f), gate), inner);  // -2 sqrt(2 / pi)
  return Mul(Div(gate, Add(Broadcast(1.0f), Exp(z))), up);
}

template <Lanes Product(const Lanes&, const Lanes&)>
HWY_INLINE void MapPairs(const float* gate, const float* up, size_t size, float* out) {
  const size_t whole = size - size % kLanes;
  const size_t rest = size - whole;
  for (size_t i = 0; i < whole; i += kLanes) {
    Store(Product(Load(gate + i), Load(up + i)), out + i);
  }
  if (rest == 0) return;
  StoreFirst(Product(LoadFirst(gate + whole, rest), LoadFirst(up + whole, rest)), out + whole,
             rest);
}

void SiluMultiply(const float* gate, const float* up, size_t size, float* out) {
  MapPairs<SiluProduct>(gate, up, size, out);
}

void ReluSquaredMultiply(const float* gate, const float* up, size_t size, float* out) {
  MapPairs<ReluSquaredProduct>(gate, up, size, out);
}

void GeluMultiply(const float* gate, const float* up, size_t size, float* out) {
  MapPairs<GeluProduct>(gate, up, size, out);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(SiluMultiply);
HWY_EXPORT(ReluSquaredMultiply);
HWY_EXPORT(GeluMultiply);

void SiluMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(SiluMultiply)(gate, up, size, out);
}

void ReluSquaredMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(ReluSquaredMultiply)(gate, up, size, out);
}

void GeluMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(GeluMultiply)(gate, up, size, out);
}

}  // namespace tf
#endif  // HWY_ONCE
