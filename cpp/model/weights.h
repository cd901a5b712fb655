// SPDX-License-Identifier: Apache-2.0
// The weights of a model in the form that kernels run on.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "kernels/quantize_acts.h"
#include "model/adapters.h"
#include "model/spec.h"

namespace tf {

// A linear layer. Without a bias or an adapter, those are empty.
struct Linear {
  PackedTensor weight;
  AlignedArray<float> bias;
  Adapter adapter;
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

  // Bytes of all matrices, adapters included, each counted once.
  size_t Bytes() const;
  // Bytes of the matrices that one token multiplies: all but tables that are only looked up.
  size_t TokenBytes() const;
  // The largest rank of an adapter, 0 where there is none.
  size_t MaxRank() const;
  // Weights of the layers' matrices.
  size_t Parameters() const;
  // Throws as CheckExact for a matrix of the layers whose sums could leave 32 bits.
  void CheckSums(ActivationMode mode) const;

  // The linear layer or the norm "layers.I.NAME". Throws std::invalid_argument where there is none.
  Linear& LinearAt(const std::string& slot);
  NormWeights& NormAt(const std::string& slot);
};

// Which run-time tiles the layers' ternary matrices become, given how many weights they have; see
// FastestTiles.
using TileChoice = std::function<Layout(size_t weights)>;

// Takes every slot of `spec` out of `tensors` and repacks ternary matrices into run-time tiles:
// those of the layers into what `choose` says, embeddings and head into t16.
// Throws std::invalid_argument that names the slot which is missing, misshapen, left over or of an
// alphabet that the model cannot use there (norms and biases are floats). `adapters` belong to the
// linear layers of the layers; throws like CheckAdapter, and for an adapter that none of them
// takes.
ModelWeights TakeWeights(const ModelSpec& spec, std::map<std::string, PackedTensor> tensors,
                         Adapters adapters, const TileChoice& choose, const Team& team);

}  // namespace tf
