// SPDX-License-Identifier: Apache-2.0
// ModelSpec: a decoder as data. A family file in Python turns a configuration into one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tf {

enum class Activation : uint8_t {
  kSilu,
  kRelu,
  kReluSquared,
  kGelu,     // the tanh form
  kGeluErf,  // the exact form
};

enum class NormKind : uint8_t {
  kRms,    // root mean square, a weight
  kLayer,  // mean and variance, a weight and a bias
};

// One decoder layer: norm, attention, residual, norm, feed-forward, residual.
struct LayerSpec {
  size_t heads = 0;
  size_t kv_heads = 0;  // divides heads
  size_t head_dim = 0;
  // Rotary embedding: the angle of pair i at position p is p * rotation[i]. Pairs are (i, i +
  // pairs) of a head's first 2 * pairs values; the rest of the head is not rotated. Empty: no
  // rotary embedding.
  std::vector<float> rotation;
  float rotation_scale = 1;      // of cosines and sines (YaRN)
  float attention_scale = 0;     // of the dot products
  float attention_soft_cap = 0;  // 0: none
  size_t window = 0;             // tokens that a query sees, itself included; 0: all
  size_t ffn_size = 0;
  Activation activation = Activation::kSilu;
  bool gated = true;  // feed-forward: down(act(gate(x)) * up(x)), else down(act(up(x)))
  NormKind norm = NormKind::kRms;  // of all norms of the layer
  bool parallel = false;     // attention and feed-forward both see attention_norm(x); no ffn_norm
  float residual_scale = 1;  // of what each half adds to the residual stream, after the post norm
  bool projection_bias = false;  // of query, key and value
  bool output_bias = false;
  bool ffn_bias = false;    // of gate, up and down
  bool head_norms = false;  // of every query and key head, before the rotation
  bool sub_norms = false;   // before the output and the down projection (BitNet)
  bool post_norms = false;  // of what attention and feed-forward add (Gemma 2)
};

// A weight of the model by name, with the shape that it must have.
struct Slot {
  std::string name;
  size_t rows;  // 1 for a norm or a bias
  size_t cols;
};

struct ModelSpec {
  size_t vocab_size = 0;
  size_t hidden_size = 0;
  size_t context_length = 0;
  float norm_epsilon = 0;
  std::vector<LayerSpec> layers;
  bool tied_head = false;  // the embedding is also the head
  bool head_bias = false;
  float embedding_scale = 1;
  bool position_embedding = false;  // a learned row per position, added to the scaled embedding
  float norm_offset = 0;            // added to the weights of every norm (Gemma: 1)
  float logit_soft_cap = 0;         // 0: none

  // All weights: "embedding", "final_norm", "head" unless tied, where the model has them
  // "head_bias" and "position_embedding" [context_length x hidden_size], and for layer i
  // "layers.i." with attention_norm query key value output ffn_norm gate up down, and where the
  // layer has them query_bias key_bias value_bias output_bias gate_bias up_bias down_bias
  // query_norm key_norm attention_sub_norm ffn_sub_norm attention_post_norm ffn_post_norm. A layer
  // that is not gated has no gate, a parallel one no ffn_norm. Norms of kLayer have a bias of their
  // name and "_bias".
  std::vector<Slot> Slots() const;

  // The kind of final_norm: that of the last layer.
  NormKind FinalNorm() const { return layers.back().norm; }

  // Throws std::invalid_argument that names the field which makes no sense.
  void Validate() const;
};

}  // namespace tf
