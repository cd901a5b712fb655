// SPDX-License-Identifier: Apache-2.0
// The triangular factor R of second moments H = R R^T, and what is solved with it.
#pragma once

#include <cstddef>
#include <span>

#include "base/parallel.h"

namespace tf {

// Throws std::invalid_argument unless the upper triangle of `factor` [cols, cols] is finite with a
// positive diagonal.
void CheckMomentFactor(std::span<const double> factor, size_t cols);

// target [rows, cols] += lacking [rows, cols] H^-1: the weights of least error where the output
// lacks E[(wanted - W x) x^T] = `lacking`. Throws std::invalid_argument for sizes that do not
// match, and as above. The bits are the same on every target, with any number of threads.
void AddCorrection(std::span<double> target, size_t rows, size_t cols,
                   std::span<const double> lacking, std::span<const double> factor,
                   const Team& team);

}  // namespace tf
