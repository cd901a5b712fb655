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

// A norm: LayerNorm where it has a bias, else RMSNorm.
struct NormWeights {
  AlignedArray<float> weight;
  AlignedArray<float> bias;
};

// The norms and linear layers that a layer does not have are empty.
struct LayerWeights {
  NormWeights attention_norm;
  Linear query, key, value;
  NormWeights query_norm, key_norm;
  NormWeights attention_sub_norm;
  Linear output;
  NormWeights attention_post_norm;
  NormWeights ffn_norm;
  Linear gate, up;
  NormWeights ffn_sub_norm;
  Linear down;
  NormWeights ffn_post_norm;
};

// Embeddings and head may be of any alphabet. Ternary ones lie in run-time tiles: those of a tied
// embedding serve both the look-up of rows and the product with the head.
struct ModelWeights {
  PackedTensor embedding;
  PackedTensor position_embedding;  // may be empty
  PackedTensor head;                // the embedding where the head is tied
  AlignedArray<float> head_bias;
  NormWeights final_norm;
  std::vector<LayerWeights> layers;

  // Bytes of all matrices, each counted once.
  size_t Bytes() const;
  // Bytes of the matrices that one token multiplies: all but tables that are only looked up.
  size_t TokenBytes() const;
  // Weights of the layers' matrices.
  size_t Parameters() const;
};

// Takes every slot of `spec` out of `tensors` and repacks ternary matrices into run-time tiles.
// Throws std::invalid_argument that names the slot which is missing, misshapen, left over or of an
// alphabet that the model cannot use there (norms and biases are floats).
ModelWeights TakeWeights(const ModelSpec& spec, std::map<std::string, PackedTensor> tensors,
                         const Team& team);

}  // namespace tf
