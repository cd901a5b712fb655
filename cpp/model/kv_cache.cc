// SPDX-License-Identifier: Apache-2.0
// Blocks of the key-value cache; see kv_cache.h.
#include "model/kv_cache.h"

#include "base/check.h"
#include "kernels/attention.h"

namespace tf {

KvCache::KvCache(const ModelSpec& spec) {
  for (const LayerSpec& layer : spec.layers) {
    const size_t head_floats = kKvBlockTokens * layer.head_dim;
    layers_.push_back({block_floats_, layer.kv_heads, head_floats});
    block_floats_ += 2 * layer.kv_heads * head_floats;
  }
}

size_t KvCache::KeyOffset(size_t layer, size_t kv_head) const {
  const LayerPlace& place = layers_[layer];
  return place.offset + kv_head * place.head_floats;
}

size_t KvCache::ValueOffset(size_t layer, size_t kv_head) const {
  const LayerPlace& place = layers_[layer];
  return place.offset + (place.kv_heads + kv_head) * place.head_floats;
}

float* KvCache::Acquire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    blocks_.emplace_back(block_floats_);
    free_.reserve(blocks_.size());  // so that Release never allocates
    return blocks_.back().data();
  }
  float* block = free_.back();
  free_.pop_back();
  return block;
}

void KvCache::Release(float* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(block);
}

void SequenceState::Extend(size_t tokens) {
  while (blocks_.size() * kKvBlockTokens < length_ + tokens) blocks_.push_back(cache_->Acquire());
  length_ += tokens;
}

void SequenceState::Truncate(size_t length) {
  Check(length <= length_, "[sequence] cannot go back to ", length, " tokens, the sequence has ",
        length_);
  length_ = length;
  while (blocks_.size() * kKvBlockTokens >= length + kKvBlockTokens) {
    cache_->Release(blocks_.back());
    blocks_.pop_back();
  }
}

}  // namespace tf
