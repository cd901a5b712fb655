// SPDX-License-Identifier: Apache-2.0
// The one step that multiplies bytes: acc[i] += sum of four products u8 * i8, for every 32-bit lane
// i.
//
// This file alone knows the byte dot instructions. Highway 1.0.3 has no op for them, so x86 takes
// inline assembly (vpdpbusd, vpermi2b) or pmaddubsw, 64-bit ARM inline assembly (usdot, sdot) or
// smull, and every other target a portable branch.

#if defined(TERNARYFORGE_SIMD_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_SIMD_DOT_INL_H_
#undef TERNARYFORGE_SIMD_DOT_INL_H_
#else
#define TERNARYFORGE_SIMD_DOT_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <hwy/highway.h>

#include "simd/targets.h"

// The assembler must be told, and goes on so: hence all that NEON code uses, crypto included.
#ifndef TF_ARM_DOT
#define TF_ARM_DOT ".arch armv8.2-a+crypto+dotprod+i8mm\n\t"
#endif

HWY_BEFORE_NAMESPACE();
namespace tf::simd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET != HWY_SCALAR

// At most 64 bytes: a tile of the run-time layouts is whole vectors.
using DotBytesTag = hn::CappedTag<uint8_t, 64>;
using DotSumsTag = hn::Repartition<int32_t, DotBytesTag>;
using DotCodes = hn::Vec<DotBytesTag>;
using DotSums = hn::Vec<DotSumsTag>;
inline constexpr size_t kDotBytes = hn::MaxLanes(DotBytesTag());

using DotActs = hn::Vec<hn::RebindToSigned<DotBytesTag>>;
using DotPairsTag = hn::Repartition<int16_t, DotBytesTag>;
using DotPairs = hn::Vec<DotPairsTag>;

// Four neighbouring activations in every 32-bit lane.
HWY_INLINE DotActs BroadcastActs(const int8_t* acts) {
  int32_t four;
  std::memcpy(&four, acts, sizeof(four));
  return hn::BitCast(hn::RebindToSigned<DotBytesTag>(), hn::Set(DotSumsTag(), four));
}

// Products summed in pairs. Exact for codes up to 127 with any int8 activation: a pair is a value
// of int16 (2 * 127 * 127 = 32258, 2 * 127 * -128 = -32512).
HWY_INLINE DotPairs PairProducts(DotCodes codes, DotActs acts) {
#if HWY_TARGET == HWY_AVX3
  return DotPairs{_mm512_maddubs_epi16(codes.raw, acts.raw)};
#elif HWY_TARGET == HWY_AVX2
  return DotPairs{_mm256_maddubs_epi16(codes.raw, acts.raw)};
#elif HWY_TARGET == HWY_SSE4
  return DotPairs{_mm_maddubs_epi16(codes.raw, acts.raw)};
#elif HWY_TARGET == TF_HWY_NEON && HWY_ARCH_ARM_A64
  const int8x16_t signed_codes = vreinterpretq_s8_u8(codes.raw);
  return DotPairs{vpaddq_s16(vmull_s8(vget_low_s8(signed_codes), vget_low_s8(acts.raw)),
                             vmull_high_s8(signed_codes, acts.raw))};
#else
  const DotPairsTag d16;
  const hn::RebindToUnsigned<DotPairsTag> du16;
  const auto codes16 = hn::BitCast(d16, codes);
  const auto acts16 = hn::BitCast(d16, acts);
  const auto even =
      hn::Mul(hn::And(codes16, hn::Set(d16, 0xFF)), hn::ShiftRight<8>(hn::ShiftLeft<8>(acts16)));
  const auto odd = hn::Mul(hn::BitCast(d16, hn::ShiftRight<8>(hn::BitCast(du16, codes16))),
                           hn::ShiftRight<8>(acts16));
  return hn::Add(even, odd);
#endif
}

// pairs + PairProducts(codes, acts), modulo 2^16.
HWY_INLINE DotPairs AddPairProducts(DotPairs pairs, DotCodes codes, DotActs acts) {
  // Assembly, because g++ 12 copies sums from register to register, and some through memory, where
  // they fill the registers.
#if HWY_TARGET == HWY_AVX3
  DotPairs products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+v"(pairs.raw), "=&v"(products.raw)
      : "v"(codes.raw), "v"(acts.raw));
  return pairs;
#elif HWY_TARGET == HWY_AVX2
  DotPairs products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(pairs.raw), "=&x"(products.raw)
      : "x"(codes.raw), "x"(acts.raw));
  return pairs;
#elif HWY_TARGET == HWY_SSE4
  DotPairs products;
  asm("movdqa %2, %1\n\tpmaddubsw %3, %1\n\tpaddw %1, %0"
      : "+x"(pairs.raw), "=&x"(products.raw)
      : "x"(codes.raw), "x"(acts.raw));
  return pairs;
#else
  return hn::Add(pairs, PairProducts(codes, acts));
#endif
}

// sums[i] + pairs[2 i] + pairs[2 i + 1].
HWY_INLINE DotSums FoldPairs(DotSums sums, DotPairs pairs) {
#if HWY_TARGET == HWY_AVX3
  return DotSums{_mm512_add_epi32(sums.raw, _mm512_madd_epi16(pairs.raw, _mm512_set1_epi16(1)))};
#elif HWY_TARGET == HWY_AVX2
  return DotSums{_mm256_add_epi32(sums.raw, _mm256_madd_epi16(pairs.raw, _mm256_set1_epi16(1)))};
#elif HWY_TARGET == HWY_SSE4
  return DotSums{_mm_add_epi32(sums.raw, _mm_madd_epi16(pairs.raw, _mm_set1_epi16(1)))};
#elif HWY_TARGET == TF_HWY_NEON && HWY_ARCH_ARM_A64
  return DotSums{vpadalq_s16(sums.raw, pairs.raw)};
#else
  const auto words = hn::BitCast(DotSumsTag(), pairs);
  return hn::Add(sums,
                 hn::Add(hn::ShiftRight<16>(hn::ShiftLeft<16>(words)), hn::ShiftRight<16>(words)));
#endif
}

// sums[i] + four products. kPortable and kSigned are exact for codes up to 127, kNative always.
template <DotKind kDot>
HWY_INLINE DotSums DotStep(DotSums sums, DotCodes codes, DotActs acts) {
  // 16-bit products, 32-bit sums, no saturation. The functions around are compiled without these
  // instructions, hence assembly; UseTarget sends only CPUs that have them here.
#if HWY_TARGET == HWY_AVX3
  if constexpr (kDot == DotKind::kNative) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.raw) : "v"(codes.raw), "v"(acts.raw));
    return sums;
  }
#elif HWY_TARGET == HWY_AVX2
  if constexpr (kDot == DotKind::kNative) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.raw) : "x"(codes.raw), "x"(acts.raw));
    return sums;
  }
#elif HWY_TARGET == TF_HWY_NEON && HWY_ARCH_ARM_A64
  if constexpr (kDot == DotKind::kNative) {
    asm(TF_ARM_DOT "usdot %0.4s, %1.16b, %2.16b" : "+w"(sums.raw) : "w"(codes.raw), "w"(acts.raw));
    return sums;
  } else if constexpr (kDot == DotKind::kSigned) {
    asm(TF_ARM_DOT "sdot %0.4s, %1.16b, %2.16b" : "+w"(sums.raw) : "w"(codes.raw), "w"(acts.raw));
    return sums;
  }
#endif
  return FoldPairs(sums, PairProducts(codes, acts));
}

#if HWY_TARGET == HWY_AVX3
// table[indices[i]] of 128 bytes, for indices below 128: vpermi2b, which asks for VBMI as vpdpbusd
// does for VNNI. Only where HasBytePermute().
HWY_INLINE DotCodes Permute128(DotCodes indices, DotCodes table_low, DotCodes table_high) {
  asm("vpermi2b %2, %1, %0" : "+v"(indices.raw) : "v"(table_low.raw), "v"(table_high.raw));
  return indices;
}
#endif

// One step on arrays of kDotBytes bytes.
template <DotKind kDot>
HWY_INLINE void DotOnce(const uint8_t* codes, const int8_t* acts, int32_t* sums) {
  const DotSumsTag d32;
  const hn::RebindToSigned<DotBytesTag> d8;
  hn::StoreU(
      DotStep<kDot>(hn::LoadU(d32, sums), hn::LoadU(DotBytesTag(), codes), hn::LoadU(d8, acts)),
      d32, sums);
}

// Calls run.template operator()<kDot>() for `dot`, if this target has it, else for kPortable.
template <typename Run>
HWY_INLINE void WithDot(DotKind dot, const Run& run) {
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  if (dot == DotKind::kNative) return run.template operator()<DotKind::kNative>();
#elif HWY_TARGET == TF_HWY_NEON && HWY_ARCH_ARM_A64
  if (dot == DotKind::kNative) return run.template operator()<DotKind::kNative>();
  if (dot == DotKind::kSigned) return run.template operator()<DotKind::kSigned>();
#endif
  (void)dot;
  run.template operator()<DotKind::kPortable>();
}

#else  // HWY_SCALAR: one lane, so kernels are plain loops and only the probe of targets.cc comes
       // here

inline constexpr size_t kDotBytes = 4;

template <DotKind kDot>
HWY_INLINE void DotOnce(const uint8_t* codes, const int8_t* acts, int32_t* sums) {
  for (size_t i = 0; i < kDotBytes; ++i) sums[0] += codes[i] * acts[i];
}

template <typename Run>
HWY_INLINE void WithDot(DotKind /*dot*/, const Run& run) {
  run.template operator()<DotKind::kPortable>();
}

#endif

}  // namespace tf::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_SIMD_DOT_INL_H_
