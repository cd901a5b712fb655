// SPDX-License-Identifier: Apache-2.0
// The decoder: one entry for prefill, decoding, batches and speculation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
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
#include "model/two_stage_head.h"
#include "model/weights.h"

namespace tf {

enum class LogitsWanted : uint8_t {
  kNone,
  kLast,  // of the last token of every sequence in the batch
  kAll,   // of every token
};

// How logits are made of a floating-point head.
enum class HeadMode : uint8_t {
  kExact,  // of the stored weights, in f32
  kInt8,   // of weights quantized to 8, 6 or 4 bits when the model is loaded
  kInt6,
  kInt4,
  kTwoStage,  // exact; ForwardCandidates finds the likeliest tokens without reading all of the head
};

// New tokens of one sequence; they continue what its state holds.
struct BatchItem {
  std::span<const int32_t> tokens;
  SequenceState* state;
};

// The tokens of one forward pass, in the order of the items.
using TokenBatch = std::span<const BatchItem>;

// Where a block leaves copies of what its linear layers see, [tokens, cols] each, before it is
// quantized; empty where nobody asks. `up` sees what `gate` sees, and in a parallel layer what
// `query` sees.
struct Taps {
  std::span<float> query, output, up, down;
};

class Transformer {
 public:
  // Tokens that go through the layers together. Longer batches are cut; the result does not depend
  // on it.
  static constexpr size_t kMaxTokens = 128;

  // `adapters` by slot, empty where there are none. tiles: the layout of the layers' ternary
  // matrices, t16 or t20; without one, the faster, which is measured where it matters
  // (FastestTiles); it does not change the result. Throws like ModelSpec::Validate and TakeWeights.
  // kTwoStage becomes kExact where it does not apply: for a head that is not of finite floats, has
  // a bias, or whose logits are capped. Throws std::invalid_argument for a head that is not
  // floating point where bits are asked for.
  Transformer(ModelSpec spec, std::map<std::string, PackedTensor> tensors, Adapters adapters,
              ActivationMode mode, KvType kv, HeadMode head, size_t threads,
              std::optional<Layout> tiles = std::nullopt);

  const ModelSpec& spec() const { return spec_; }
  ActivationMode mode() const { return mode_; }
  const Team& team() const { return team_; }
  // Of all matrices, each counted once, in every form that is kept.
  size_t weight_bytes() const;
  // The layout of the layers' matrices.
  std::string_view layout() const { return LayoutName(weights_.layers[0].up.weight.layout()); }
  // What one token reads of the matrices: all but tables that are only looked up.
  size_t token_bytes() const;
  const KvCache& cache() const { return *cache_; }
  HeadMode head_mode() const { return head_mode_; }
  // What the head reads for a token, rows that ForwardCandidates looks up apart.
  size_t head_bytes() const;

  std::unique_ptr<SequenceState> NewSequence() const {
    return std::make_unique<SequenceState>(cache_);
  }

  // Appends the tokens of the batch to their sequences and writes logits, [LogitRows x vocab_size],
  // in batch order. Throws std::invalid_argument, before anything changes, for an unknown token id,
  // an empty item, a state of another model or twice the same, or a sequence that would outgrow the
  // context. Calls from several threads take turns.
  void Forward(TokenBatch batch, LogitsWanted wanted, std::span<float> logits);

  // The residual stream at the start of one sequence: `hidden` is [tokens, hidden_size]. Throws
  // like Forward.
  void EmbedTokens(std::span<const int32_t> tokens, std::span<float> hidden);

  // Runs one layer alone on the whole of one sequence: the residual stream in and out of it in
  // `hidden`, [tokens, hidden_size]. Throws std::invalid_argument for a layer that does not exist,
  // sizes that do not match, or more tokens than the context holds.
  void ForwardBlock(size_t layer, std::span<float> hidden, const Taps& taps);

  // Puts another matrix in the place of "layers.I.NAME", of the same shape; a ternary one is
  // repacked. An adapter and a bias stay. Throws std::invalid_argument for any other slot.
  void ReplaceLinear(const std::string& slot, PackedTensor tensor);
  // Puts other weights (the offset of the model is added) in the place of a norm of a layer.
  void ReplaceNorm(const std::string& slot, std::span<const float> weight);

  // Starts (from zero) or ends adding up where the time of forward passes goes.
  void TimeParts(bool on);
  double SecondsOf(Part part);

  // Forward, under kTwoStage, for the likeliest tokens after the last token of each sequence of the
  // batch, at most TwoStageHead::kMaxTokens of them.
  void ForwardCandidates(TokenBatch batch, std::span<const CandidateSearch> searches,
                         std::span<Candidates> results);

  // Forward, and the likeliest token (the first of several) after the last token of each sequence.
  std::vector<int32_t> LikeliestTokens(TokenBatch batch);

  // Since the model was made; zeros without a two-stage head.
  SearchCounts search_counts();

  // The natural log-probability of tokens[i] at the head's input Candidates::input `inputs[i]`.
  std::vector<float> LogProbabilities(std::span<const std::span<const float>> inputs,
                                      std::span<const int32_t> tokens) const;

  // Rows of logits that Forward writes.
  static size_t LogitRows(TokenBatch batch, LogitsWanted wanted);

 private:
  // One token on its way through the layers.
  struct Position {
    int32_t token;
    const SequenceState* state;
    size_t position;                // in its sequence
    float* logits;                  // where its logits go, or null
    const CandidateSearch* search;  // with `candidates`, or both null
    Candidates* candidates;

    bool wants_head() const { return logits != nullptr || candidates != nullptr; }
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
  AttentionGroup GroupOf(size_t index, const Position& position, size_t row, size_t kv_head);
  void AttendByChunks(Worker& worker, size_t index, std::span<const Position> slice);
  void RunHead(Worker& worker, std::span<const Position> slice);
  void MakeHead();
  void RunQuantizedHead(Worker& worker, size_t rows, float* logits);
  void RunSlices(std::span<const Position> positions);
  void FinishProjections(size_t index, const Position& position, size_t row);
  void Embed(const Position& position, size_t row);
  void Norm(const NormWeights& weights, const float* x, float* out) const;
  void Prepare(size_t token, size_t tokens, size_t cols);
  void Tap(std::span<float> Taps::* tap, size_t token, size_t cols);

  ModelSpec spec_;
  Team team_;
  ModelWeights weights_;
  ActivationMode mode_;
  std::shared_ptr<KvCache> cache_;
  HeadMode head_mode_;
  QuantizedHead quantized_head_;
  TwoStageHead two_stage_head_;
  std::mutex mutex_;
  PartClock clock_;
  size_t first_layer_ = 0;      // of the pass under way
  const Taps* taps_ = nullptr;  // of the block under way
  size_t tapped_ = 0;           // tokens before the slice under way

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
  AlignedArray<float> ones_;               // the other half of a feed-forward that is not gated
  Rows delta_;                             // what a layer half adds to the residual stream
  Rows angles_;                            // cosines, then sines, of one token's rotation
  LinearInput input_;                      // the input of the next linear layers
  Rows reduced_;                           // A x of the adapters of one RunProducts
  Rows adapter_sums_;                      // B (A x) of one adapter
  std::vector<HeadActs> head_acts_;        // one, for a quantized head
  std::vector<CandidateSearch> searches_;  // of the slice
  std::vector<Candidates*> candidates_;
  std::vector<AlignedArray<float>> attention_scratch_;  // one row a thread
  AlignedArray<float> attention_parts_;                 // of kSplitTokens tokens, chunk by chunk
};

}  // namespace tf
