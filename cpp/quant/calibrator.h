// SPDX-License-Identifier: Apache-2.0
// Calibrator: second moments of activations, and rounding to trits, or to two tied planes of them,
// that minds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/parallel.h"
#include "formats/ternary.h"

namespace tf {

// How the scale of a run of weights w with importances h > 0 is chosen. Levels are the nearest
// ones.
enum class ScaleRule : uint8_t {
  // The exact minimum of sum h (w - s * level)^2. As s falls, the nearest level of |w| becomes k +
  // 1
  // where s passes |w| / (k + 1/2), whatever h is: in the falling order of all these quotients
  // every
  // prefix is one choice of levels, among them the best. For levels l the best s is sum h|w|l / sum
  // h l^2, and the error falls by (sum h|w|l)^2 / sum h l^2. Equal: the shorter prefix.
  kFit,
  // The best, by the same sum, of 0.5, 0.55, .. 3.0 times mean |w|; for two planes a third of them,
  // which gives the first plane these weights.
  kGrid,
  // s = mean |w|. This and the next: for trits alone.
  kAbsMean,
  // s = mean of the |w| above 0.7 mean |w|.
  kTwn,
};

// From "fit", "grid", "absmean", "twn". Throws std::invalid_argument that lists them.
ScaleRule ScaleRuleFromName(std::string_view name);

// sums [cols, cols] += x^T x for activations x [tokens, cols], exact products added in double token
// by token within parts of 256 tokens. Throws std::invalid_argument, before anything is added, for
// NaN or infinity (naming token and column) and for sizes that do not match.
void SumSecondMoments(std::span<const float> x, size_t cols, const Team& team,
                      std::span<double> sums);

// sums [cols_a, cols_b] += a^T b for a [tokens, cols_a], b [tokens, cols_b]; else as above.
void SumCrossMoments(std::span<const float> a, size_t cols_a, std::span<const float> b,
                     size_t cols_b, const Team& team, std::span<double> sums);

// Rounds `target` [rows, cols], column by column from the left, to `levels` [rows, cols] of
// `alphabet` (kTrit, kNineLevels) and `scales` [ScaleCount], all fp16-exact and at least 0.
//
// `factor` [cols, cols] is upper triangular with H = R R^T for the second moments H of the layer's
// input, so that the error (w - q) H (w - q)^T is the sum over columns k of
// (R_kk (w_k - q_k) + sum_{j < k} (w_j - q_j) R_jk)^2. Column k takes the level that makes its term
// smallest, given those on its left: the feedback of GPTQ (arXiv 2210.17323) in the form of LDLQ
// (arXiv 2307.13304), which needs no inverse. The scale of a run is chosen by `rule` when its first
// column is reached, from weights that hold the feedback of all runs before. An empty `factor`
// means no feedback: plain rounding.
//
// `importance` [cols], all above 0, are the h of the rule. Under kTensor `scales` is given, not
// chosen; under kRow a run is a row. Throws std::invalid_argument for sizes that do not match,
// values that are not finite, a rule that the alphabet does not have, and a scale above 65504.
void RoundWithFeedback(std::span<const double> target, size_t rows, size_t cols,
                       std::span<const double> factor, std::span<const double> importance,
                       Alphabet alphabet, ScaleRule rule, ScaleKind kind, size_t group_size,
                       const Team& team, std::span<int8_t> levels, std::span<float> scales);

}  // namespace tf
