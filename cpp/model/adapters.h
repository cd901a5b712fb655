// SPDX-License-Identifier: Apache-2.0
// Low-rank adapters (LoRA, Hu et al. 2021) beside the weights of linear layers.
#pragma once

#include <cstddef>
#include <map>
#include <string>

#include "base/parallel.h"
#include "formats/packed_tensor.h"

namespace tf {

// A linear layer with an adapter gives W x + scaling * B (A x). x are the floats that the layer
// sees, before any quantization, and both products are in floats.
struct Adapter {
  PackedTensor a;  // f32 [rank x cols]; empty: no adapter
  PackedTensor b;  // f32 [rows x rank]
  float scaling = 1;
};

// By the slot of the linear layer: "layers.0.query".
using Adapters = std::map<std::string, Adapter>;

// Throws std::invalid_argument that names `slot` unless the adapter fits a rows x cols layer and
// all its values are finite.
void CheckAdapter(const std::string& slot, const Adapter& adapter, size_t rows, size_t cols);

// out[t, row] += scaling * (B reduced[t])[row] for this worker's share of the rows and all tokens.
// `reduced` holds A x in rows of `reduced_stride` floats; `sums` and `out` are rows of `out_stride`
// floats, the first as scratch. Every sum has an order of its own, whatever the tokens and workers
// are.
void AddAdapter(const Worker& worker, const Adapter& adapter, const float* reduced,
                size_t reduced_stride, size_t tokens, float* sums, float* out, size_t out_stride);

}  // namespace tf
