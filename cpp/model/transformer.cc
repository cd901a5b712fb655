// SPDX-License-Identifier: Apache-2.0
// The forward pass. All workers walk through the layers together; a barrier ends each step.
#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "base/check.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/dense_linear.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"

namespace tf {
namespace {

ModelSpec Validated(ModelSpec spec) {
  spec.Validate();
  return spec;
}

// The largest value of a size over all layers.
template <typename SizeOf>
size_t Largest(const ModelSpec& spec, SizeOf size_of) {
  size_t largest = 0;
  for (const LayerSpec& layer : spec.layers) largest = std::max<size_t>(largest, size_of(layer));
  return largest;
}

size_t QuerySize(const LayerSpec& layer) { return layer.heads * layer.head_dim; }
size_t KvSize(const LayerSpec& layer) { return layer.kv_heads * layer.head_dim; }
size_t FfnSize(const LayerSpec& layer) { return layer.ffn_size; }
size_t HeadDim(const LayerSpec& layer) { return layer.head_dim; }

void Add(const float* delta, float scale, size_t size, float* x) {
  for (size_t i = 0; i < size; ++i) x[i] += scale * delta[i];
}

// A bias may be empty.
void AddBias(const AlignedArray<float>& bias, float* x) { Add(bias.data(), 1, bias.size(), x); }

auto FunctionOf(Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return ReluMultiply;
    case Activation::kReluSquared:
      return ReluSquaredMultiply;
    case Activation::kGelu:
      return GeluMultiply;
    case Activation::kGeluErf:
      return GeluErfMultiply;
    default:
      return SiluMultiply;
  }
}

bool SameRotation(const LayerSpec& a, const LayerSpec& b) {
  return a.rotation == b.rotation && a.rotation_scale == b.rotation_scale;
}

}  // namespace

Transformer::Transformer(ModelSpec spec, std::map<std::string, PackedTensor> tensors,
                         Adapters adapters, ActivationMode mode, size_t threads)
    : spec_(Validated(std::move(spec))),
      team_(threads),
      weights_(TakeWeights(spec_, std::move(tensors), std::move(adapters), team_)),
      mode_(mode),
      cache_(std::make_shared<KvCache>(spec_)),
      hidden_(kMaxTokens, spec_.hidden_size),
      query_(kMaxTokens, Largest(spec_, QuerySize)),
      key_(kMaxTokens, Largest(spec_, KvSize)),
      value_(kMaxTokens, Largest(spec_, KvSize)),
      gate_(kMaxTokens, Largest(spec_, FfnSize)),
      up_(kMaxTokens, Largest(spec_, FfnSize)),
      ones_(Largest(spec_, FfnSize)),
      delta_(kMaxTokens, spec_.hidden_size),
      angles_(kMaxTokens, Largest(spec_, HeadDim)),
      input_(kMaxTokens,
             std::max({spec_.hidden_size, Largest(spec_, QuerySize), Largest(spec_, FfnSize)})),
      reduced_(kMaxTokens, kMaxProducts * weights_.MaxRank()),
      adapter_sums_(weights_.MaxRank() == 0 ? 0 : kMaxTokens, input_.stride()) {
  std::fill_n(ones_.data(), ones_.size(), 1.0f);
  for (size_t i = 0; i < threads; ++i) scores_.emplace_back(spec_.context_length);
}

size_t Transformer::kv_bytes_per_token() const {
  size_t bytes = 0;
  for (const LayerSpec& layer : spec_.layers) bytes += 2 * KvSize(layer) * sizeof(float);
  return bytes;
}

void Transformer::TimeParts(bool on) {
  const std::lock_guard lock(mutex_);
  clock_.Use(on);
}

double Transformer::SecondsOf(Part part) {
  const std::lock_guard lock(mutex_);
  return clock_.seconds(part);
}

size_t Transformer::LogitRows(TokenBatch batch, LogitsWanted wanted) {
  if (wanted == LogitsWanted::kNone) return 0;
  if (wanted == LogitsWanted::kLast) return batch.size();
  size_t rows = 0;
  for (const BatchItem& item : batch) rows += item.tokens.size();
  return rows;
}

void Transformer::CheckBatch(TokenBatch batch) const {
  std::set<const SequenceState*> states;
  for (const BatchItem& item : batch) {
    Check(!item.tokens.empty(), "[forward] every sequence of a batch has at least one new token");
    Check(item.state->cache() == cache_.get(), "[forward] the sequence belongs to another model");
    Check(states.insert(item.state).second, "[forward] a sequence may be in a batch only once");
    Check(item.state->length() + item.tokens.size() <= spec_.context_length,
          "[forward] the context holds ", spec_.context_length, " tokens, the sequence would have ",
          item.state->length() + item.tokens.size());
    for (const int32_t token : item.tokens) {
      Check(token >= 0 && static_cast<size_t>(token) < spec_.vocab_size,
            "[forward] a token id lies in 0 .. ", spec_.vocab_size - 1, ", got ", token);
    }
  }
}

void Transformer::Forward(TokenBatch batch, LogitsWanted wanted, std::span<float> logits) {
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckBatch(batch);
  Check(logits.size() == LogitRows(batch, wanted) * spec_.vocab_size, "[forward] room for ",
        LogitRows(batch, wanted) * spec_.vocab_size, " logits is needed, got ", logits.size());
  std::vector<Position> positions;
  float* next_logits = logits.data();
  for (const BatchItem& item : batch) {
    const size_t before = item.state->length();
    item.state->Extend(item.tokens.size());
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      const bool wants = wanted == LogitsWanted::kAll ||
                         (wanted == LogitsWanted::kLast && i + 1 == item.tokens.size());
      positions.push_back({item.tokens[i], item.state, before + i, wants ? next_logits : nullptr});
      if (wants) next_logits += spec_.vocab_size;
    }
  }
  for (size_t begin = 0; begin < positions.size(); begin += kMaxTokens) {
    RunSlice(std::span(positions).subspan(begin, std::min(kMaxTokens, positions.size() - begin)));
  }
}

void Transformer::RunSlice(std::span<const Position> slice) {
  // Below this many multiply-adds in a layer, waiting for one more worker takes longer than it
  // saves.
  constexpr size_t kWorkPerWorker = size_t{1} << 20;
  const size_t work = slice.size() * (weights_.Parameters() / spec_.layers.size());
  const Team team(std::clamp<size_t>(work / kWorkPerWorker, 1, team_.threads()));
  clock_.Begin();
  team.Run([&](Worker& worker) {
    const Range share = worker.Share(slice.size());
    for (size_t t = share.begin; t < share.end; ++t) Embed(slice[t], t);
    for (size_t layer = 0; layer < spec_.layers.size(); ++layer) RunLayer(worker, layer, slice);
    RunHead(worker, slice);
    clock_.Mark(worker, Part::kHead);
  });
}

// Starts the residual stream of one token.
void Transformer::Embed(const Position& position, size_t row) {
  const std::span<float> hidden(hidden_[row], spec_.hidden_size);
  CopyRow(weights_.embedding, static_cast<size_t>(position.token), hidden.data());
  for (float& value : hidden) value *= spec_.embedding_scale;
  if (!spec_.position_embedding) return;
  CopyRow(weights_.position_embedding, position.position, delta_[row]);
  Add(delta_[row], 1, hidden.size(), hidden.data());
}

// Makes row `token` of the input ready for linear layers.
void Transformer::Prepare(size_t token, size_t cols) {
  if (mode_ == ActivationMode::kInt8) input_.Quantize(token, cols);
}

// The weights may be empty: no norm.
void Transformer::Norm(const NormWeights& weights, const float* x, float* out) const {
  const AlignedArray<float>&weight = weights.weight, &bias = weights.bias;
  if (weight.size() == 0) return;
  if (bias.size() == 0) {
    RmsNorm(x, weight.data(), weight.size(), spec_.norm_epsilon, out);
  } else {
    LayerNorm(x, weight.data(), bias.data(), weight.size(), spec_.norm_epsilon, out);
  }
}

// Waits for the input of all tokens, and at the end for all results.
void Transformer::RunProducts(Worker& worker, std::span<const Product> products, size_t tokens) {
  worker.Barrier();
  clock_.Mark(worker, Part::kRest);
  LinearJob jobs[2 * kMaxProducts];
  size_t count = 0;
  for (const auto& [linear, out] : products) {
    jobs[count++] = {&linear->weight, (*out)[0], out->stride};
  }
  float* reduced = reduced_[0];
  for (const auto& [linear, out] : products) {
    if (linear->adapter.a.empty()) continue;
    jobs[count++] = {&linear->adapter.a, reduced, reduced_.stride};
    reduced += linear->adapter.a.rows();
  }
  RunLinears(worker, std::span(jobs).first(count), input_, tokens, mode_);
  reduced = reduced_[0];
  for (const auto& [linear, out] : products) {
    if (linear->adapter.a.empty()) continue;
    worker.Barrier();  // all of A x is there, and nobody reads the sums of the adapter before
    AddAdapter(worker, linear->adapter, reduced, reduced_.stride, tokens, adapter_sums_[0],
               (*out)[0], out->stride);
    reduced += linear->adapter.a.rows();
  }
  worker.Barrier();
  clock_.Mark(worker, Part::kMatmul);
}

// Enters and leaves with every worker owning its share of the tokens' hidden rows.
void Transformer::RunLayer(Worker& worker, size_t index, std::span<const Position> slice) {
  const LayerSpec& layer = spec_.layers[index];
  LayerWeights& weights = weights_.layers[index];
  const size_t tokens = slice.size(), hidden = spec_.hidden_size;
  const Range share = worker.Share(tokens);

  for (size_t t = share.begin; t < share.end; ++t) {
    Norm(weights.attention_norm, hidden_[t], input_.Row(t));
    Prepare(t, hidden);
  }
  const Product projections[kMaxProducts] = {{&weights.query, &query_},
                                             {&weights.key, &key_},
                                             {&weights.value, &value_},
                                             {&weights.up, &up_},
                                             {&weights.gate, &gate_}};
  const std::span<const Product> attention = std::span(projections).first(3);
  const std::span<const Product> ffn = std::span(projections).subspan(3, layer.gated ? 2 : 1);
  const std::span<const Product> both = std::span(projections).first(3 + ffn.size());
  RunProducts(worker, layer.parallel ? both : attention, tokens);
  for (size_t t = share.begin; t < share.end; ++t) FinishProjections(index, slice[t], t);
  worker.Barrier();
  clock_.Mark(worker, Part::kRest);
  RunAttention(worker, index, slice);
  worker.Barrier();
  clock_.Mark(worker, Part::kAttention);
  for (size_t t = share.begin; t < share.end; ++t) {
    Norm(weights.attention_sub_norm, input_.Row(t), input_.Row(t));
    Prepare(t, QuerySize(layer));
  }
  const Product output[] = {{&weights.output, &delta_}};
  RunProducts(worker, output, tokens);
  for (size_t t = share.begin; t < share.end; ++t) {
    AddBias(weights.output.bias, delta_[t]);
    Norm(weights.attention_post_norm, delta_[t], delta_[t]);
    Add(delta_[t], layer.residual_scale, hidden, hidden_[t]);
    if (layer.parallel) continue;
    Norm(weights.ffn_norm, hidden_[t], input_.Row(t));
    Prepare(t, hidden);
  }
  if (!layer.parallel) RunProducts(worker, ffn, tokens);
  const auto activate = FunctionOf(layer.activation);
  for (size_t t = share.begin; t < share.end; ++t) {
    AddBias(weights.up.bias, up_[t]);
    if (layer.gated) {
      AddBias(weights.gate.bias, gate_[t]);
      activate(gate_[t], up_[t], layer.ffn_size, input_.Row(t));
    } else {
      activate(up_[t], ones_.data(), layer.ffn_size, input_.Row(t));
    }
    Norm(weights.ffn_sub_norm, input_.Row(t), input_.Row(t));
    Prepare(t, layer.ffn_size);
  }
  const Product down[] = {{&weights.down, &delta_}};
  RunProducts(worker, down, tokens);
  for (size_t t = share.begin; t < share.end; ++t) {
    AddBias(weights.down.bias, delta_[t]);
    Norm(weights.ffn_post_norm, delta_[t], delta_[t]);
    Add(delta_[t], layer.residual_scale, hidden, hidden_[t]);
  }
  clock_.Mark(worker, Part::kRest);
}

// Adds biases to the query, key and value of one token, normalises and rotates them, and stores key
// and value in the cache.
void Transformer::FinishProjections(size_t index, const Position& position, size_t row) {
  const LayerSpec& layer = spec_.layers[index];
  const LayerWeights& weights = weights_.layers[index];
  AddBias(weights.query.bias, query_[row]);
  AddBias(weights.key.bias, key_[row]);
  AddBias(weights.value.bias, value_[row]);
  const size_t pairs = layer.rotation.size();
  float* cos = angles_[row];
  float* sin = cos + pairs;
  if (index == 0 || !SameRotation(layer, spec_.layers[index - 1])) {
    for (size_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(position.position) * layer.rotation[i];
      cos[i] = std::cos(angle) * layer.rotation_scale;
      sin[i] = std::sin(angle) * layer.rotation_scale;
    }
  }
  for (size_t head = 0; head < layer.heads; ++head) {
    float* query = query_[row] + head * layer.head_dim;
    Norm(weights.query_norm, query, query);
    RotateHalves(query, cos, sin, pairs);
  }
  float* block = position.state->blocks()[position.position / kKvBlockTokens];
  const size_t slot = position.position % kKvBlockTokens * layer.head_dim;
  for (size_t head = 0; head < layer.kv_heads; ++head) {
    float* key = key_[row] + head * layer.head_dim;
    Norm(weights.key_norm, key, key);
    RotateHalves(key, cos, sin, pairs);
    std::memcpy(block + cache_->KeyOffset(index, head) + slot, key, layer.head_dim * sizeof(float));
    std::memcpy(block + cache_->ValueOffset(index, head) + slot,
                value_[row] + head * layer.head_dim, layer.head_dim * sizeof(float));
  }
}

// Writes the heads' outputs into the input of the output projection.
void Transformer::RunAttention(Worker& worker, size_t index, std::span<const Position> slice) {
  const LayerSpec& layer = spec_.layers[index];
  float* scores = scores_[worker.index()].data();
  // Later tokens see more keys, so workers take turns instead of contiguous shares.
  for (size_t task = worker.index(); task < slice.size() * layer.heads; task += worker.count()) {
    const size_t row = task / layer.heads, head = task % layer.heads;
    const size_t kv_head = head / (layer.heads / layer.kv_heads);
    float* const* blocks = slice[row].state->blocks().data();
    const KvHead keys = {blocks, cache_->KeyOffset(index, kv_head), layer.head_dim};
    const KvHead values = {blocks, cache_->ValueOffset(index, kv_head), layer.head_dim};
    const size_t end = slice[row].position + 1;
    const size_t begin = layer.window != 0 && end > layer.window ? end - layer.window : 0;
    AttendHead(query_[row] + head * layer.head_dim, keys, values,
               {begin, end, layer.attention_scale, layer.attention_soft_cap}, scores,
               input_.Row(row) + head * layer.head_dim);
  }
}

void Transformer::RunHead(Worker& worker, std::span<const Position> slice) {
  // Rows whose logits are wanted move to the front of the input; `rows` is the same for every
  // worker.
  size_t rows = 0;
  for (size_t t = 0; t < slice.size(); ++t) {
    if (slice[t].logits == nullptr) continue;
    const Range share = worker.Share(slice.size());
    if (share.begin <= t && t < share.end) {
      Norm(weights_.final_norm, hidden_[t], input_.Row(rows));
      if (weights_.head.alphabet() == Alphabet::kTrit) Prepare(rows, spec_.hidden_size);
    }
    ++rows;
  }
  if (rows == 0) return;
  worker.Barrier();
  // The wanted logits of one slice lie one after the other.
  const auto first = std::find_if(slice.begin(), slice.end(),
                                  [](const Position& p) { return p.logits != nullptr; });
  const LinearJob head[] = {{&weights_.head, first->logits, spec_.vocab_size}};
  RunLinears(worker, head, input_, rows, mode_);
  if (spec_.head_bias) {
    worker.Barrier();
    const Range share = worker.Share(rows);
    for (size_t row = share.begin; row < share.end; ++row) {
      AddBias(weights_.head_bias, first->logits + row * spec_.vocab_size);
    }
  }
  if (spec_.logit_soft_cap == 0.0f) return;
  worker.Barrier();
  const Range share = worker.Share(rows * spec_.vocab_size);
  SoftCap(first->logits + share.begin, share.end - share.begin, spec_.logit_soft_cap);
}

}  // namespace tf
