// SPDX-License-Identifier: Apache-2.0
// Detection of weights that are ternary as they stand, so that they are never rounded again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/parallel.h"
#include "formats/ternary.h"

namespace tf {

// The scales of weights that are ternary as they stand; trit = sign of the weight.
struct TernaryScales {
  ScaleKind kind;             // the coarsest that holds
  std::vector<float> values;  // [ScaleCount(kind, group_size, rows, cols)]; max |w| bit by bit,
                              // whether binary16 holds it or not
};

// Whether the values are a subset of {-s, 0, +s} with one s per tensor, else per row, else per
// group of `group_size` columns. All-zero rows or groups take scale 0, an all-zero tensor 1. Per
// row or group it must be more than a play of numbers: some s is shared by two weights that are not
// zero. NaN or infinity is not ternary. Throws std::invalid_argument for sizes that do not match.
std::optional<TernaryScales> FindTernary(std::span<const float> weights, size_t rows, size_t cols,
                                         size_t group_size, const Team& team);

// trits = sign of every weight.
void TakeSigns(std::span<const float> weights, const Team& team, std::span<int8_t> trits);

}  // namespace tf
