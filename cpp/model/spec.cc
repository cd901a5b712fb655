// SPDX-License-Identifier: Apache-2.0
// Shapes and checks of ModelSpec.
#include "model/spec.h"

#include <cmath>

#include "base/check.h"

namespace tf {

std::vector<Slot> ModelSpec::Slots() const {
  std::vector<Slot> slots = {{"embedding", vocab_size, hidden_size}};
  const auto add_norm = [&](const std::string& name, size_t size, NormKind kind) {
    slots.push_back({name, 1, size});
    if (kind == NormKind::kLayer) slots.push_back({name + "_bias", 1, size});
  };
  add_norm("final_norm", hidden_size, FinalNorm());
  if (!tied_head) slots.push_back({"head", vocab_size, hidden_size});
  if (head_bias) slots.push_back({"head_bias", 1, vocab_size});
  if (position_embedding) slots.push_back({"position_embedding", context_length, hidden_size});
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = layers[i];
    const std::string prefix = StrCat("layers.", i, ".");
    const size_t query_size = layer.heads * layer.head_dim;
    const size_t kv_size = layer.kv_heads * layer.head_dim;
    const auto norm = [&](bool present, const char* name, size_t size) {
      if (present) add_norm(prefix + name, size, layer.norm);
    };
    const auto matrix = [&](const char* name, size_t rows, size_t cols, bool bias) {
      slots.push_back({prefix + name, rows, cols});
      if (bias) slots.push_back({prefix + name + "_bias", 1, rows});
    };
    norm(true, "attention_norm", hidden_size);
    matrix("query", query_size, hidden_size, layer.projection_bias);
    matrix("key", kv_size, hidden_size, layer.projection_bias);
    matrix("value", kv_size, hidden_size, layer.projection_bias);
    norm(layer.head_norms, "query_norm", layer.head_dim);
    norm(layer.head_norms, "key_norm", layer.head_dim);
    norm(layer.sub_norms, "attention_sub_norm", query_size);
    matrix("output", hidden_size, query_size, layer.output_bias);
    norm(layer.post_norms, "attention_post_norm", hidden_size);
    norm(!layer.parallel, "ffn_norm", hidden_size);
    if (layer.gated) matrix("gate", layer.ffn_size, hidden_size, layer.ffn_bias);
    matrix("up", layer.ffn_size, hidden_size, layer.ffn_bias);
    norm(layer.sub_norms, "ffn_sub_norm", layer.ffn_size);
    matrix("down", hidden_size, layer.ffn_size, layer.ffn_bias);
    norm(layer.post_norms, "ffn_post_norm", hidden_size);
  }
  return slots;
}

void ModelSpec::Validate() const {
  // The limits keep every product of sizes below 2^63.
  static constexpr size_t kMaxSize = size_t{1} << 28;
  const auto check_size = [](const std::string& name, size_t size) {
    Check(size >= 1 && size <= kMaxSize, "[spec] ", name, " lies between 1 and ", kMaxSize,
          ", got ", size);
  };
  check_size("vocab_size", vocab_size);
  check_size("hidden_size", hidden_size);
  check_size("context_length", context_length);
  check_size("the number of layers", layers.size());
  const auto check_positive = [](const std::string& name, float value) {
    Check(std::isfinite(value) && value > 0, "[spec] ", name, " is positive, got ", value);
  };
  check_positive("norm_epsilon", norm_epsilon);
  check_positive("embedding_scale", embedding_scale);
  Check(std::isfinite(norm_offset), "[spec] norm_offset is finite, got ", norm_offset);
  Check(std::isfinite(logit_soft_cap) && logit_soft_cap >= 0,
        "[spec] logit_soft_cap is 0 or more, got ", logit_soft_cap);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerSpec& layer = layers[i];
    const std::string where = StrCat("layers.", i, ".");
    check_size(where + "heads", layer.heads);
    check_size(where + "kv_heads", layer.kv_heads);
    check_size(where + "head_dim", layer.head_dim);
    check_size(where + "ffn_size", layer.ffn_size);
    check_size(where + "heads * head_dim", layer.heads * layer.head_dim);
    Check(layer.heads % layer.kv_heads == 0, "[spec] ", where,
          "heads is a multiple of kv_heads, got ", layer.heads, " and ", layer.kv_heads);
    Check(2 * layer.rotation.size() <= layer.head_dim, "[spec] ", where,
          "rotation has at most half as many frequencies as a head has values, got ",
          layer.rotation.size(), " for ", layer.head_dim);
    for (const float frequency : layer.rotation) {
      Check(std::isfinite(frequency), "[spec] ", where, "rotation is finite, got ", frequency);
    }
    check_positive(where + "rotation_scale", layer.rotation_scale);
    check_positive(where + "residual_scale", layer.residual_scale);
    check_positive(where + "attention_scale", layer.attention_scale);
    Check(std::isfinite(layer.attention_soft_cap) && layer.attention_soft_cap >= 0, "[spec] ",
          where, "attention_soft_cap is 0 or more, got ", layer.attention_soft_cap);
  }
}

}  // namespace tf
