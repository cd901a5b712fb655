// SPDX-License-Identifier: Apache-2.0
// What the machine can do at most: bytes read from memory and int8 multiply-adds, per second.
//
// Benchmarks divide by these. Both run on the active target and check their own sums; they throw
// std::runtime_error where one is wrong.
#pragma once

#include <cstddef>

#include "base/parallel.h"

namespace tf {

// Bytes per second with which the workers of `team` together read a block of `bytes` (rounded up to
// whole cache lines), each its contiguous share: the best of `passes` >= 1. A block larger than the
// caches gives the bandwidth of the memory.
double ReadBandwidth(size_t bytes, size_t passes, const Team& team);

// Multiply-adds of u8 x i8 per second of the workers of `team` together, in the dot step that the
// kernels use and on operands in registers and the first cache: the best of `passes` >= 1. Each
// worker runs `rounds` >= 1 (rounded up) of 8 or 12 independent steps a pass.
double DotPeak(size_t rounds, size_t passes, const Team& team);

}  // namespace tf
