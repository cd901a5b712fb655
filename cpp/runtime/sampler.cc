// SPDX-License-Identifier: Apache-2.0
// Sampling; see sampler.h.
#include "runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "base/check.h"
#include "kernels/softmax.h"

namespace tf {

void SamplingOptions::Validate() const {
  const auto check = [](bool ok, std::string_view name, std::string_view rule, float value) {
    Check(ok, "[sampling] ", name, " ", rule, ", got ", value);
  };
  check(std::isfinite(temperature) && temperature >= 0, "temperature", "is 0 (greedy) or more",
        temperature);
  check(top_p > 0 && top_p <= 1, "top_p", "lies above 0 and at most at 1", top_p);
  check(min_p >= 0 && min_p <= 1, "min_p", "lies between 0 and 1", min_p);
  check(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty",
        "is above 0", repetition_penalty);
}

Sampler::Sampler(const SamplingOptions& options, size_t vocab_size)
    : options_(options), vocab_size_(vocab_size), random_(options.seed) {
  options.Validate();
}

void Sampler::Observe(int32_t token) {
  if (options_.repetition_penalty == 1.0f) return;
  const auto place = std::lower_bound(seen_.begin(), seen_.end(), token);
  if (place == seen_.end() || *place != token) seen_.insert(place, token);
}

std::optional<CandidateSearch> Sampler::Search() const {
  const bool greedy = options_.temperature == 0.0f;
  const size_t count = greedy ? 1 : options_.top_k;
  const size_t most = std::min(CandidateSearch::kMaxCount, vocab_size_ / 8);
  if (count == 0 || count > most || seen_.size() > vocab_size_ / 8) return std::nullopt;
  return CandidateSearch{count, greedy ? 1.0f : options_.temperature, options_.repetition_penalty,
                         seen_};
}

// What decides a token's place: its logit after penalty and temperature.
float Sampler::Shape(float logit, bool seen) const {
  if (seen) logit = Penalise(logit, options_.repetition_penalty);
  return options_.temperature == 0.0f ? logit : logit / options_.temperature;
}

Sampler::Choice Sampler::Sample(std::span<const float> logits) {
  candidates_.clear();
  for (size_t token = 0; token < logits.size(); ++token) {
    candidates_.push_back({Shape(logits[token], false), static_cast<int32_t>(token)});
  }
  for (const int32_t seen : seen_) {
    const auto token = static_cast<size_t>(seen);
    candidates_[token].logit = Shape(logits[token], true);
  }
  const int32_t token = Choose();
  const float logit = logits[static_cast<size_t>(token)];
  return {token, logit - LogSumExp(logits.data(), logits.size())};
}

int32_t Sampler::SampleCandidates(const Candidates& candidates) {
  candidates_.clear();
  for (size_t i = 0; i < candidates.logits.size(); ++i) {
    const int32_t token = candidates.complete ? static_cast<int32_t>(i) : candidates.tokens[i];
    const bool seen = std::binary_search(seen_.begin(), seen_.end(), token);
    candidates_.push_back({Shape(candidates.logits[i], seen), token});
  }
  return Choose();
}

int32_t Sampler::Choose() {
  const auto less = [](const Candidate& a, const Candidate& b) { return a.logit < b.logit; };
  const int32_t token = options_.temperature == 0.0f
                            ? std::max_element(candidates_.begin(), candidates_.end(), less)->token
                            : Draw();
  Observe(token);
  return token;
}

int32_t Sampler::Draw() {
  // Likeliest first; ties by token id, so that the order is the same everywhere.
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  const size_t kept =
      options_.top_k == 0 ? candidates_.size() : std::min(options_.top_k, candidates_.size());
  // The same order for candidates as for all logits.
  const bool needs_order =
      (options_.top_k != 0 && options_.top_k < vocab_size_) || options_.top_p < 1.0f;
  if (needs_order) {
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(kept),
                      candidates_.end(), likelier);
    candidates_.resize(kept);
  }
  const float largest =
      std::max_element(candidates_.begin(), candidates_.end(),
                       [](const Candidate& a, const Candidate& b) { return a.logit < b.logit; })
          ->logit;
  double total = 0;
  for (Candidate& candidate : candidates_) {
    candidate.logit = std::exp(candidate.logit - largest);  // from here on a weight
    total += static_cast<double>(candidate.logit);
  }
  if (options_.top_p < 1.0f) {
    const double wanted = static_cast<double>(options_.top_p) * total;
    double sum = 0;
    size_t count = 0;
    while (count < candidates_.size() && sum < wanted)
      sum += static_cast<double>(candidates_[count++].logit);
    candidates_.resize(std::max<size_t>(count, 1));
  }
  // The likeliest token has weight 1.
  std::erase_if(candidates_,
                [this](const Candidate& candidate) { return candidate.logit < options_.min_p; });
  total = 0;
  for (const Candidate& candidate : candidates_) total += static_cast<double>(candidate.logit);
  const double uniform = static_cast<double>(random_() >> 11) * 0x1p-53;
  double rest = uniform * total;
  for (const Candidate& candidate : candidates_) {
    rest -= static_cast<double>(candidate.logit);
    if (rest < 0) return candidate.token;
  }
  return candidates_.back().token;  // rounding ate the last bit
}

}  // namespace tf
