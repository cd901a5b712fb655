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
    : options_(options),
      random_(options.seed),
      seen_(options.repetition_penalty == 1.0f ? 0 : vocab_size) {
  options.Validate();
}

void Sampler::Observe(int32_t token) {
  if (!seen_.empty()) seen_[static_cast<size_t>(token)] = true;
}

Sampler::Choice Sampler::Sample(std::span<float> logits) {
  const float normaliser = LogSumExp(logits.data(), logits.size());
  const auto plain = [&](size_t token) {  // undoes the penalty, which is applied in place
    if (seen_.empty() || !seen_[token]) return logits[token];
    return logits[token] > 0 ? logits[token] * options_.repetition_penalty
                             : logits[token] / options_.repetition_penalty;
  };
  for (size_t token = 0; token < seen_.size(); ++token) {
    if (!seen_[token]) continue;
    logits[token] = logits[token] > 0 ? logits[token] / options_.repetition_penalty
                                      : logits[token] * options_.repetition_penalty;
  }
  const size_t token =
      options_.temperature == 0.0f
          ? static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())
          : Draw(logits);
  const Choice choice = {static_cast<int32_t>(token), plain(token) - normaliser};
  Observe(choice.token);
  return choice;
}

size_t Sampler::Draw(std::span<const float> logits) {
  candidates_.clear();
  for (size_t token = 0; token < logits.size(); ++token) {
    candidates_.push_back({logits[token] / options_.temperature, static_cast<int32_t>(token)});
  }
  // Likeliest first; ties by token id, so that the order is the same everywhere.
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  };
  const size_t kept =
      options_.top_k == 0 ? candidates_.size() : std::min(options_.top_k, candidates_.size());
  const bool needs_order = kept < candidates_.size() || options_.top_p < 1.0f;
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
    if (rest < 0) return static_cast<size_t>(candidate.token);
  }
  return static_cast<size_t>(candidates_.back().token);  // rounding ate the last bit
}

}  // namespace tf
