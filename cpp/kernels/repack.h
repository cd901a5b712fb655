// SPDX-License-Identifier: Apache-2.0
// From the layouts of files to the run-time tiles.
#pragma once

#include "base/parallel.h"
#include "formats/packed_tensor.h"

namespace tf {

// The same ternary matrix in layout t16. weight: layout hf_packed (scales are kept), t16 (returned
// as it is), or one that holds its scales: they become the coarsest kind that is exact (one for the
// tensor, one per row, else groups), multiplied by the tensor's own factor where it has one. Throws
// FormatError when a code stands for no trit, std::invalid_argument for other layouts and where
// scales of groups below kChunkCols columns differ.
PackedTensor RepackT16(const PackedTensor& weight, const Team& team);

// The same ternary matrix in layout t20. weight: layout t16, or t20 (returned as it is).
PackedTensor RepackT20(const PackedTensor& weight, const Team& team);

// The same matrix of two tied planes in layout t8; scales are kept. weight: layout two_plane, or t8
// (returned as it is). Throws as RepackT16.
PackedTensor RepackT8(const PackedTensor& weight, const Team& team);

// RepackT16 of trits, RepackT8 of two planes; any other alphabet as it is.
PackedTensor RepackTiles(const PackedTensor& weight, const Team& team);

}  // namespace tf
