// SPDX-License-Identifier: Apache-2.0
// The likeliest tokens and their exact logits without reading the whole head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "formats/packed_tensor.h"
#include "kernels/head.h"
#include "kernels/linear.h"

namespace tf {

// A logit after the repetition penalty (Keskar et al. 2019) of a token that was seen.
inline float Penalise(float logit, float penalty) {
  return logit > 0 ? logit / penalty : logit * penalty;
}

// What one sequence wants of its next logits: the `count` likeliest tokens, where a token's place
// follows from Penalise(logit) for seen tokens, logit for others, divided by `temperature`.
struct CandidateSearch {
  size_t count;                   // 1 .. kMaxCount
  float temperature;              // above 0; 1 for greedy choice
  float penalty;                  // above 0
  std::span<const int32_t> seen;  // in rising order, each once; empty where the penalty is 1

  static constexpr size_t kMaxCount = 1024;
};

// Tokens in rising order with the exact head's logits: among them all that could have a place among
// the `count` likeliest, ties included, and all seen ones. `complete`: every token is there.
struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  std::vector<float> input;  // of the head: what any other logit follows from
  bool complete = false;
};

// What searches took, added up: the rows that were looked up in the exact head are those of its
// searches that did not fall back to the whole of it.
struct SearchCounts {
  uint64_t searches = 0;
  uint64_t fallbacks = 0;
  uint64_t rows = 0;
};

// Finds candidates with a quantized head's upper bounds; docs/design/0009-head.md has the proof.
class TwoStageHead {
 public:
  static constexpr size_t kMaxTokens = kMaxBoundTokens;

  TwoStageHead() = default;
  // `exact` is f32, f16 or bf16 and must outlive this. Stays empty where a value is not finite.
  TwoStageHead(const PackedTensor& exact, const Team& team);

  bool empty() const { return exact_ == nullptr; }
  size_t bytes() const { return quantized_.bytes(); }
  const SearchCounts& counts() const { return counts_; }

  // Called by all workers of a team of at most as many as that of the constructor, each with the
  // same arguments; `input` holds one row per search, at most kMaxTokens, finished before. A search
  // falls back to the whole head where too many tokens could have a place.
  void Run(Worker& worker, const LinearInput& input, std::span<const CandidateSearch> searches,
           std::span<Candidates* const> results);

 private:
  using Logit = std::pair<int32_t, float>;
  // What one worker knows of its rows.
  struct Part {
    std::vector<Logit> known;   // in rising order
    std::vector<int32_t> rest;  // more rows whose bound reaches the threshold
    std::vector<float> scratch;
    bool too_many;
  };

  void Guess(Part& part, const CandidateSearch& search, const float* bounds, Range rows,
             const float* x);
  float Threshold(Part& part, size_t workers, const CandidateSearch& search) const;
  static void Collect(Part& part, const float* bounds, Range rows, float threshold);
  void Finish(Part& part, const float* x);
  void Gather(size_t workers, Candidates& result) const;
  float Exact(int32_t row, const float* x);

  const PackedTensor* exact_ = nullptr;
  QuantizedHead quantized_;
  std::vector<HeadActs> acts_;  // one, or none where empty
  std::vector<uint8_t> finite_;
  std::vector<float> bounds_;  // kMaxTokens x rows
  std::vector<float> exact_logits_;
  std::vector<Part> parts_;
  SearchCounts counts_;
};

}  // namespace tf
