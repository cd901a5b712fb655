// SPDX-License-Identifier: Apache-2.0
// Attention of one query head: scores of all tokens, their exponentials, the weighted sum of
// values.
#include "kernels/attention.h"

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/softmax-inl.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Keys whose sums are formed together: as many as the registers hold, at most the four that
// StoreFourSums takes.
inline constexpr size_t kKeysAtOnce = kParts == 1 ? 4 : kParts == 2 ? 2 : 1;

// Four-lane sums of query times kKeys neighbouring keys.
template <size_t kKeys>
HWY_INLINE void DotKeys(const float* query, const float* keys, size_t head_dim, FourLanes* sums) {
  const size_t whole = head_dim - head_dim % kLanes;
  const size_t rest = head_dim - whole;
  Lanes sum[kKeys];
  for (size_t k = 0; k < kKeys; ++k) sum[k] = ZeroLanes();
  for (size_t i = 0; i < whole; i += kLanes) {
    const Lanes q = Load(query + i);
    for (size_t k = 0; k < kKeys; ++k) sum[k] = MulAdd(q, Load(keys + k * head_dim + i), sum[k]);
  }
  if (rest != 0) {
    const Lanes q = LoadFirst(query + whole, rest);
    for (size_t k = 0; k < kKeys; ++k) {
      sum[k] = MulAdd(q, LoadFirst(keys + k * head_dim + whole, rest), sum[k]);
    }
  }
  for (size_t k = 0; k < kKeys; ++k) sums[k] = SumToFour(sum[k]);
}

// scores[t] = <query, key t> for the `count` keys of one block.
HWY_INLINE void ScoreBlock(const float* query, const float* keys, size_t head_dim, size_t count,
                           float* scores) {
  size_t t = 0;
  for (; t + 4 <= count; t += 4) {
    FourLanes sums[4];
    for (size_t k = 0; k < 4; k += kKeysAtOnce) {
      DotKeys<kKeysAtOnce>(query, keys + (t + k) * head_dim, head_dim, sums + k);
    }
    StoreFourSums(sums[0], sums[1], sums[2], sums[3], scores + t);
  }
  for (; t < count; ++t) {
    FourLanes sum;
    DotKeys<1>(query, keys + t * head_dim, head_dim, &sum);
    scores[t] = SumFour(sum);
  }
}

// out[0 .. 16 kChunks) += sum over the tokens of one block of weight * value, in token order.
template <size_t kChunks>
HWY_INLINE void AddValues(const float* weights, const float* values, size_t head_dim, size_t count,
                          float* out) {
  Lanes sum[kChunks];
  for (size_t c = 0; c < kChunks; ++c) sum[c] = Load(out + c * kLanes);
  for (size_t t = 0; t < count; ++t) {
    const Lanes weight = Broadcast(weights[t]);
    const float* value = values + t * head_dim;
    for (size_t c = 0; c < kChunks; ++c) sum[c] = MulAdd(weight, Load(value + c * kLanes), sum[c]);
  }
  for (size_t c = 0; c < kChunks; ++c) Store(sum[c], out + c * kLanes);
}

HWY_INLINE void AddBlock(const float* weights, const float* values, size_t head_dim, size_t count,
                         float* out) {
  constexpr size_t kChunks = kParts > 8 ? 1 : 8 / kParts;  // eight sums hide the latency of one
  size_t i = 0;
  for (; i + kChunks * kLanes <= head_dim; i += kChunks * kLanes) {
    AddValues<kChunks>(weights, values + i, head_dim, count, out + i);
  }
  for (; i + kLanes <= head_dim; i += kLanes) {
    AddValues<1>(weights, values + i, head_dim, count, out + i);
  }
  const size_t rest = head_dim - i;
  if (rest == 0) return;
  Lanes sum = LoadFirst(out + i, rest);
  for (size_t t = 0; t < count; ++t) {
    sum = MulAdd(Broadcast(weights[t]), LoadFirst(values + t * head_dim + i, rest), sum);
  }
  StoreFirst(sum, out + i, rest);
}

HWY_INLINE const float* TokenOf(const KvHead& head, size_t token) {
  return head.blocks[token / kKvBlockTokens] + head.offset + token % kKvBlockTokens * head.head_dim;
}

// Calls run(token, count) for the parts of `span` that lie in one block each.
template <typename Function>
HWY_INLINE void ForEachBlock(const AttentionSpan& span, Function run) {
  size_t count = 0;
  for (size_t t = span.begin; t < span.end; t += count) {
    count = HWY_MIN(kKvBlockTokens - t % kKvBlockTokens, span.end - t);
    run(t, count);
  }
}

void AttendHead(const float* query, const KvHead& keys, const KvHead& values,
                const AttentionSpan& span, float* scores, float* out) {
  ForEachBlock(span, [&](size_t t, size_t count) HWY_ATTR {
    ScoreBlock(query, TokenOf(keys, t), keys.head_dim, count, scores + (t - span.begin));
  });
  const size_t length = span.end - span.begin;
  for (size_t t = 0; t < length; ++t) scores[t] *= span.scale;
  if (span.soft_cap != 0.0f) CapSoftly(scores, length, span.soft_cap);
  const float sum = SumExp<true>(scores, length, MaxValue(scores, length), scores);

  const size_t head_dim = values.head_dim;
  for (size_t i = 0; i < head_dim; ++i) out[i] = 0.0f;
  ForEachBlock(span, [&](size_t t, size_t count) HWY_ATTR {
    AddBlock(scores + (t - span.begin), TokenOf(values, t), head_dim, count, out);
  });
  for (size_t i = 0; i < head_dim; ++i) out[i] /= sum;
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(AttendHead);

void AttendHead(const float* query, const KvHead& keys, const KvHead& values,
                const AttentionSpan& span, float* scores, float* out) {
  HWY_DYNAMIC_DISPATCH(AttendHead)(query, keys, values, span, scores, out);
}

}  // namespace tf
#endif  // HWY_ONCE
