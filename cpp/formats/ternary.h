// SPDX-License-Identifier: Apache-2.0
// The vocabulary of low-bit weights: which values a code can stand for, how scales apply.
#pragma once

#include <cstdint>

namespace tf {

// The set of values that a code stands for, before scaling.
enum class Alphabet : uint8_t {
  kTrit,        // -1, 0, +1
  kNineLevels,  // -4 .. 4: two tied trits, 3 * first + second
  kInt8,        // -127 .. 127
  kFloat,       // any float
};

// The largest value of trits (1) and of two tied trits (4).
constexpr int MaxLevel(Alphabet alphabet) { return alphabet == Alphabet::kNineLevels ? 4 : 1; }

// How many weights share one scale. `kNone` belongs to floats.
enum class ScaleKind : uint8_t {
  kNone,
  kTensor,
  kRow,    // one per output row
  kGroup,  // one per `group_size` neighbouring columns of a row; the last group of a row may be
           // shorter
};

// What a checkpoint means by the number that it stores: weight = code * stored, or weight = code /
// stored.
enum class ScaleConvention : uint8_t { kMultiply, kDivide };

// Group sizes are multiples of this many columns, so that integer sums of activations can be kept
// per chunk.
inline constexpr uint32_t kChunkCols = 64;

}  // namespace tf
