// SPDX-License-Identifier: Apache-2.0
// Bounds of all rows, exact products of a guess, a threshold, exact products of what reaches it.
#include "model/two_stage_head.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>

#include "kernels/dense_linear.h"

namespace tf {
namespace {

constexpr size_t kBits = 6;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A value below or at which no logit of an unseen token ranks as high as `place`: x / temperature
// never falls when x grows, so one x that stays below `place` decides for all smaller ones.
float LargestBelow(float place, float temperature) {
  float x = place * temperature;
  for (int step = 0; step < 64; ++step) {
    if (x / temperature < place) return x;
    x = std::nextafter(x, -kInfinity);
  }
  return -kInfinity;
}

}  // namespace

TwoStageHead::TwoStageHead(const PackedTensor& exact, const Team& team)
    : finite_(kMaxTokens),
      bounds_(kMaxTokens * exact.rows()),
      exact_logits_(exact.rows()),
      parts_(team.threads()) {
  try {
    quantized_ = QuantizedHead(exact, kBits, team);
  } catch (const std::invalid_argument&) {
    return;
  }
  acts_.emplace_back(kMaxTokens, quantized_);
  exact_ = &exact;
}

float TwoStageHead::Exact(int32_t row, const float* x) {
  const auto r = static_cast<size_t>(row);
  DenseLinear(*exact_, x, 1, exact_->cols(), r, r + 1, exact_logits_.data(), exact_->rows());
  return exact_logits_[r];
}

// Computes the logits of the seen tokens and of the rows with the largest bounds.
void TwoStageHead::Guess(Part& part, const CandidateSearch& search, const float* bounds, Range rows,
                         const float* x) {
  const auto first_seen =
      std::lower_bound(search.seen.begin(), search.seen.end(), static_cast<int32_t>(rows.begin));
  const auto last_seen =
      std::lower_bound(first_seen, search.seen.end(), static_cast<int32_t>(rows.end));
  const auto is_seen = [&](size_t row) {
    return std::binary_search(first_seen, last_seen, static_cast<int32_t>(row));
  };
  std::vector<float>& heap = part.scratch;  // the largest bounds so far, the least in front
  heap.clear();
  for (size_t row = rows.begin; row < rows.end; ++row) {
    const bool full = heap.size() == search.count;
    if ((full && bounds[row] <= heap.front()) || is_seen(row)) continue;
    if (full) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      heap.pop_back();
    }
    heap.push_back(bounds[row]);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  part.known.clear();
  for (auto token = first_seen; token != last_seen; ++token) {
    part.known.emplace_back(*token, Exact(*token, x));
  }
  size_t left = heap.size();
  for (size_t row = rows.begin; left != 0; ++row) {
    if (bounds[row] < heap.front() || is_seen(row)) continue;
    part.known.emplace_back(row, Exact(static_cast<int32_t>(row), x));
    --left;
  }
  std::sort(part.known.begin(), part.known.end());
}

// From what all workers know: no row with a bound at or below this has a place.
float TwoStageHead::Threshold(Part& part, size_t workers, const CandidateSearch& search) const {
  std::vector<float>& places = part.scratch;
  places.clear();
  for (size_t w = 0; w < workers; ++w) {
    for (const auto& [token, logit] : parts_[w].known) {
      const bool seen = std::binary_search(search.seen.begin(), search.seen.end(), token);
      const float penalised = seen ? Penalise(logit, search.penalty) : logit;
      places.push_back(penalised / search.temperature);
      if (!std::isfinite(places.back())) return -kInfinity;
    }
  }
  if (places.size() < search.count) return -kInfinity;
  const auto last = places.begin() + static_cast<ptrdiff_t>(search.count) - 1;
  std::nth_element(places.begin(), last, places.end(), std::greater<>());
  return LargestBelow(*last, search.temperature);
}

void TwoStageHead::Collect(Part& part, const float* bounds, Range rows, float threshold) {
  part.rest.clear();
  const size_t limit = (rows.end - rows.begin) / 4;  // beyond, one stream is faster
  part.too_many = false;
  for (size_t row = rows.begin; row < rows.end; ++row) {
    if (bounds[row] <= threshold) continue;
    part.too_many = part.rest.size() == limit;
    if (part.too_many) return;
    part.rest.push_back(static_cast<int32_t>(row));
  }
}

// Computes the logits of the rest.
void TwoStageHead::Finish(Part& part, const float* x) {
  const auto known = static_cast<ptrdiff_t>(part.known.size());
  for (const int32_t row : part.rest) {
    const auto end = part.known.begin() + known;
    const auto place = std::lower_bound(part.known.begin(), end, Logit(row, -kInfinity));
    if (place != end && place->first == row) continue;
    part.known.emplace_back(row, Exact(row, x));
  }
}

void TwoStageHead::Gather(size_t workers, Candidates& result) const {
  std::vector<Logit> all;
  for (size_t w = 0; w < workers; ++w) {
    all.insert(all.end(), parts_[w].known.begin(), parts_[w].known.end());
  }
  std::sort(all.begin(), all.end());
  for (const auto& [token, logit] : all) {
    result.tokens.push_back(token);
    result.logits.push_back(logit);
  }
}

void TwoStageHead::Run(Worker& worker, const LinearInput& input,
                       std::span<const CandidateSearch> searches,
                       std::span<Candidates* const> results) {
  const size_t rows = exact_->rows(), tokens = searches.size();
  HeadActs& acts = acts_.front();
  const Range own_tokens = worker.Share(tokens);
  for (size_t t = own_tokens.begin; t < own_tokens.end; ++t) {
    const float* x = input.floats() + t * input.stride();
    finite_[t] = acts.Quantize(x, t);
    results[t]->input.assign(x, x + exact_->cols());
  }
  worker.Barrier();
  const Range panels = worker.Share(quantized_.panels());
  const Range own = {std::min(panels.begin * kHeadPanelRows, rows),
                     std::min(panels.end * kHeadPanelRows, rows)};
  HeadUpperBounds(quantized_, acts, tokens, panels.begin, panels.end, bounds_.data(), rows);
  Part& part = parts_[worker.index()];
  for (size_t t = 0; t < tokens; ++t) {
    const float* x = input.floats() + t * input.stride();
    float* bounds = bounds_.data() + t * rows;
    for (size_t row = own.begin; row < own.end; ++row) {
      if (std::isnan(bounds[row])) bounds[row] = kInfinity;  // of norms that overflow
    }
    if (finite_[t] != 0) Guess(part, searches[t], bounds, own, x);
    worker.Barrier();
    const bool finite = finite_[t] != 0;
    Collect(part, bounds, own, finite ? Threshold(part, worker.count(), searches[t]) : -kInfinity);
    part.too_many |= !finite;
    worker.Barrier();
    bool complete = false;
    for (size_t w = 0; w < worker.count(); ++w) complete |= parts_[w].too_many;
    Candidates& result = *results[t];
    if (worker.index() == 0) {
      result.complete = complete;
      result.tokens.clear();
      result.logits.resize(complete ? rows : 0);
    }
    worker.Barrier();
    if (complete) {
      DenseLinear(*exact_, x, 1, input.stride(), own.begin, own.end, result.logits.data(), rows);
    } else {
      Finish(part, x);
    }
    worker.Barrier();
    if (worker.index() == 0) {
      if (!complete) Gather(worker.count(), result);
      ++counts_.searches;
      counts_.fallbacks += complete ? 1 : 0;
      counts_.rows += result.tokens.size();
    }
    worker.Barrier();  // the parts are free again
  }
}

}  // namespace tf
