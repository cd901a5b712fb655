// SPDX-License-Identifier: Apache-2.0
// Which run-time layout this machine multiplies faster, by measurement.
#pragma once

#include <cstddef>
#include <vector>

#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"

namespace tf {

// Seconds of each of `passes` products of `weight` (any layout of RunLinears) with `tokens` rows of
// made activations, quantized beforehand; one more pass goes before.
std::vector<double> TimeLinear(const PackedTensor& weight, size_t tokens, ActivationMode mode,
                               const Team& team, size_t passes);

// The layout, t16 or t20, whose product with one token takes the team less time per weight. Both
// give the same bits. Measured on 94 MiB once per process, target, team size and mode (some 100
// ms); t16 without a measurement for fewer than 2^25 weights, which stay in the caches, for float
// activations and on the scalar target, where decoding t20 takes longer in any case.
Layout FastestTiles(size_t weights, ActivationMode mode, const Team& team);

}  // namespace tf
