// SPDX-License-Identifier: Apache-2.0
// The decoder: one entry for prefill, decoding, batches and speculation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/parallel.h"
#include "formats/layout.h"
#include "kernels/linear.h"
#include "model/adapters.h"
#include "model/kv_cache.h"
#include "model/part_clock.h"
#include "model/spec.h"
#include "model/weights.h"

namespace tf {

enum class LogitsWanted : uint8_t {
  kNone,
  kLast,  // of the last token of every sequence in the batch
  kAll,   // of every token
};

// New tokens of one sequence; they continue what its state holds.
struct BatchItem {
  std::span<const int32_t> tokens;
  SequenceState* state;
};

// The tokens of one forward pass, in the order of the items.
using TokenBatch = std::span<const BatchItem>;

class Transformer {
 public:
  // Tokens that go through the layers together. Longer batches are cut; the result does not depend
  // on it.
  static constexpr size_t kMaxTokens = 128;

  // `adapters` by slot, empty where there are none. Throws like ModelSpec::Validate and
  // TakeWeights.
  Transformer(ModelSpec spec, std::map<std::string, PackedTensor> tensors, Adapters adapters,
              ActivationMode mode, size_t threads);

  const ModelSpec& spec() const { return spec_; }
  ActivationMode mode() const { return mode_; }
  const Team& team() const { return team_; }
  size_t weight_bytes() const { return weights_.Bytes(); }
  // The layout of the layers' matrices.
  std::string_view layout() const { return LayoutName(weights_.layers[0].up.weight.layout()); }
  size_t token_bytes() const { return weights_.TokenBytes(); }

  // Bytes of keys and values that one token leaves in the cache.
  size_t kv_bytes_per_token() const;

  std::unique_ptr<SequenceState> NewSequence() const {
    return std::make_unique<SequenceState>(cache_);
  }

  // Appends the tokens of the batch to their sequences and writes logits, [LogitRows x vocab_size],
  // in batch order. Throws std::invalid_argument, before anything changes, for an unknown token id,
  // an empty item, a state of another model or twice the same, or a sequence that would outgrow the
  // context. Calls from several threads take turns.
  void Forward(TokenBatch batch, LogitsWanted wanted, std::span<float> logits);

  // Starts (from zero) or ends adding up where the time of forward passes goes.
  void TimeParts(bool on);
  double SecondsOf(Part part);

  // Rows of logits that Forward writes.
  static size_t LogitRows(TokenBatch batch, LogitsWanted wanted);

 private:
  // One token on its way through the layers.
  struct Position {
    int32_t token;
    const SequenceState* state;
    size_t position;  // in its sequence
    float* logits;    // where its logits go, or null
  };

  struct Rows;
  // Linear layers that see one input: query, key, value, and in a parallel layer gate and up.
  static constexpr size_t kMaxProducts = 5;
  // A linear layer to apply to the input, and where its result goes.
  struct Product {
    const Linear* linear;
    Rows* out;
  };

  void CheckBatch(TokenBatch batch) const;
  void RunSlice(std::span<const Position> slice);
  void RunLayer(Worker& worker, size_t index, std::span<const Position> slice);
  void RunProducts(Worker& worker, std::span<const Product> products, size_t tokens);
  void RunAttention(Worker& worker, size_t index, std::span<const Position> slice);
  void RunHead(Worker& worker, std::span<const Position> slice);
  void FinishProjections(size_t index, const Position& position, size_t row);
  void Embed(const Position& position, size_t row);
  void Norm(const NormWeights& weights, const float* x, float* out) const;
  void Prepare(size_t token, size_t cols);

  ModelSpec spec_;
  Team team_;
  ModelWeights weights_;
  ActivationMode mode_;
  std::shared_ptr<KvCache> cache_;
  std::mutex mutex_;
  PartClock clock_;

  // Workspace for kMaxTokens tokens.
  struct Rows {
    Rows(size_t tokens, size_t cols) : stride(RoundUp(cols, 16)), floats(tokens * stride) {}
    float* operator[](size_t token) { return floats.data() + token * stride; }
    size_t stride;
    AlignedArray<float> floats;
  };
  Rows hidden_;  // the residual stream
  Rows query_, key_, value_;
  Rows gate_, up_;
  AlignedArray<float> ones_;                 // the other half of a feed-forward that is not gated
  Rows delta_;                               // what a layer half adds to the residual stream
  Rows angles_;                              // cosines, then sines, of one token's rotation
  LinearInput input_;                        // the input of the next linear layers
  Rows reduced_;                             // A x of the adapters of one RunProducts
  Rows adapter_sums_;                        // B (A x) of one adapter
  std::vector<AlignedArray<float>> scores_;  // attention scores, one row a thread
};

}  // namespace tf
