// SPDX-License-Identifier: Apache-2.0
// Descent: levels and scales that were rounded already move, together, to a smaller error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/parallel.h"
#include "formats/ternary.h"

namespace tf {

// Lowers, row by row, the error (w - q) H (w - q)^T of q = level * scale in place; the
// levels are those of `alphabet` (kTrit, kNineLevels). `target` w is
// [rows, cols], `moments` H [cols, cols] is symmetric and positive on its diagonal. Every round
// solves for all scales of a row at once (levels fixed; a negative scale turns its levels around)
// and stores them in 16 bits, then `sweeps` times visits every level and takes its best value given
// all others (scales fixed); scales that rounding would make worse are left. So the error never
// rises. The scales are solved for once more at the end. Under kTensor the one scale stays as it
// is.
//
// Throws std::invalid_argument for sizes that do not match.
void Descend(std::span<const double> target, size_t rows, size_t cols,
             std::span<const double> moments, Alphabet alphabet, ScaleKind kind, size_t group_size,
             size_t rounds, size_t sweeps, const Team& team, std::span<int8_t> levels,
             std::span<float> scales);

}  // namespace tf
