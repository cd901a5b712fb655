// SPDX-License-Identifier: Apache-2.0
// Scales to binary16 in one rounding, and the search for one that survives two reciprocals.
#include "quant/stored_scale.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "base/float16.h"

namespace tf {
namespace {

constexpr uint16_t kLargestF16Bits = 0x7BFF;
constexpr float kSmallestF16 = 0x1p-24f;

bool SurvivesReciprocal(float scale) { return 1.0f / (1.0f / scale) == scale; }

}  // namespace

float FloorToFloat(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) <= value) return nearest;
  return std::nextafter(nearest, -std::numeric_limits<float>::infinity());
}

float StoredScale(double exact) {
  // Rounding to float first must not create a tie: truncate and keep what was lost as an odd bit.
  uint32_t bits = std::bit_cast<uint32_t>(FloorToFloat(exact));
  if (static_cast<double>(std::bit_cast<float>(bits)) != exact) bits |= 1;
  const float rounded = FloatFromF16(F16FromFloat(std::bit_cast<float>(bits)));
  if (std::isinf(rounded)) return static_cast<float>(exact);
  return std::max(rounded, kSmallestF16);
}

float StoredTensorScale(double exact) {
  const float nearest = StoredScale(exact);
  if (nearest > kLargestF16) return nearest;
  // Powers of two survive, so there is one below every value.
  uint16_t down = F16FromFloat(nearest);
  uint16_t up = down;
  while (!SurvivesReciprocal(FloatFromF16(down))) --down;
  while (up <= kLargestF16Bits && !SurvivesReciprocal(FloatFromF16(up))) ++up;
  const float below = FloatFromF16(down);
  if (up > kLargestF16Bits) return below;
  const float above = FloatFromF16(up);
  const double to_above = std::abs(static_cast<double>(above) - exact);
  return to_above < std::abs(exact - static_cast<double>(below)) ? above : below;
}

}  // namespace tf
