// SPDX-License-Identifier: Apache-2.0
// Rounding of scales to the values that checkpoints and exports hold without loss.
#pragma once

namespace tf {

inline constexpr float kLargestF16 = 65504.0f;

// The largest float that is not above `value` (within the range of float): for every float a,
// a > value, compared as doubles, exactly when a > FloorToFloat(value).
float FloorToFloat(double value);

// The binary16 value nearest to `exact` > 0, ties to even, but never 0. What rounds to more than
// kLargestF16 is returned as a float, unrounded: the caller refuses it.
float StoredScale(double exact);

// The nearest binary16 value whose reciprocal, rounded to float, has it as reciprocal again; the
// smaller of two. Stock checkpoints store 1 / s and their readers divide. Too large: as above.
float StoredTensorScale(double exact);

}  // namespace tf
