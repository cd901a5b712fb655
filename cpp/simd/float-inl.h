// SPDX-License-Identifier: Apache-2.0
// Sixteen float lanes on every target: the unit in which all float kernels load, multiply, add and
// sum.
//
// A reduction gives column c to lane c % 16 and adds the lanes in one fixed tree, so its result
// does not depend on the vector size. With fused multiply-add (AVX2, AVX3, NEON) results are
// bit-identical over targets; SSE4 and the fallback round products, and agree with one another.

// Highway includes this file once per target.
#if defined(TERNARYFORGE_SIMD_FLOAT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_SIMD_FLOAT_INL_H_
#undef TERNARYFORGE_SIMD_FLOAT_INL_H_
#else
#define TERNARYFORGE_SIMD_FLOAT_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

inline constexpr size_t kLanes = 16;
using PartTag = hn::CappedTag<float, kLanes>;
using Part = hn::Vec<PartTag>;
inline constexpr size_t kPartLanes = hn::MaxLanes(PartTag());  // AVX3 16, AVX2 8, SSE4 4, SCALAR 1
inline constexpr size_t kParts = kLanes / kPartLanes;

// Lane l lives in part l / kPartLanes.
struct Lanes {
  HWY_INLINE Lanes() {}  // a constructor of the compiler's own would not be compiled for the target
  Part part[kParts];
};

// Elements of 16-bit float arrays, told apart by type.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// ---- Loads of kPartLanes elements as floats; exact. Any alignment: a mapped file may put weights
// at odd bytes. ----

template <class D, typename T>
HWY_INLINE hn::Vec<D> LoadUnaligned(D d, const T* from) {
#if HWY_TARGET == HWY_SCALAR
  T element;  // LoadU of SCALAR reads *from, which must be aligned
  std::memcpy(&element, from, sizeof(T));
  return hn::Set(d, element);
#else
  return hn::LoadU(d, from);
#endif
}

HWY_INLINE Part LoadPart(const float* from) { return LoadUnaligned(PartTag(), from); }

HWY_INLINE Part LoadPart(const Bf16* from) {
  const PartTag d;
  const hn::Rebind<uint16_t, PartTag> d16;
  const hn::Rebind<uint32_t, PartTag> d32;
  const auto bits = LoadUnaligned(d16, reinterpret_cast<const uint16_t*>(from));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}

HWY_INLINE Part LoadPart(const F16* from) {
  const PartTag d;
  const hn::Rebind<uint16_t, PartTag> d16;
  const auto bits = LoadUnaligned(d16, reinterpret_cast<const uint16_t*>(from));
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == TF_HWY_NEON
  return hn::PromoteTo(d, hn::BitCast(hn::Rebind<hwy::float16_t, PartTag>(), bits));
#else
  // No instruction for it, and Highway 1.0.3 leaves out infinities. Sign, exponent and mantissa
  // move up to bits 31, 23 and 13 (the exponent's bias grows by 112); subnormals are multiples of
  // 2^-24.
  const hn::Rebind<uint32_t, PartTag> d32;
  const hn::Rebind<int32_t, PartTag> di;
  const auto half = hn::PromoteTo(d32, bits);
  const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(d32, 0x8000u)));
  const auto magnitude = hn::BitCast(di, hn::And(half, hn::Set(d32, 0x7FFFu)));
  const auto shifted = hn::ShiftLeft<13>(magnitude);
  const auto normal = hn::Add(shifted, hn::Set(di, 112 << 23));
  const auto special = hn::Or(shifted, hn::Set(di, 0x7F800000));
  const auto subnormal =
      hn::BitCast(di, hn::Mul(hn::ConvertTo(d, magnitude), hn::Set(d, 0x1p-24f)));
  const auto finite = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x0400)), subnormal, normal);
  const auto any = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7BFF)), special, finite);
  return hn::BitCast(d, hn::Or(hn::BitCast(d32, any), sign));
#endif
}

HWY_INLINE Part LoadPart(const int8_t* from) {
  const PartTag d;
  const hn::Rebind<int8_t, PartTag> d8;
  const hn::Rebind<int32_t, PartTag> di;
  return hn::ConvertTo(d, hn::PromoteTo(di, LoadUnaligned(d8, from)));
}

// The first `count` <= kPartLanes elements, then zeros. Reads nothing behind them.
template <typename T>
HWY_INLINE Part LoadPartFirst(const T* from, size_t count) {
  T padded[kPartLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return LoadPart(padded);
}

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
HWY_INLINE Part LoadPartFirst(const float* from, size_t count) {
  const PartTag d;
  return hn::MaskedLoad(hn::FirstN(d, count), d, from);  // masked-off lanes cannot fault
}
#endif

// ---- Loads and stores of 16 lanes ----

template <typename T>
HWY_INLINE Lanes Load(const T* from) {
  Lanes lanes;
  for (size_t p = 0; p < kParts; ++p) lanes.part[p] = LoadPart(from + p * kPartLanes);
  return lanes;
}

// The first `count` <= 16 elements, then zeros. Reads nothing behind them.
template <typename T>
HWY_INLINE Lanes LoadFirst(const T* from, size_t count) {
  Lanes lanes;
  for (size_t p = 0; p < kParts; ++p) {
    const size_t begin = p * kPartLanes;
    if (count >= begin + kPartLanes) {
      lanes.part[p] = LoadPart(from + begin);
    } else if (count > begin) {
      lanes.part[p] = LoadPartFirst(from + begin, count - begin);
    } else {
      lanes.part[p] = hn::Zero(PartTag());
    }
  }
  return lanes;
}

HWY_INLINE void Store(const Lanes& lanes, float* to) {
  for (size_t p = 0; p < kParts; ++p) hn::StoreU(lanes.part[p], PartTag(), to + p * kPartLanes);
}

// Writes the first `count` <= 16 lanes and nothing behind them.
HWY_INLINE void StoreFirst(const Lanes& lanes, float* to, size_t count) {
  if (count == kLanes) {
    Store(lanes, to);
    return;
  }
  HWY_ALIGN float all[kLanes];
  Store(lanes, all);
  std::memcpy(to, all, count * sizeof(float));
}

// ---- Arithmetic, lane by lane ----

HWY_INLINE Lanes Broadcast(float value) {
  Lanes lanes;
  for (size_t p = 0; p < kParts; ++p) lanes.part[p] = hn::Set(PartTag(), value);
  return lanes;
}

HWY_INLINE Lanes ZeroLanes() { return Broadcast(0.0f); }

HWY_INLINE Lanes Add(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Add(a.part[p], b.part[p]);
  return a;
}

HWY_INLINE Lanes Sub(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Sub(a.part[p], b.part[p]);
  return a;
}

HWY_INLINE Lanes Mul(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Mul(a.part[p], b.part[p]);
  return a;
}

HWY_INLINE Lanes Div(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Div(a.part[p], b.part[p]);
  return a;
}

// Which of the two it is where one is NaN depends on the target.
HWY_INLINE Lanes Max(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Max(a.part[p], b.part[p]);
  return a;
}

// max(a, 0), and NaN for NaN, which Max loses on some targets.
HWY_INLINE Lanes Relu(Lanes a) {
  const auto zero = hn::Zero(PartTag());
  for (size_t p = 0; p < kParts; ++p) {
    a.part[p] = hn::IfThenElse(hn::Lt(a.part[p], zero), zero, a.part[p]);
  }
  return a;
}

// a * b + c, rounded once where the target can.
HWY_INLINE Lanes MulAdd(const Lanes& a, const Lanes& b, Lanes c) {
  for (size_t p = 0; p < kParts; ++p) c.part[p] = hn::MulAdd(a.part[p], b.part[p], c.part[p]);
  return c;
}

// c - a * b, rounded once where the target can.
HWY_INLINE Lanes NegMulAdd(const Lanes& a, const Lanes& b, Lanes c) {
  for (size_t p = 0; p < kParts; ++p) c.part[p] = hn::NegMulAdd(a.part[p], b.part[p], c.part[p]);
  return c;
}

// ---- Reductions: lane l + lane l + 8, then l + 4, l + 2, l + 1 ----

#if HWY_TARGET == HWY_SCALAR

struct FourLanes {
  float lane[4];
};

// The first two levels of the tree: 16 lanes to 4.
HWY_INLINE FourLanes SumToFour(const Lanes& lanes) {
  float all[kLanes];
  Store(lanes, all);
  for (size_t l = 0; l < 8; ++l) all[l] += all[l + 8];
  FourLanes four;
  for (size_t l = 0; l < 4; ++l) four.lane[l] = all[l] + all[l + 4];
  return four;
}

HWY_INLINE float SumFour(const FourLanes& four) {
  return (four.lane[0] + four.lane[2]) + (four.lane[1] + four.lane[3]);
}

// The sums of four reductions, one after the other.
HWY_INLINE void StoreFourSums(const FourLanes& a, const FourLanes& b, const FourLanes& c,
                              const FourLanes& d, float* to) {
  to[0] = SumFour(a);
  to[1] = SumFour(b);
  to[2] = SumFour(c);
  to[3] = SumFour(d);
}

#else

using FourTag = hn::CappedTag<float, 4>;
using FourLanes = hn::Vec<FourTag>;

// The first two levels of the tree: 16 lanes to 4.
HWY_INLINE FourLanes SumToFour(const Lanes& lanes) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  const hn::CappedTag<float, 8> d8;
#if HWY_TARGET == HWY_AVX3
  const auto v = lanes.part[0];
  const auto eight = hn::Add(hn::LowerHalf(d8, v), hn::UpperHalf(d8, v));
#else
  const auto eight = hn::Add(lanes.part[0], lanes.part[1]);
#endif
  return hn::Add(hn::LowerHalf(FourTag(), eight), hn::UpperHalf(FourTag(), eight));
#else
  static_assert(kParts == 4);
  return hn::Add(hn::Add(lanes.part[0], lanes.part[2]), hn::Add(lanes.part[1], lanes.part[3]));
#endif
}

HWY_INLINE float SumFour(FourLanes four) {
  const auto two = hn::Add(four, hn::Shuffle1032(four));
  return hn::GetLane(hn::Add(two, hn::Shuffle2301(two)));
}

// The sums of four reductions, one after the other: the same tree as SumFour, in fewer steps.
HWY_INLINE void StoreFourSums(FourLanes a, FourLanes b, FourLanes c, FourLanes d, float* to) {
  const FourTag tag;
  // a0 + a2, b0 + b2, a1 + a3, b1 + b3
  const auto ab = hn::Add(hn::InterleaveLower(tag, a, b), hn::InterleaveUpper(tag, a, b));
  const auto cd = hn::Add(hn::InterleaveLower(tag, c, d), hn::InterleaveUpper(tag, c, d));
  const auto even = hn::ConcatLowerLower(tag, cd, ab);
  const auto odd = hn::ConcatUpperUpper(tag, cd, ab);
  hn::StoreU(hn::Add(even, odd), tag, to);
}

#endif

HWY_INLINE float SumLanes(const Lanes& lanes) { return SumFour(SumToFour(lanes)); }

HWY_INLINE float MaxLane(const Lanes& lanes) {
  HWY_ALIGN float all[kLanes];
  Store(lanes, all);
  float max = all[0];
  for (size_t l = 1; l < kLanes; ++l) max = all[l] > max ? all[l] : max;
  return max;
}

// ---- Exponential ----

// e^x with a relative error below 2e-7; subnormal results are off by less than one unit of 2^-149.
// Infinity above 88.73, zero below -103.98, NaN for NaN.
HWY_INLINE Part ExpPart(Part x) {
  const PartTag d;
  const hn::Rebind<int32_t, PartTag> di;
  // Beyond these the result is infinity or zero anyway, and n below stays small. Comparisons keep
  // NaN.
  const auto low = hn::Set(d, -150.0f);
  const auto high = hn::Set(d, 128.0f);
  x = hn::IfThenElse(hn::Lt(x, low), low, x);
  x = hn::IfThenElse(hn::Gt(x, high), high, x);

  // n = round(x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits of the mantissa.
  const auto magic = hn::Set(d, 0x1.8p23f);
  const auto shifted = hn::MulAdd(x, hn::Set(d, 0x1.715476p+0f), magic);
  const auto n = hn::Sub(shifted, magic);
  const auto n_bits = hn::Sub(hn::BitCast(di, shifted), hn::Set(di, 0x4B400000));

  // r = x - n ln 2 in two steps: 355 / 512 has 9 bits, so that its product with n is exact.
  auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);

  // e^r on |r| <= ln(2) / 2: the minimax polynomial of Cephes expf (Moshier).
  auto p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));

  // Times 2^n in two halves: |n| reaches 217, one float's exponent only 127.
  const auto half = hn::ShiftRight<1>(n_bits);
  const auto bias = hn::Set(di, 127);
  const auto first = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(half, bias)));
  const auto second = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::Sub(n_bits, half), bias)));
  return hn::Mul(hn::Mul(p, first), second);
}

HWY_INLINE Lanes Exp(Lanes x) {
  for (size_t p = 0; p < kParts; ++p) x.part[p] = ExpPart(x.part[p]);
  return x;
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
