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
#include "kernels/tile_choice.h"

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
size_t PartsSize(const LayerSpec& layer) { return layer.heads * AttentionPartSize(layer.head_dim); }

// Slices of at most this many tokens share out attention by chunks of the context too.
constexpr size_t kSplitTokens = 4;

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
                         Adapters adapters, ActivationMode mode, KvType kv, HeadMode head,
                         size_t threads, std::optional<Layout> tiles)
    : spec_(Validated(std::move(spec))),
      team_(threads),
      weights_(TakeWeights(
          spec_, std::move(tensors), std::move(adapters),
          [&](size_t weights) { return tiles ? *tiles : FastestTiles(weights, mode, team_); },
          team_)),
      mode_(mode),
      cache_(std::make_shared<KvCache>(spec_, kv)),
      head_mode_(head),
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
      adapter_sums_(weights_.MaxRank() == 0 ? 0 : kMaxTokens, input_.stride()),
      attention_parts_(kSplitTokens * AttentionSpan{0, spec_.context_length, 0, 0}.Chunks() *
                       Largest(spec_, PartsSize)) {
  std::fill_n(ones_.data(), ones_.size(), 1.0f);
  CheckCols(mode, input_.stride());
  weights_.CheckSums(mode);
  const size_t scratch = Largest(spec_, [](const LayerSpec& layer) {
    return AttentionScratch(layer.heads / layer.kv_heads, layer.head_dim);
  });
  for (size_t i = 0; i < threads; ++i) attention_scratch_.emplace_back(scratch);
  MakeHead();
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
      positions.push_back({item.tokens[i], item.state, before + i, wants ? next_logits : nullptr,
                           nullptr, nullptr});
      if (wants) next_logits += spec_.vocab_size;
    }
  }
  RunSlices(positions);
}

void Transformer::RunSlices(std::span<const Position> positions) {
  for (size_t begin = 0; begin < positions.size(); begin += kMaxTokens) {
    RunSlice(positions.subspan(begin, std::min(kMaxTokens, positions.size() - begin)));
  }
}

void Transformer::RunSlice(std::span<const Position> slice) {
  // Below this many multiply-adds in a layer, waiting for one more worker takes longer than it
  // saves.
  constexpr size_t kWorkPerWorker = size_t{1} << 20;
  const size_t work = slice.size() * (weights_.Parameters() / spec_.layers.size());
  searches_.clear();
  candidates_.clear();
  for (const Position& position : slice) {
    if (position.candidates == nullptr) continue;
    searches_.push_back(*position.search);
    candidates_.push_back(position.candidates);
  }
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

// Makes row `token` of `tokens` of the input ready for linear layers.
void Transformer::Prepare(size_t token, size_t tokens, size_t cols) {
  input_.Quantize(mode_, token, tokens, cols);
}

// Leaves a copy of row `token` of the input where a tap asks for it.
void Transformer::Tap(std::span<float> Taps::* tap, size_t token, size_t cols) {
  if (taps_ == nullptr || (taps_->*tap).empty()) return;
  std::copy_n(input_.Row(token), cols, (taps_->*tap).data() + (tapped_ + token) * cols);
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
    Tap(&Taps::query, t, hidden);
    if (layer.parallel) Tap(&Taps::up, t, hidden);
    Prepare(t, tokens, hidden);
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
    Tap(&Taps::output, t, QuerySize(layer));
    Prepare(t, tokens, QuerySize(layer));
  }
  const Product output[] = {{&weights.output, &delta_}};
  RunProducts(worker, output, tokens);
  for (size_t t = share.begin; t < share.end; ++t) {
    AddBias(weights.output.bias, delta_[t]);
    Norm(weights.attention_post_norm, delta_[t], delta_[t]);
    Add(delta_[t], layer.residual_scale, hidden, hidden_[t]);
    if (layer.parallel) continue;
    Norm(weights.ffn_norm, hidden_[t], input_.Row(t));
    Tap(&Taps::up, t, hidden);
    Prepare(t, tokens, hidden);
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
    Tap(&Taps::down, t, layer.ffn_size);
    Prepare(t, tokens, layer.ffn_size);
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
  if (index == first_layer_ || !SameRotation(layer, spec_.layers[index - 1])) {
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
  uint8_t* block = position.state->blocks()[position.position / kKvBlockTokens];
  const size_t slot = position.position % kKvBlockTokens;
  for (size_t head = 0; head < layer.kv_heads; ++head) {
    float* key = key_[row] + head * layer.head_dim;
    Norm(weights.key_norm, key, key);
    RotateHalves(key, cos, sin, pairs);
    StoreKv(cache_->type(), key, layer.head_dim, slot, block + cache_->KeyOffset(index, head));
    StoreKv(cache_->type(), value_[row] + head * layer.head_dim, layer.head_dim, slot,
            block + cache_->ValueOffset(index, head));
  }
}

// The query heads of one token that share a KV head.
AttentionGroup Transformer::GroupOf(size_t index, const Position& position, size_t row,
                                    size_t kv_head) {
  const LayerSpec& layer = spec_.layers[index];
  const size_t heads = layer.heads / layer.kv_heads;
  const uint8_t* const* blocks = position.state->blocks().data();
  const size_t end = position.position + 1;
  const size_t begin = layer.window != 0 && end > layer.window ? end - layer.window : 0;
  return {
      .type = cache_->type(),
      .head_dim = layer.head_dim,
      .heads = heads,
      .queries = query_[row] + kv_head * heads * layer.head_dim,
      .keys = {blocks, cache_->KeyOffset(index, kv_head)},
      .values = {blocks, cache_->ValueOffset(index, kv_head)},
      .span = {begin, end, layer.attention_scale, layer.attention_soft_cap},
  };
}

// Writes the heads' outputs into the input of the output projection.
void Transformer::RunAttention(Worker& worker, size_t index, std::span<const Position> slice) {
  if (slice.size() <= kSplitTokens && worker.count() > 1) {
    return AttendByChunks(worker, index, slice);
  }
  const LayerSpec& layer = spec_.layers[index];
  float* scratch = attention_scratch_[worker.index()].data();
  // Later tokens see more keys, so workers take turns instead of contiguous shares.
  for (size_t task = worker.index(); task < slice.size() * layer.kv_heads; task += worker.count()) {
    const size_t row = task / layer.kv_heads, kv_head = task % layer.kv_heads;
    const AttentionGroup group = GroupOf(index, slice[row], row, kv_head);
    AttendAll(group, scratch, input_.Row(row) + kv_head * group.heads * layer.head_dim);
  }
}

// The same result with more to share out than tokens times KV heads: chunks of the context are
// computed apart and merged in their order after a barrier.
void Transformer::AttendByChunks(Worker& worker, size_t index, std::span<const Position> slice) {
  const LayerSpec& layer = spec_.layers[index];
  const size_t part_size = AttentionPartSize(layer.head_dim);
  const size_t row_stride = attention_parts_.size() / kSplitTokens;
  const auto parts = [&](size_t row, size_t chunk, size_t head) {
    return attention_parts_.data() + row * row_stride + (chunk * layer.heads + head) * part_size;
  };
  float* scratch = attention_scratch_[worker.index()].data();
  size_t task = 0;
  for (size_t row = 0; row < slice.size(); ++row) {
    for (size_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head) {
      const AttentionGroup group = GroupOf(index, slice[row], row, kv_head);
      for (size_t chunk = 0; chunk < group.span.Chunks(); ++chunk, ++task) {
        if (task % worker.count() != worker.index()) continue;
        AttendChunk(group, chunk, scratch, parts(row, chunk, kv_head * group.heads));
      }
    }
  }
  worker.Barrier();
  for (size_t item = worker.index(); item < slice.size() * layer.heads; item += worker.count()) {
    const size_t row = item / layer.heads, head = item % layer.heads;
    const size_t chunks = GroupOf(index, slice[row], row, 0).span.Chunks();
    for (size_t chunk = 1; chunk < chunks; ++chunk) {
      MergeAttention(parts(row, chunk, head), layer.head_dim, parts(row, 0, head));
    }
    FinishAttention(parts(row, 0, head), layer.head_dim, input_.Row(row) + head * layer.head_dim);
  }
}

void Transformer::RunHead(Worker& worker, std::span<const Position> slice) {
  // Rows whose logits are wanted move to the front of the input; `rows` is the same for every
  // worker.
  const auto wanted = static_cast<size_t>(
      std::count_if(slice.begin(), slice.end(), [](const Position& p) { return p.wants_head(); }));
  size_t rows = 0;
  for (size_t t = 0; t < slice.size(); ++t) {
    if (!slice[t].wants_head()) continue;
    const Range share = worker.Share(slice.size());
    if (share.begin <= t && t < share.end) {
      Norm(weights_.final_norm, hidden_[t], input_.Row(rows));
      if (IsTiles(weights_.head.layout())) Prepare(rows, wanted, spec_.hidden_size);
    }
    ++rows;
  }
  if (rows == 0) return;
  worker.Barrier();
  if (!searches_.empty()) {
    two_stage_head_.Run(worker, input_, searches_, candidates_);
    return;
  }
  // The wanted logits of one slice lie one after the other.
  const auto first = std::find_if(slice.begin(), slice.end(),
                                  [](const Position& p) { return p.logits != nullptr; });
  if (!quantized_head_.empty()) {
    RunQuantizedHead(worker, rows, first->logits);
  } else {
    const LinearJob head[] = {{&weights_.head, first->logits, spec_.vocab_size}};
    RunLinears(worker, head, input_, rows, mode_);
  }
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
