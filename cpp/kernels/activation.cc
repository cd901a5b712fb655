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

HWY_INLINE Lanes ReluProduct(const Lanes& gate, const Lanes& up) { return Mul(Relu(gate), up); }

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

// gelu(x) = max(x, 0) - |x| erfc(z) / 2 with z = |x| / sqrt(2), and for z >= 0
// erfc(z) = t exp(-z^2) q(t), t = 1 / (1 + 0.4 z): q is the polynomial of degree 8 that fits best
// on 0 <= z <= 12, to 8e-8 of the result.
HWY_INLINE Lanes GeluErfProduct(const Lanes& gate, const Lanes& up) {
  constexpr size_t kDegree = 8;
  constexpr float kCoefficients[kDegree + 1] = {0.225653651f, 0.226106425f,  0.204322576f,
                                                0.183777019f, 0.102502991f,  0.0548578026f,
                                                0.113034587f, -0.154409876f, 0.0441549015f};
  const Lanes magnitude = Max(gate, Sub(ZeroLanes(), gate));
  const Lanes z = Mul(magnitude, Broadcast(0.70710678f));
  const Lanes one = Broadcast(1.0f);
  const Lanes t = Div(one, MulAdd(Broadcast(0.4f), z, one));
  Lanes q = Broadcast(kCoefficients[kDegree]);
  for (size_t i = kDegree; i-- > 0;) q = MulAdd(q, t, Broadcast(kCoefficients[i]));
  const Lanes erfc = Mul(Mul(t, Exp(Sub(ZeroLanes(), Mul(z, z)))), q);
  return Mul(NegMulAdd(Mul(Broadcast(0.5f), magnitude), erfc, Relu(gate)), up);
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

void ReluMultiply(const float* gate, const float* up, size_t size, float* out) {
  MapPairs<ReluProduct>(gate, up, size, out);
}

void GeluErfMultiply(const float* gate, const float* up, size_t size, float* out) {
  MapPairs<GeluErfProduct>(gate, up, size, out);
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(SiluMultiply);
HWY_EXPORT(ReluSquaredMultiply);
HWY_EXPORT(GeluMultiply);
HWY_EXPORT(ReluMultiply);
HWY_EXPORT(GeluErfMultiply);

void SiluMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(SiluMultiply)(gate, up, size, out);
}

void ReluSquaredMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(ReluSquaredMultiply)(gate, up, size, out);
}

void GeluMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(GeluMultiply)(gate, up, size, out);
}

void ReluMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(ReluMultiply)(gate, up, size, out);
}

void GeluErfMultiply(const float* gate, const float* up, size_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(GeluErfMultiply)(gate, up, size, out);
}

}  // namespace tf
#endif  // HWY_ONCE
