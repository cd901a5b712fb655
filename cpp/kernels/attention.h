// SPDX-License-Identifier: Apache-2.0
// Scaled dot-product attention of one query head over a key-value cache that lies in blocks.
#pragma once

#include <cstddef>

namespace tf {

inline constexpr size_t kKvBlockTokens = 32;

// The keys or values of one layer and one KV head of one sequence: token t lies at
// blocks[t / kKvBlockTokens] + offset + (t % kKvBlockTokens) * head_dim.
struct KvHead {
  const float* const* blocks;
  size_t offset;  // floats
  size_t head_dim;
};

// Which tokens a query sees and how scores are shaped.
struct AttentionSpan {
  size_t begin;    // the first token seen: not 0 behind a sliding window
  size_t end;      // one past the last token seen
  float scale;     // of the dot products
  float soft_cap;  // scores become soft_cap * tanh(score / soft_cap); 0: they stay
};

// out[d] = sum_t softmax_t(<query, key_t>, scaled and capped) * value_t[d] over the tokens of
// `span`. `scores` is scratch for span.end - span.begin floats. The order of every sum depends on
// the number of tokens and `head_dim` only: dot products and softmax in the fixed order of 16
// lanes, values added in token order.
void AttendHead(const float* query, const KvHead& keys, const KvHead& values,
                const AttentionSpan& span, float* scores, float* out);

}  // namespace tf
