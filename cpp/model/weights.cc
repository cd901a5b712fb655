// SPDX-License-Identifier: Apache-2.0
// Slots to run-time weights; see weights.h.
#include "model/weights.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"
#include "kernels/dense_linear.h"
#include "kernels/linear.h"
#include "kernels/repack.h"

namespace tf {
namespace {

// The gate may be empty.
std::array<const Linear*, 7> Linears(const LayerWeights& layer) {
  return {&layer.query, &layer.key, &layer.value, &layer.output,
          &layer.gate,  &layer.up,  &layer.down};
}

template <typename Part>
struct Place {
  const char* name;
  Part LayerWeights::* part;
};

constexpr Place<Linear> kLinears[] = {
    {"query", &LayerWeights::query}, {"key", &LayerWeights::key},
    {"value", &LayerWeights::value}, {"output", &LayerWeights::output},
    {"gate", &LayerWeights::gate},   {"up", &LayerWeights::up},
    {"down", &LayerWeights::down},
};
constexpr Place<NormWeights> kNorms[] = {
    {"attention_norm", &LayerWeights::attention_norm},
    {"query_norm", &LayerWeights::query_norm},
    {"key_norm", &LayerWeights::key_norm},
    {"attention_sub_norm", &LayerWeights::attention_sub_norm},
    {"attention_post_norm", &LayerWeights::attention_post_norm},
    {"ffn_norm", &LayerWeights::ffn_norm},
    {"ffn_sub_norm", &LayerWeights::ffn_sub_norm},
    {"ffn_post_norm", &LayerWeights::ffn_post_norm},
};

// "layers.I.NAME" with NAME of the table.
template <typename Part, size_t kSize>
Part& Find(const Place<Part> (&table)[kSize], std::vector<LayerWeights>& layers,
           const std::string& slot) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = StrCat("layers.", i, ".");
    if (!slot.starts_with(prefix)) continue;
    for (const auto& [name, part] : table) {
      if (slot.substr(prefix.size()) == name) return layers[i].*part;
    }
  }
  throw std::invalid_argument(StrCat("[replace] the model has no ", table[0].name,
                                     " or the like by the name '", slot, "'"));
}

class Taker {
 public:
  Taker(const ModelSpec& spec, std::map<std::string, PackedTensor> tensors, Adapters adapters,
        const TileChoice& choose, const Team& team)
      : tensors_(std::move(tensors)), adapters_(std::move(adapters)), team_(team) {
    const std::vector<Slot> slots = spec.Slots();
    for (const Slot& slot : slots) {
      const auto found = tensors_.find(slot.name);
      Check(found != tensors_.end(), "[model] the weight '", slot.name, "' is missing");
      const PackedTensor& tensor = found->second;
      Check(tensor.rows() == slot.rows && tensor.cols() == slot.cols, "[model] the weight '",
            slot.name, "' is ", slot.rows, " x ", slot.cols, " by the configuration, got ",
            tensor.rows(), " x ", tensor.cols());
    }
    if (tensors_.size() != slots.size()) {
      for (const Slot& slot : slots) tensors_.erase(slot.name);
      throw std::invalid_argument(
          StrCat("[model] no part of the model takes the weight '", tensors_.begin()->first, "'"));
    }
    size_t ternary_weights = 0;
    for (const auto& [name, tensor] : tensors_) {
      if (tensor.alphabet() == Alphabet::kTrit) ternary_weights += tensor.rows() * tensor.cols();
    }
    tiles_ = choose(ternary_weights);
  }

  // Matrices of trits, and of two planes of them, become run-time tiles; others stay as they are.
  PackedTensor Matrix(const std::string& name) {
    PackedTensor tensor = std::move(tensors_.at(name));
    try {
      return RepackTiles(tensor, team_);
    } catch (const FormatError& error) {
      throw FormatError(StrCat("[model] weight '", name, "': ", error.what()));
    }
  }

  Linear TakeLinear(const std::string& name, bool bias) {
    Linear linear;
    PackedTensor& given = tensors_.at(name);
    // The wanted tiles are taken as they are: the largest models do not fit twice.
    const bool ready = tiles_ == Layout::kT20 && given.layout() == Layout::kT20;
    linear.weight = ready ? std::move(given) : Matrix(name);
    if (tiles_ == Layout::kT20 && linear.weight.layout() == Layout::kT16)
      linear.weight = RepackT20(linear.weight, team_);
    if (bias) linear.bias = Vector(name + "_bias");
    if (auto found = adapters_.extract(name)) {
      CheckAdapter(name, found.mapped(), linear.weight.rows(), linear.weight.cols());
      linear.adapter = std::move(found.mapped());
    }
    return linear;
  }

  void CheckNoAdapterLeft() const {
    Check(adapters_.empty(), "[adapter] no linear layer takes the adapter '",
          adapters_.empty() ? "" : adapters_.begin()->first,
          "'; a layer's query, key, value, output, gate, up and down do");
  }

  AlignedArray<float> Vector(const std::string& name) {
    const PackedTensor tensor = std::move(tensors_.at(name));
    Check(tensor.alphabet() == Alphabet::kFloat, "[model] '", name, "' must be floating point");
    AlignedArray<float> values(tensor.cols());
    CopyRow(tensor, 0, values.data());
    return values;
  }

  NormWeights TakeNorm(const std::string& name, NormKind kind, float offset) {
    NormWeights norm{Vector(name), {}};
    for (float& value : norm.weight.span()) value += offset;
    if (kind == NormKind::kLayer) norm.bias = Vector(name + "_bias");
    return norm;
  }

 private:
  std::map<std::string, PackedTensor> tensors_;
  Adapters adapters_;
  const Team& team_;
  Layout tiles_ = Layout::kT16;
};

}  // namespace

size_t ModelWeights::Bytes() const {
  size_t bytes = embedding.bytes().size() + position_embedding.bytes().size();
  if (head.bytes().data() != embedding.bytes().data()) bytes += head.bytes().size();
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : Linears(layer)) {
      const Adapter& adapter = linear->adapter;
      bytes += linear->weight.bytes().size() + adapter.a.bytes().size() + adapter.b.bytes().size();
    }
  }
  return bytes;
}

size_t ModelWeights::TokenBytes() const {
  const bool tied = head.bytes().data() == embedding.bytes().data();
  return Bytes() - position_embedding.bytes().size() - (tied ? 0 : embedding.bytes().size());
}

size_t ModelWeights::MaxRank() const {
  size_t rank = 0;
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : Linears(layer)) rank = std::max(rank, linear->adapter.a.rows());
  }
  return rank;
}

Linear& ModelWeights::LinearAt(const std::string& slot) { return Find(kLinears, layers, slot); }

NormWeights& ModelWeights::NormAt(const std::string& slot) { return Find(kNorms, layers, slot); }

size_t ModelWeights::Parameters() const {
  size_t parameters = 0;
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : Linears(layer)) {
      parameters += linear->weight.rows() * linear->weight.cols();
    }
  }
  return parameters;
}

void ModelWeights::CheckSums(ActivationMode mode) const {
  for (const LayerWeights& layer : layers) {
    for (const Linear* linear : Linears(layer)) CheckExact(mode, linear->weight);
  }
}

ModelWeights TakeWeights(const ModelSpec& spec, std::map<std::string, PackedTensor> tensors,
                         Adapters adapters, const TileChoice& choose, const Team& team) {
  Taker taker(spec, std::move(tensors), std::move(adapters), choose, team);
  ModelWeights weights;
  weights.embedding = taker.Matrix("embedding");
  if (spec.position_embedding) weights.position_embedding = taker.Matrix("position_embedding");
  weights.head = spec.tied_head ? weights.embedding : taker.Matrix("head");
  if (spec.head_bias) weights.head_bias = taker.Vector("head_bias");
  weights.final_norm = taker.TakeNorm("final_norm", spec.FinalNorm(), spec.norm_offset);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const std::string prefix = StrCat("layers.", i, ".");
    const auto linear = [&](const char* name, bool bias) {
      return taker.TakeLinear(prefix + name, bias);
    };
    const auto norm = [&](const char* name, bool present) {
      return present ? taker.TakeNorm(prefix + name, layer.norm, spec.norm_offset) : NormWeights();
    };
    weights.layers.push_back({
        .attention_norm = norm("attention_norm", true),
        .query = linear("query", layer.projection_bias),
        .key = linear("key", layer.projection_bias),
        .value = linear("value", layer.projection_bias),
        .query_norm = norm("query_norm", layer.head_norms),
        .key_norm = norm("key_norm", layer.head_norms),
        .attention_sub_norm = norm("attention_sub_norm", layer.sub_norms),
        .output = linear("output", layer.output_bias),
        .attention_post_norm = norm("attention_post_norm", layer.post_norms),
        .ffn_norm = norm("ffn_norm", !layer.parallel),
        .gate = layer.gated ? linear("gate", layer.ffn_bias) : Linear(),
        .up = linear("up", layer.ffn_bias),
        .ffn_sub_norm = norm("ffn_sub_norm", layer.sub_norms),
        .down = linear("down", layer.ffn_bias),
        .ffn_post_norm = norm("ffn_post_norm", layer.post_norms),
    });
  }
  taker.CheckNoAdapterLeft();
  return weights;
}

}  // namespace tf
