// SPDX-License-Identifier: Apache-2.0
// Blocks of the key-value cache; see kv_cache.h.
#include "model/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace tf {

KvCache::KvCache(const ModelSpec& spec, KvType type) : type_(type) {
  for (const LayerSpec& layer : spec.layers) {
    const size_t head_bytes = KvHeadBytes(type, layer.head_dim);
    layers_.push_back({block_bytes_, layer.kv_heads, head_bytes});
    block_bytes_ += 2 * layer.kv_heads * head_bytes;
  }
}

size_t KvCache::KeyOffset(size_t layer, size_t kv_head) const {
  const LayerPlace& place = layers_[layer];
  return place.offset + kv_head * place.head_bytes;
}

size_t KvCache::ValueOffset(size_t layer, size_t kv_head) const {
  const LayerPlace& place = layers_[layer];
  return place.offset + (place.kv_heads + kv_head) * place.head_bytes;
}

uint8_t* KvCache::Acquire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    constexpr size_t kSlabBytes = size_t{1} << 23;  // a few huge pages; touched when used
    const size_t count = std::max<size_t>(1, kSlabBytes / block_bytes_);
    slabs_.emplace_back(count * block_bytes_);
    blocks_ += count;
    free_.reserve(blocks_);  // so that Release never allocates
    for (size_t i = count; i > 0; --i) {
      free_.push_back(slabs_.back().data() + (i - 1) * block_bytes_);
    }
  }
  uint8_t* block = free_.back();
  free_.pop_back();
  return block;
}

void KvCache::Release(uint8_t* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(block);
}

void SequenceState::Extend(size_t tokens) {
  while (blocks_.size() * kKvBlockTokens < length_ + tokens) blocks_.push_back(cache_->Acquire());
  length_ += tokens;
}

void SequenceState::Repeat(size_t length) {
  const size_t present = blocks_.size();
  Check(length_ != 0 && length_ == present * kKvBlockTokens && length >= length_,
        "[sequence] repeating up to ", length, " tokens needs whole blocks of ", kKvBlockTokens,
        " tokens and no more than that, the sequence has ", length_);
  Extend(length - length_);
  for (size_t block = present; block < blocks_.size(); ++block) {
    std::memcpy(blocks_[block], blocks_[block % present], cache_->block_bytes());
  }
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
