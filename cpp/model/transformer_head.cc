// SPDX-License-Identifier: Apache-2.0
// The forms of the output head, and the likeliest tokens without all logits.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "kernels/softmax.h"
#include "model/transformer.h"

namespace tf {
namespace {

size_t BitsOf(HeadMode mode) {
  return mode == HeadMode::kInt8 ? 8 : mode == HeadMode::kInt6 ? 6 : 4;
}

}  // namespace

void Transformer::MakeHead() {
  if (head_mode_ == HeadMode::kExact) return;
  const bool is_float = weights_.head.alphabet() == Alphabet::kFloat;
  if (head_mode_ == HeadMode::kTwoStage) {
    const bool applies = is_float && !spec_.head_bias && spec_.logit_soft_cap == 0.0f;
    if (applies) two_stage_head_ = TwoStageHead(weights_.head, team_);
    if (two_stage_head_.empty()) head_mode_ = HeadMode::kExact;
    return;
  }
  Check(is_float, "[head] only a floating-point head is quantized and this one is ",
        LayoutName(weights_.head.layout()), ": load the model with head=\"exact\"");
  quantized_head_ = QuantizedHead(weights_.head, BitsOf(head_mode_), team_);
  head_acts_.emplace_back(kMaxTokens, quantized_head_);
  if (!spec_.tied_head) weights_.head = PackedTensor();
}

size_t Transformer::head_bytes() const {
  if (!two_stage_head_.empty()) return two_stage_head_.bytes();
  return quantized_head_.empty() ? weights_.head.bytes().size() : quantized_head_.bytes();
}

size_t Transformer::weight_bytes() const {
  return weights_.Bytes() + (head_mode_ == HeadMode::kExact ? 0 : head_bytes());
}

size_t Transformer::token_bytes() const {
  return weights_.TokenBytes() - weights_.head.bytes().size() + head_bytes();
}

void Transformer::ForwardCandidates(TokenBatch batch, std::span<const CandidateSearch> searches,
                                    std::span<Candidates> results) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Check(!two_stage_head_.empty(), "[forward] candidates need the two-stage head");
  Check(searches.size() == batch.size() && results.size() == batch.size() &&
            batch.size() <= TwoStageHead::kMaxTokens,
        "[forward] candidates are of at most ", TwoStageHead::kMaxTokens, " sequences, got ",
        batch.size());
  CheckBatch(batch);
  std::vector<Position> positions;
  for (size_t k = 0; k < batch.size(); ++k) {
    const BatchItem& item = batch[k];
    const size_t before = item.state->length();
    item.state->Extend(item.tokens.size());
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      positions.push_back({item.tokens[i], item.state, before + i, nullptr, nullptr, nullptr});
    }
    positions.back().search = &searches[k];
    positions.back().candidates = &results[k];
  }
  RunSlices(positions);
}

std::vector<int32_t> Transformer::LikeliestTokens(TokenBatch batch) {
  std::vector<int32_t> tokens;
  if (two_stage_head_.empty() || batch.size() > TwoStageHead::kMaxTokens) {
    const size_t vocab = spec_.vocab_size;
    std::vector<float> logits(batch.size() * vocab);
    Forward(batch, LogitsWanted::kLast, logits);
    for (size_t k = 0; k < batch.size(); ++k) {
      const float* row = logits.data() + k * vocab;
      tokens.push_back(static_cast<int32_t>(std::max_element(row, row + vocab) - row));
    }
    return tokens;
  }
  const std::vector<CandidateSearch> searches(batch.size(), {1, 1.0f, 1.0f, {}});
  std::vector<Candidates> results(batch.size());
  ForwardCandidates(batch, searches, results);
  for (const Candidates& found : results) {
    const auto likeliest = std::max_element(found.logits.begin(), found.logits.end());
    const auto place = static_cast<size_t>(likeliest - found.logits.begin());
    tokens.push_back(found.complete ? static_cast<int32_t>(place) : found.tokens[place]);
  }
  return tokens;
}

SearchCounts Transformer::search_counts() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return two_stage_head_.counts();
}

std::vector<float> Transformer::LogProbabilities(std::span<const std::span<const float>> inputs,
                                                 std::span<const int32_t> tokens) const {
  constexpr size_t kRows = 16;  // bounds the logits
  std::vector<float> result(tokens.size());
  LinearInput input(kRows, spec_.hidden_size);
  std::vector<float> logits(std::min(kRows, tokens.size()) * spec_.vocab_size);
  for (size_t begin = 0; begin < tokens.size(); begin += kRows) {
    const size_t count = std::min(kRows, tokens.size() - begin);
    for (size_t i = 0; i < count; ++i) {
      std::copy(inputs[begin + i].begin(), inputs[begin + i].end(), input.Row(i));
    }
    const LinearJob head[] = {{&weights_.head, logits.data(), spec_.vocab_size}};
    team_.Run([&](Worker& worker) {
      RunLinears(worker, head, input, count, mode_);
      worker.Barrier();
      const Range share = worker.Share(count);
      for (size_t i = share.begin; i < share.end; ++i) {
        const float* row = logits.data() + i * spec_.vocab_size;
        result[begin + i] =
            row[static_cast<size_t>(tokens[begin + i])] - LogSumExp(row, spec_.vocab_size);
      }
    });
  }
  return result;
}

void Transformer::RunQuantizedHead(Worker& worker, size_t rows, float* logits) {
  HeadActs& acts = head_acts_.front();
  const Range share = worker.Share(rows);
  for (size_t row = share.begin; row < share.end; ++row) acts.Quantize(input_.Row(row), row);
  worker.Barrier();
  const Range panels = worker.Share(quantized_head_.panels());
  HeadProducts(quantized_head_, acts, rows, panels.begin, panels.end, logits, spec_.vocab_size);
}

}  // namespace tf
