// SPDX-License-Identifier: Apache-2.0
// From logits to one token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "model/two_stage_head.h"

namespace tf {

// The meaning and order of transformers' generation: repetition penalty, temperature, top-k, top-p,
// min-p.
struct SamplingOptions {
  float temperature = 0.0f;  // 0: greedy
  size_t top_k = 0;          // 0: all tokens
  float top_p = 1.0f;        // the smallest set of likeliest tokens with at least this probability
  float min_p = 0.0f;        // at least this share of the likeliest token's probability
  float repetition_penalty =
      1.0f;  // of tokens in the prompt and the text so far (Keskar et al. 2019)
  uint64_t seed = 0;

  // Throws std::invalid_argument that names the option out of range.
  void Validate() const;
};

// Samples the tokens of one sequence. The same options, logits and history give the same tokens.
class Sampler {
 public:
  Sampler(const SamplingOptions& options, size_t vocab_size);

  // Tells the repetition penalty that `token` is part of the text.
  void Observe(int32_t token);

  // The candidates that are enough for the next choice, or none where it needs all logits: without
  // top-k, with a top-k above CandidateSearch::kMaxCount or above an eighth of the vocabulary, or
  // where the penalty concerns more than that. Valid until the next Observe or Sample.
  std::optional<CandidateSearch> Search() const;

  struct Choice {
    int32_t token;
    float log_probability;  // under the model: the plain softmax of the logits
  };
  Choice Sample(std::span<const float> logits);
  // The token that Sample would choose of all logits; `candidates` are those of Search().
  int32_t SampleCandidates(const Candidates& candidates);

 private:
  struct Candidate {
    float logit;
    int32_t token;
  };
  float Shape(float logit, bool seen) const;
  int32_t Choose();
  int32_t Draw();

  SamplingOptions options_;
  size_t vocab_size_;
  std::mt19937_64 random_;
  std::vector<int32_t> seen_;  // in rising order; empty without a penalty
  std::vector<Candidate> candidates_;
};

}  // namespace tf
