// SPDX-License-Identifier: Apache-2.0
// What all passes over float weights share: magnitudes as integers, and a fitting number of
// threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/parallel.h"

namespace tf {

inline constexpr uint32_t kInfinityBits = 0x7F800000;

// |w| as an integer. They order as the magnitudes do, with infinity and then NaN on top.
inline uint32_t MagnitudeBits(float value) { return std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu; }

// Bits of the largest |w|, 0 where there is none.
inline uint32_t MaxMagnitudeBits(std::span<const float> weights) {
  uint32_t max = 0;
  for (const float w : weights) max = std::max(max, MagnitudeBits(w));
  return max;
}

// A smaller team where there is too little to read to be worth waking up so many threads.
inline Team TeamFor(size_t weights, const Team& team) {
  constexpr size_t kWeightsPerThread = size_t{1} << 16;
  return Team(std::clamp<size_t>(weights / kWeightsPerThread, 1, team.threads()));
}

}  // namespace tf
