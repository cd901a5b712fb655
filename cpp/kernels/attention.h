// SPDX-License-Identifier: Apache-2.0
// Scaled dot-product attention over a key-value cache that lies in blocks of f32, f16 or int8.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tf {

inline constexpr size_t kKvBlockTokens = 32;
// Tokens whose scores exist at one time: the unit in which long contexts are cut and merged.
inline constexpr size_t kAttentionChunk = 512;

// How keys and values are stored.
enum class KvType : uint8_t {
  kF32,
  kF16,   // rounded to nearest even; magnitudes above 65504 become 65504
  kInt8,  // per token and head: codes -127 .. 127 and the scale max|x| / 127, off by scale / 2
};

// The keys (or values) of one layer and one KV head in one block: kKvBlockTokens rows of head_dim
// elements, then, for int8, kKvBlockTokens scales in f32. Bytes that this takes:
size_t KvHeadBytes(KvType type, size_t head_dim);

// Writes the key (or value) of one head as token `slot` of its part of a block.
void StoreKv(KvType type, const float* values, size_t head_dim, size_t slot, uint8_t* head);

// Where the keys or values of one layer and KV head of a sequence lie: token t is slot t %
// kKvBlockTokens of blocks[t / kKvBlockTokens] + offset (bytes).
struct KvHead {
  const uint8_t* const* blocks;
  size_t offset;
};

// Which tokens a query sees and how scores are shaped.
struct AttentionSpan {
  size_t begin;    // the first token seen: not 0 behind a sliding window
  size_t end;      // one past the last token seen
  float scale;     // of the dot products
  float soft_cap;  // scores become soft_cap * tanh(score / soft_cap); 0: they stay

  size_t Chunks() const { return (end - begin + kAttentionChunk - 1) / kAttentionChunk; }
};

// Query heads that share one KV head, at one token: every block is read once for all of them.
struct AttentionGroup {
  KvType type;
  size_t head_dim;
  size_t heads;
  const float* queries;  // heads x head_dim
  KvHead keys;
  KvHead values;
  AttentionSpan span;
};

// What attention over some of the tokens leaves of one head: head_dim sums of weight * value, then
// the largest score, then the sum of the weights exp(score - largest).
constexpr size_t AttentionPartSize(size_t head_dim) { return head_dim + 2; }

// The part of chunk `chunk` of the span, tokens span.begin + chunk * kAttentionChunk and on, for
// every head: heads x AttentionPartSize. `scores` is scratch for heads x kAttentionChunk floats.
// The order of every sum depends on the chunk's length and head_dim only: dot products and
// normaliser in the fixed order of 16 lanes, values added in token order.
void AttendChunk(const AttentionGroup& group, size_t chunk, float* scores, float* parts);

// Adds the part of the next chunk of one head to that of the chunks before.
void MergeAttention(const float* part, size_t head_dim, float* total);

// The output of one head once all chunks are merged, in their order.
void FinishAttention(const float* total, size_t head_dim, float* out);

// All chunks of a group, merged: out is heads x head_dim. `scratch` is for AttentionScratch floats.
void AttendAll(const AttentionGroup& group, float* scratch, float* out);
constexpr size_t AttentionScratch(size_t heads, size_t head_dim) {
  return heads * (kAttentionChunk + 2 * AttentionPartSize(head_dim));
}

}  // namespace tf
