// SPDX-License-Identifier: Apache-2.0
// Packer: float weights to trits and scales, by one of four rounding schemes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/parallel.h"
#include "formats/ternary.h"

namespace tf {

// How the scale s and the trits of the weights w that share it are chosen; n is their number.
enum class Scheme : uint8_t {
  // The exact minimum of sum (w - s * trit)^2. For a support of k weights the best s is their mean
  // |w| and the squared error falls by (sum |w|)^2 / k; the best support holds the k largest |w|.
  // Trits: |w| > s / 2, with s as it is stored.
  kLeastSquares,
  // s = mean |w|, trit = round-half-even(w / s) clipped to -1 .. 1: BitNet b1.58 (arXiv
  // 2402.17764).
  // Trits follow from s before it is rounded, as in training.
  kAbsMean,
  // s = max |w|, trits as above: right only for weights that are ternary already.
  kAbsMax,
  // Trits: |w| > 0.7 mean |w|; s = mean |w| of those (Ternary Weight Networks, arXiv 1605.04711).
  kTwn,
};

// From "ls", "absmean", "absmax", "twn". Throws std::invalid_argument that lists them.
Scheme SchemeFromName(std::string_view name);

// Scales of a rows x cols matrix: 1, rows, or rows x groups. Throws std::invalid_argument for an
// empty matrix, kNone, or for kGroup a group size that is no positive multiple of kChunkCols.
size_t ScaleCount(ScaleKind kind, size_t group_size, size_t rows, size_t cols);

// Quantizes row-major `weights` [rows, cols] into `trits` [rows, cols] of -1, 0, +1 and `scales`
// [ScaleCount], weight ~ trit * scale. Results do not depend on the number of threads.
//
// Every scale is a value that binary16 holds (s is rounded to the nearest one, but not from above
// zero to zero). kTensor takes the nearest that also has 1 / float(1 / s) == s: stock checkpoints
// store 1 / s and their readers divide. All-zero weights have scale 0; under kTensor, which has no
// use for a zero, 1.
//
// Beyond the outputs it holds at most one float per weight that shares a scale, usually far less.
// Throws std::invalid_argument for NaN or infinite weights (naming row and column), for a scale
// above 65504, and for sizes that do not match.
void QuantizeWeights(std::span<const float> weights, size_t rows, size_t cols, Scheme scheme,
                     ScaleKind kind, size_t group_size, const Team& team, std::span<int8_t> trits,
                     std::span<float> scales);

}  // namespace tf
