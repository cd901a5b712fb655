// SPDX-License-Identifier: Apache-2.0
// From the layouts of files to the run-time tiles.
#pragma once

#include "base/parallel.h"
#include "formats/packed_tensor.h"

namespace tf {

// The same ternary matrix in layout t16; scales are kept. weight: layout hf_packed or t16 (returned
// as it is). Throws FormatError when a code stands for no trit, std::invalid_argument for other
// layouts.
PackedTensor RepackT16(const PackedTensor& weight, const Team& team);

}  // namespace tf
