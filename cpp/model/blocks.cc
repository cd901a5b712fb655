// SPDX-License-Identifier: Apache-2.0
// One layer at a time, with taps, and the exchange of single weights: what calibration works with.
#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "kernels/linear.h"
#include "kernels/repack.h"
#include "model/transformer.h"

namespace tf {

void Transformer::EmbedTokens(std::span<const int32_t> tokens, std::span<float> hidden) {
  const std::lock_guard lock(mutex_);
  const auto state = NewSequence();
  const BatchItem item{tokens, state.get()};
  CheckBatch({&item, 1});
  Check(hidden.size() == tokens.size() * spec_.hidden_size, "[embed] room for ",
        tokens.size() * spec_.hidden_size, " floats is needed, got ", hidden.size());
  for (size_t t = 0; t < tokens.size(); ++t) {
    Embed({tokens[t], state.get(), t, nullptr, nullptr, nullptr}, 0);
    std::copy_n(hidden_[0], spec_.hidden_size, hidden.data() + t * spec_.hidden_size);
  }
}

void Transformer::ForwardBlock(size_t layer, std::span<float> hidden, const Taps& taps) {
  const std::lock_guard lock(mutex_);
  const size_t size = spec_.hidden_size, tokens = hidden.size() / size;
  Check(layer < spec_.layers.size(), "[forward_block] the model has ", spec_.layers.size(),
        " layers, got layer ", layer);
  Check(tokens > 0 && hidden.size() % size == 0, "[forward_block] hidden is [tokens, ", size,
        "], got ", hidden.size(), " floats");
  Check(tokens <= spec_.context_length, "[forward_block] the context holds ", spec_.context_length,
        " tokens, got ", tokens);
  const LayerSpec& shape = spec_.layers[layer];
  const auto check = [&](std::span<float> tap, size_t cols) {
    Check(tap.empty() || tap.size() == tokens * cols, "[forward_block] a tap of ", cols,
          " columns and ", tokens, " tokens, got ", tap.size(), " floats");
  };
  check(taps.query, size);
  check(taps.output, shape.heads * shape.head_dim);
  check(taps.up, size);
  check(taps.down, shape.ffn_size);

  const auto state = NewSequence();
  state->Extend(tokens);
  first_layer_ = layer;
  taps_ = &taps;
  for (tapped_ = 0; tapped_ < tokens; tapped_ += kMaxTokens) {
    std::vector<Position> slice;
    for (size_t t = tapped_; t < std::min(tokens, tapped_ + kMaxTokens); ++t) {
      std::copy_n(hidden.data() + t * size, size, hidden_[slice.size()]);
      slice.push_back({0, state.get(), t, nullptr, nullptr, nullptr});
    }
    team_.Run([&](Worker& worker) { RunLayer(worker, layer, slice); });
    for (size_t t = 0; t < slice.size(); ++t) {
      std::copy_n(hidden_[t], size, hidden.data() + (tapped_ + t) * size);
    }
  }
  first_layer_ = 0;
  taps_ = nullptr;
  tapped_ = 0;
}

void Transformer::ReplaceLinear(const std::string& slot, PackedTensor tensor) {
  const std::lock_guard lock(mutex_);
  PackedTensor& weight = weights_.LinearAt(slot).weight;
  Check(tensor.rows() == weight.rows() && tensor.cols() == weight.cols(), "[replace] '", slot,
        "' is ", weight.rows(), " x ", weight.cols(), ", got ", tensor.rows(), " x ",
        tensor.cols());
  tensor = RepackTiles(tensor, team_);
  CheckExact(mode_, tensor);
  weight = std::move(tensor);
}

void Transformer::ReplaceNorm(const std::string& slot, std::span<const float> weight) {
  const std::lock_guard lock(mutex_);
  AlignedArray<float>& norm = weights_.NormAt(slot).weight;
  Check(weight.size() == norm.size() && norm.size() > 0, "[replace] '", slot, "' has ", norm.size(),
        " weights, got ", weight.size());
  Check(std::ranges::all_of(weight, [](float value) { return std::isfinite(value); }),
        "[replace] the weights of '", slot, "' must be finite");
  std::ranges::transform(weight, norm.data(),
                         [&](float value) { return value + spec_.norm_offset; });
}

}  // namespace tf
