// SPDX-License-Identifier: Apache-2.0
// Generation and scoring; see generator.h.
#include "runtime/generator.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "kernels/softmax.h"

namespace tf {

Generator::Generator(Transformer& transformer, std::span<const std::vector<int32_t>> prompts,
                     std::span<const SamplingOptions> options, size_t max_new_tokens,
                     std::vector<int32_t> stop_ids)
    : transformer_(transformer), max_new_tokens_(max_new_tokens), stop_ids_(std::move(stop_ids)) {
  const size_t context = transformer.spec().context_length, vocab = transformer.spec().vocab_size;
  Check(prompts.size() == options.size(), "[generate] one set of sampling options per prompt, got ",
        options.size(), " for ", prompts.size());
  for (size_t i = 0; i < prompts.size(); ++i) {
    Check(!prompts[i].empty(), "[generate] a prompt has at least one token");
    Check(prompts[i].size() < context, "[generate] a prompt must be shorter than the context of ",
          context, " tokens, got ", prompts[i].size());
    Sequence& sequence = sequences_.emplace_back(
        Sequence{prompts[i], transformer.NewSequence(), Sampler(options[i], vocab)});
    sequence.live = max_new_tokens > 0;
    for (const int32_t token : prompts[i]) {
      Check(token >= 0 && static_cast<size_t>(token) < vocab, "[generate] a token id lies in 0 .. ",
            vocab - 1, ", got ", token);
      sequence.sampler.Observe(token);
    }
  }
}

bool Generator::done() const {
  return std::none_of(sequences_.begin(), sequences_.end(),
                      [](const Sequence& s) { return s.live; });
}

void Generator::Stop(size_t sequence) {
  Check(sequence < sequences_.size(), "[generate] there is no sequence ", sequence);
  sequences_[sequence].live = false;
  sequences_[sequence].state->Truncate(0);
}

GeneratedToken Generator::Finished(size_t index, GeneratedToken token) {
  Sequence& sequence = sequences_[index];
  sequence.last = token.token;
  ++sequence.generated;
  if (std::find(stop_ids_.begin(), stop_ids_.end(), token.token) != stop_ids_.end()) {
    token.finish = FinishReason::kStop;
  } else if (sequence.generated == max_new_tokens_ ||
             sequence.state->length() == transformer_.spec().context_length) {
    token.finish = FinishReason::kLength;
  }
  if (token.finish.has_value()) Stop(index);
  return token;
}

// False, and nothing done, where one of the sequences needs all logits.
bool Generator::RunCandidates(std::span<const BatchItem> batch, std::span<const size_t> indices,
                              std::vector<GeneratedToken>& tokens) {
  if (transformer_.head_mode() != HeadMode::kTwoStage) return false;
  if (batch.size() > TwoStageHead::kMaxTokens) return false;
  std::vector<CandidateSearch> searches;
  for (const size_t index : indices) {
    const std::optional<CandidateSearch> search = sequences_[index].sampler.Search();
    if (!search.has_value()) return false;
    searches.push_back(*search);
  }
  candidates_.resize(batch.size());
  transformer_.ForwardCandidates(batch, searches, candidates_);
  for (size_t k = 0; k < indices.size(); ++k) {
    auto pending = std::make_shared<PendingLogProbability>();
    pending->input = candidates_[k].input;
    const int32_t token = sequences_[indices[k]].sampler.SampleCandidates(candidates_[k]);
    tokens.push_back(
        Finished(indices[k], {indices[k], token, std::numeric_limits<float>::quiet_NaN(),
                              std::nullopt, std::move(pending)}));
  }
  return true;
}

// One token for each of the sequences, from the last position of the batch's items.
std::vector<GeneratedToken> Generator::RunBatch(std::span<const BatchItem> batch,
                                                std::span<const size_t> indices) {
  std::vector<GeneratedToken> tokens;
  if (RunCandidates(batch, indices, tokens)) return tokens;
  const size_t vocab = transformer_.spec().vocab_size;
  logits_.resize(batch.size() * vocab);
  transformer_.Forward(batch, LogitsWanted::kLast, logits_);
  for (size_t k = 0; k < indices.size(); ++k) {
    const Sampler::Choice choice =
        sequences_[indices[k]].sampler.Sample(std::span(logits_).subspan(k * vocab, vocab));
    tokens.push_back(Finished(
        indices[k], {indices[k], choice.token, choice.log_probability, std::nullopt, nullptr}));
  }
  return tokens;
}

std::vector<GeneratedToken> Generator::Step() {
  for (size_t i = 0; i < sequences_.size(); ++i) {
    Sequence& sequence = sequences_[i];
    const size_t present = sequence.state->length();
    if (!sequence.live || present >= sequence.prompt.size()) continue;
    const size_t count = std::min(Transformer::kMaxTokens, sequence.prompt.size() - present);
    const BatchItem item[] = {
        {std::span(sequence.prompt).subspan(present, count), sequence.state.get()}};
    if (present + count == sequence.prompt.size()) return RunBatch(item, std::span(&i, 1));
    transformer_.Forward(item, LogitsWanted::kNone, {});
    return {};
  }
  std::vector<BatchItem> batch;
  std::vector<size_t> live;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (!sequences_[i].live) continue;
    batch.push_back({std::span(&sequences_[i].last, 1), sequences_[i].state.get()});
    live.push_back(i);
  }
  if (live.empty()) return {};
  return RunBatch(batch, live);
}

std::vector<float> Score(Transformer& transformer, std::span<const int32_t> tokens,
                         const std::function<void()>& between) {
  Check(tokens.size() >= 2, "[score] at least two tokens are needed, got ", tokens.size());
  const size_t vocab = transformer.spec().vocab_size;
  for (const int32_t token : tokens) {
    Check(token >= 0 && static_cast<size_t>(token) < vocab, "[score] a token id lies in 0 .. ",
          vocab - 1, ", got ", token);
  }
  constexpr size_t kChunk = 64;  // bounds the logits: 64 x 128256 floats are 33 MB
  std::vector<float> logits;
  std::vector<float> scores(tokens.size() - 1);
  const std::unique_ptr<SequenceState> state = transformer.NewSequence();
  for (size_t begin = 0; begin < scores.size(); begin += kChunk) {
    between();
    const size_t count = std::min(kChunk, scores.size() - begin);
    const BatchItem item[] = {{tokens.subspan(begin, count), state.get()}};
    logits.resize(count * vocab);
    transformer.Forward(item, LogitsWanted::kAll, logits);
    transformer.team().Run([&](Worker& worker) {
      const Range share = worker.Share(count);
      for (size_t t = share.begin; t < share.end; ++t) {
        const float* row = logits.data() + t * vocab;
        scores[begin + t] = row[static_cast<size_t>(tokens[begin + t + 1])] - LogSumExp(row, vocab);
      }
    });
  }
  return scores;
}

}  // namespace tf
