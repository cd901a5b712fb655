// SPDX-License-Identifier: Apache-2.0
// The generation loop: prompts in, tokens out, several sequences at once. It knows token ids only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "model/transformer.h"
#include "runtime/sampler.h"

namespace tf {

enum class FinishReason : uint8_t {
  kStop,    // an end token
  kLength,  // max_new_tokens, or the context is full
};

// A log-probability that was not needed to choose the token, and what it follows from.
struct PendingLogProbability {
  std::vector<float> input;  // of the head
  std::optional<float> value;
};

struct GeneratedToken {
  size_t sequence;
  int32_t token;
  float log_probability;  // NaN where it is pending
  std::optional<FinishReason> finish;
  std::shared_ptr<PendingLogProbability> pending;
};

class Generator {
 public:
  // One sampler per prompt. Throws std::invalid_argument for an empty prompt or one that fills the
  // context.
  Generator(Transformer& transformer, std::span<const std::vector<int32_t>> prompts,
            std::span<const SamplingOptions> options, size_t max_new_tokens,
            std::vector<int32_t> stop_ids);

  // Runs one piece of work and returns the tokens that it gave: a chunk of one prompt (none, or the
  // first token of that sequence), or one token of every live sequence. Short enough to look for an
  // interrupt in between.
  std::vector<GeneratedToken> Step();

  // Ends one sequence from outside.
  void Stop(size_t sequence);

  bool done() const;

  const Transformer& transformer() const { return transformer_; }

 private:
  struct Sequence {
    std::vector<int32_t> prompt;
    std::unique_ptr<SequenceState> state;
    Sampler sampler;
    size_t generated = 0;
    int32_t last = 0;
    bool live = true;
  };
  GeneratedToken Finished(size_t index, GeneratedToken token);
  bool RunCandidates(std::span<const BatchItem> batch, std::span<const size_t> indices,
                     std::vector<GeneratedToken>& tokens);
  std::vector<GeneratedToken> RunBatch(std::span<const BatchItem> batch,
                                       std::span<const size_t> indices);

  Transformer& transformer_;
  size_t max_new_tokens_;
  std::vector<int32_t> stop_ids_;
  std::vector<Sequence> sequences_;
  std::vector<float> logits_;
  std::vector<Candidates> candidates_;
};

// The natural log-probability of every token but the first, given those before it, in one window
// that starts empty. `between` is called between pieces of work and may throw.
std::vector<float> Score(Transformer& transformer, std::span<const int32_t> tokens,
                         const std::function<void()>& between);

}  // namespace tf
