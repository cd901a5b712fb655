// SPDX-License-Identifier: Apache-2.0
// The weights of a model in the form that kernels run on.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "model/spec.h"

namespace tf {

// A linear layer; without a bias, that array is empty.
struct Linear {
  PackedTensor weight;
  AlignedArray<float> bias;
};

// The norms that a layer does not have are empty.
struct LayerWeights {
  AlignedArray<float> attention_norm;
  Linear query, key, value;
  AlignedArray<float> query_norm, key_norm;
  AlignedArray<float> attention_sub_norm;
  Linear output;
  AlignedArray<float> attention_post_norm;
  AlignedArray<float> ffn_norm;
  Linear gate, up;
  AlignedArray<float> ffn_sub_norm;
  Linear down;
  AlignedArray<float> ffn_post_norm;
};

struct ModelWeights {
  PackedTensor embedding;
  PackedTensor head;  // the embedding where the head is tied
  AlignedArray<float> final_norm;
  std::vector<LayerWeights> layers;

  // Bytes of all matrices, each counted once.
  size_t Bytes() const;
  // Weights of the layers' matrices.
  size_t Parameters() const;
};

// Takes every slot of `spec` out of `tensors` and repacks ternary matrices into run-time tiles.
// Throws std::invalid_argument that names the slot which is missing, misshapen, left over or of an
// alphabet that the model cannot use there (norms, embedding and head are floats or int8).
ModelWeights TakeWeights(const ModelSpec& spec, std::map<std::string, PackedTensor> tensors,
                         const Team& team);

}  // namespace tf
