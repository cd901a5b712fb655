// SPDX-License-Identifier: Apache-2.0
// Bytes of T20 tiles to codes trit + 1, a vector at a time.
//
// With r_n = byte mod 3^n, digit n is (r_(n+1) - r_n) / 3^n. A remainder takes two steps of
// min(x, x - m): the unsigned difference is large where x < m.

#if defined(TERNARYFORGE_KERNELS_T20_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_T20_DECODE_INL_H_
#undef TERNARYFORGE_KERNELS_T20_DECODE_INL_H_
#else
#define TERNARYFORGE_KERNELS_T20_DECODE_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>

#include <hwy/highway.h>

#include "formats/t20.h"
#include "simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

#if HWY_TARGET != HWY_SCALAR

namespace hn = hwy::HWY_NAMESPACE;
namespace dot = simd::HWY_NAMESPACE;

// x mod 3^kPower for x < 3^(kPower + 1).
template <size_t kPower>
HWY_INLINE dot::DotCodes ModPower(dot::DotCodes x) {
  const auto power = hn::Set(dot::DotBytesTag(), static_cast<uint8_t>(kT20Powers[kPower]));
  x = hn::Min(x, hn::Sub(x, power));
  return hn::Min(x, hn::Sub(x, power));
}

// byte mod 3^(kPlane + 1)
template <size_t kPlane>
HWY_INLINE dot::DotCodes Remainder(dot::DotCodes bytes) {
  if constexpr (kPlane + 1 == kT20Planes) {
    return bytes;
  } else {
    return ModPower<kPlane + 1>(Remainder<kPlane + 1>(bytes));
  }
}

// Digit kPlane times 3^kPlane.
template <size_t kPlane>
HWY_INLINE dot::DotCodes ScaledDigit(dot::DotCodes bytes) {
  const auto remainder = Remainder<kPlane>(bytes);
  if constexpr (kPlane == 0) {
    return remainder;
  } else {
    return hn::Sub(remainder, ModPower<kPlane>(remainder));
  }
}

// Digit kPlane: 0, 1 or 2.
template <size_t kPlane>
HWY_INLINE dot::DotCodes Digit(dot::DotCodes bytes) {
  const dot::DotBytesTag d8;
  const auto scaled = ScaledDigit<kPlane>(bytes);
  if constexpr (kPlane == 0) {
    return scaled;
  } else if constexpr (kPlane % 2 == 0) {
    return hn::And(scaled, hn::Set(d8, 3));  // 9, 18, 81 and 162 are 1, 2, 1 and 2 modulo 4
  } else {
    // The low four bits of 3, 6, 27 and 54 are 3, 6, 11 and 6.
    alignas(16) static constexpr uint8_t kDigits[16] = {0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 1};
    return hn::TableLookupBytes(hn::LoadDup128(d8, kDigits), hn::And(scaled, hn::Set(d8, 15)));
  }
}

#if HWY_TARGET == HWY_AVX3

// Entry r < 81: digits 0 .. 3 of r in two bits each.
inline constexpr std::array<uint8_t, 128> kFieldTable = [] {
  std::array<uint8_t, 128> table{};
  for (size_t r = 0; r < 81; ++r) {
    for (size_t n = 0, rest = r; n < 4; ++n, rest /= 3)
      table[r] = static_cast<uint8_t>(table[r] | rest % 3 << (2 * n));
  }
  return table;
}();

struct FieldTable {
  HWY_INLINE FieldTable()
      : low(hn::LoadU(dot::DotBytesTag(), kFieldTable.data())),
        high(hn::LoadU(dot::DotBytesTag(), kFieldTable.data() + 64)) {}
  // r < 81
  HWY_INLINE dot::DotCodes Fields(dot::DotCodes r) const { return dot::Permute128(r, low, high); }

  dot::DotCodes low, high;
};

#endif

#endif  // HWY_TARGET != HWY_SCALAR

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_T20_DECODE_INL_H_
