// SPDX-License-Identifier: Apache-2.0
// The key-value cache: blocks of a few tokens, handed out to sequences and taken back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "base/aligned.h"
#include "kernels/attention.h"
#include "model/spec.h"

namespace tf {

// All blocks of one model. A block holds the keys and values of kKvBlockTokens tokens for every
// layer and KV head: layer after layer, keys before values, head after head, token after token.
class KvCache {
 public:
  KvCache(const ModelSpec& spec, KvType type);

  KvType type() const { return type_; }
  // What one token takes.
  size_t bytes_per_token() const { return block_bytes_ / kKvBlockTokens; }

  size_t block_bytes() const { return block_bytes_; }

  // Bytes from the start of a block to the keys (or the values) of one head.
  size_t KeyOffset(size_t layer, size_t kv_head) const;
  size_t ValueOffset(size_t layer, size_t kv_head) const;

  uint8_t* Acquire();
  void Release(uint8_t* block);

 private:
  struct LayerPlace {
    size_t offset, kv_heads, head_bytes;
  };
  KvType type_;
  std::vector<LayerPlace> layers_;
  size_t block_bytes_ = 0;
  std::mutex mutex_;
  std::vector<AlignedArray<uint8_t>> slabs_;  // of several blocks
  size_t blocks_ = 0;                         // in all slabs
  std::vector<uint8_t*> free_;
};

// What the model remembers of one sequence: its length and its blocks. Not copyable; gives its
// blocks back at the end.
class SequenceState {
 public:
  explicit SequenceState(std::shared_ptr<KvCache> cache) : cache_(std::move(cache)) {}
  ~SequenceState() { Truncate(0); }
  SequenceState(const SequenceState&) = delete;
  SequenceState& operator=(const SequenceState&) = delete;

  size_t length() const { return length_; }
  const std::vector<uint8_t*>& blocks() const { return blocks_; }
  const KvCache* cache() const { return cache_.get(); }

  // Makes room for `tokens` more, then counts them as present.
  void Extend(size_t tokens);
  // Extends to `length` tokens that repeat the keys and values of those present: what attention
  // costs does not depend on them, so that measuring it at a long context needs no long prompt.
  // Throws std::invalid_argument unless whole blocks are present, and no more than `length` tokens.
  void Repeat(size_t length);
  // Rolls back to the first `length` tokens; throws std::invalid_argument when there are fewer.
  void Truncate(size_t length);

 private:
  std::shared_ptr<KvCache> cache_;
  std::vector<uint8_t*> blocks_;
  size_t length_ = 0;
};

}  // namespace tf
