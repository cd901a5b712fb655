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
  kReluSquared,
  kGelu,  // the tanh form
};

// One decoder layer: norm, attention, residual, norm, gated feed-forward, residual.
struct LayerSpec {
  size_t heads = 0;
  size_t kv_heads = 0;  // divides heads
  size_t head_dim = 0;
  // Rotary embedding: the angle of pair i at position p is p * rotation[i]. Pairs are (i, i +
  // pairs) of a head's first 2 * pairs values; the rest of the head is not rotated.
  std::vector<float> rotation;
  float rotation_scale = 1;      // of cosines and sines (YaRN)
  float attention_scale = 0;     // of the dot products
  float attention_soft_cap = 0;  // 0: none
  size_t window = 0;             // tokens that a query sees, itself included; 0: all
  size_t ffn_size = 0;
  Activation activation = Activation::kSilu;
  bool projection_bias = false;  // of query, key and value
  bool output_bias = false;
  bool ffn_bias = false;    // of gate, up and down
  bool head_norms = false;  // RMSNorm of every query and key head, before the rotation
  bool sub_norms = false;   // RMSNorm before the output and the down projection (BitNet)
  bool post_norms = false;  // RMSNorm of what attention and feed-forward add (Gemma 2)
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
  float embedding_scale = 1;
  float norm_offset = 0;     // added to the weights of every norm (Gemma: 1)
  float logit_soft_cap = 0;  // 0: none

  // All weights: "embedding", "final_norm", "head" unless tied, and for layer i "layers.i." with
  // attention_norm query key value output ffn_norm gate up down, and where the layer has them
  // query_bias key_bias value_bias output_bias gate_bias up_bias down_bias query_norm key_norm
  // attention_sub_norm ffn_sub_norm attention_post_norm ffn_post_norm.
  std::vector<Slot> Slots() const;

  // Throws std::invalid_argument that names the field which makes no sense.
  void Validate() const;
};

}  // namespace tf
