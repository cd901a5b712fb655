// SPDX-License-Identifier: Apache-2.0
// Attention by chunks: scores of a chunk, their exponentials, the weighted sum of values; then
// chunks are merged under a common maximum.
#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/float16.h"
#include "simd/highway_targets.h"
// After highway_targets.h
#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/softmax-inl.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Register tiles of keys x queries; kKeysAtOnce divides four, the number that StoreFourSums takes.
#if HWY_TARGET == HWY_AVX3  // 32 registers, one per 16 lanes
inline constexpr size_t kKeysAtOnce = 4, kQueriesAtOnce = 4, kValueSums = 16;
#elif HWY_TARGET == HWY_AVX2     // 16 registers, two per 16 lanes
inline constexpr size_t kKeysAtOnce = 2, kQueriesAtOnce = 2, kValueSums = 4;
#elif HWY_TARGET == TF_HWY_NEON  // 32 registers, four per 16 lanes
inline constexpr size_t kKeysAtOnce = 2, kQueriesAtOnce = 2, kValueSums = 4;
#else                            // 16 registers, four per 16 lanes
inline constexpr size_t kKeysAtOnce = 1, kQueriesAtOnce = 2, kValueSums = 2;
#endif

// Four-lane sums of kQueries queries times kKeys neighbouring keys.
template <typename T, size_t kKeys, size_t kQueries>
HWY_INLINE void DotKeys(const float* queries, const T* keys, size_t head_dim,
                        FourLanes (*sums)[4]) {
  const size_t whole = head_dim - head_dim % kLanes;
  const size_t rest = head_dim - whole;
  Lanes sum[kQueries][kKeys];
  for (size_t q = 0; q < kQueries; ++q) {
    for (size_t k = 0; k < kKeys; ++k) sum[q][k] = ZeroLanes();
  }
  const auto add = [&](const Lanes* key, const Lanes& query, size_t q) HWY_ATTR {
    for (size_t k = 0; k < kKeys; ++k) sum[q][k] = MulAdd(query, key[k], sum[q][k]);
  };
  Lanes key[kKeys];
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t k = 0; k < kKeys; ++k) key[k] = Load(keys + k * head_dim + i);
    for (size_t q = 0; q < kQueries; ++q) add(key, Load(queries + q * head_dim + i), q);
  }
  if (rest != 0) {
    for (size_t k = 0; k < kKeys; ++k) key[k] = LoadFirst(keys + k * head_dim + whole, rest);
    for (size_t q = 0; q < kQueries; ++q) {
      add(key, LoadFirst(queries + q * head_dim + whole, rest), q);
    }
  }
  for (size_t q = 0; q < kQueries; ++q) {
    for (size_t k = 0; k < kKeys; ++k) sums[q][k] = SumToFour(sum[q][k]);
  }
}

// Blocks lie far apart, and memory reads ahead within a page only: without this, every block starts
// with a wait. `from` may be null.
HWY_INLINE void PrefetchBytes(const uint8_t* from, size_t size) {
  constexpr size_t kLine = 64;
  if (from == nullptr) return;
  for (size_t i = 0; i < size; i += kLine) hwy::Prefetch(from + i);
}

// scores[q * kAttentionChunk + t] = <query q, key t> for the `count` keys of one block. Meanwhile
// as many bytes are fetched from `next`.
template <typename T, size_t kQueries>
HWY_INLINE void ScoreBlock(const float* queries, const T* keys, size_t head_dim, size_t count,
                           const uint8_t* next, float* scores) {
  const size_t row_bytes = head_dim * sizeof(T);
  size_t t = 0;
  for (; t + 4 <= count; t += 4) {
    PrefetchBytes(next == nullptr ? nullptr : next + t * row_bytes, 4 * row_bytes);
    FourLanes sums[kQueries][4];
    for (size_t k = 0; k < 4; k += kKeysAtOnce) {
      FourLanes some[kQueries][4];
      DotKeys<T, kKeysAtOnce, kQueries>(queries, keys + (t + k) * head_dim, head_dim, some);
      for (size_t q = 0; q < kQueries; ++q) {
        for (size_t i = 0; i < kKeysAtOnce; ++i) sums[q][k + i] = some[q][i];
      }
    }
    for (size_t q = 0; q < kQueries; ++q) {
      StoreFourSums(sums[q][0], sums[q][1], sums[q][2], sums[q][3],
                    scores + q * kAttentionChunk + t);
    }
  }
  for (; t < count; ++t) {
    FourLanes sum[kQueries][4];
    DotKeys<T, 1, kQueries>(queries, keys + t * head_dim, head_dim, sum);
    for (size_t q = 0; q < kQueries; ++q) scores[q * kAttentionChunk + t] = SumFour(sum[q][0]);
  }
}

// out[q * stride + 0 .. 16 kChunks) += sum over the tokens of one block of weight * value, in token
// order. Meanwhile as many rows are fetched from `next`.
template <typename T, size_t kQueries, size_t kChunks>
HWY_INLINE void AddValues(const float* weights, const T* values, size_t head_dim, size_t count,
                          const uint8_t* next, float* out, size_t stride) {
  const size_t row_bytes = head_dim * sizeof(T);
  Lanes sum[kQueries][kChunks];
  for (size_t q = 0; q < kQueries; ++q) {
    for (size_t c = 0; c < kChunks; ++c) sum[q][c] = Load(out + q * stride + c * kLanes);
  }
  for (size_t t = 0; t < count; ++t) {
    PrefetchBytes(next == nullptr ? nullptr : next + t * row_bytes, row_bytes);
    Lanes value[kChunks];
    for (size_t c = 0; c < kChunks; ++c) value[c] = Load(values + t * head_dim + c * kLanes);
    for (size_t q = 0; q < kQueries; ++q) {
      const Lanes weight = Broadcast(weights[q * kAttentionChunk + t]);
      for (size_t c = 0; c < kChunks; ++c) sum[q][c] = MulAdd(weight, value[c], sum[q][c]);
    }
  }
  for (size_t q = 0; q < kQueries; ++q) {
    for (size_t c = 0; c < kChunks; ++c) Store(sum[q][c], out + q * stride + c * kLanes);
  }
}

template <typename T, size_t kQueries>
HWY_INLINE void AddBlock(const float* weights, const T* values, size_t head_dim, size_t count,
                         const uint8_t* next, float* out, size_t stride) {
  constexpr size_t kChunks = kValueSums / kQueries;  // enough sums to hide the latency of one
  size_t i = 0;
  for (; i + kChunks * kLanes <= head_dim; i += kChunks * kLanes) {
    AddValues<T, kQueries, kChunks>(weights, values + i, head_dim, count, i == 0 ? next : nullptr,
                                    out + i, stride);
  }
  for (; i + kLanes <= head_dim; i += kLanes) {
    AddValues<T, kQueries, 1>(weights, values + i, head_dim, count, i == 0 ? next : nullptr,
                              out + i, stride);
  }
  const size_t rest = head_dim - i;
  if (rest == 0) return;
  for (size_t q = 0; q < kQueries; ++q) {
    Lanes sum = LoadFirst(out + q * stride + i, rest);
    for (size_t t = 0; t < count; ++t) {
      const Lanes weight = Broadcast(weights[q * kAttentionChunk + t]);
      sum = MulAdd(weight, LoadFirst(values + t * head_dim + i, rest), sum);
    }
    StoreFirst(sum, out + q * stride + i, rest);
  }
}

// The tokens of one chunk that lie in one block.
template <typename T>
struct BlockPart {
  const T* rows;
  const uint8_t* scales;  // int8: one float per row
  size_t first;           // the first token's place in the chunk
  size_t count;
  const uint8_t* next;  // what is read after this part, or null
};

template <typename T>
HWY_INLINE const uint8_t* RowOf(const KvHead& head, size_t head_dim, size_t token) {
  return head.blocks[token / kKvBlockTokens] + head.offset +
         token % kKvBlockTokens * head_dim * sizeof(T);
}

// Calls run(part) for the parts of tokens begin .. end - 1; `after` is read after them, or null.
template <typename T, typename Function>
HWY_INLINE void ForEachBlock(const KvHead& head, size_t head_dim, size_t begin, size_t end,
                             const uint8_t* after, Function run) {
  size_t count = 0;
  for (size_t t = begin; t < end; t += count) {
    const size_t slot = t % kKvBlockTokens;
    count = HWY_MIN(kKvBlockTokens - slot, end - t);
    const uint8_t* block = head.blocks[t / kKvBlockTokens] + head.offset;
    const T* rows = reinterpret_cast<const T*>(block);
    run(BlockPart<T>{rows + slot * head_dim,
                     block + kKvBlockTokens * head_dim * sizeof(T) + slot * sizeof(float),
                     t - begin, count,
                     t + count < end ? RowOf<T>(head, head_dim, t + count) : after});
  }
}

// Calls run(std::integral_constant<kQueries>, first head) for all heads, several at once.
template <typename Function>
HWY_INLINE void ForEachHeads(size_t heads, Function run) {
  size_t head = 0;
  for (; head + kQueriesAtOnce <= heads; head += kQueriesAtOnce) {
    run(std::integral_constant<size_t, kQueriesAtOnce>(), head);
  }
  for (; head < heads; ++head) run(std::integral_constant<size_t, 1>(), head);
}

HWY_INLINE void MultiplyByScales(const uint8_t* scales, size_t count, float* x) {
  for (size_t t = 0; t < count; ++t) {
    float scale;
    std::memcpy(&scale, scales + t * sizeof(float), sizeof(scale));
    x[t] *= scale;
  }
}

template <typename T>
HWY_INLINE void AttendChunkOf(const AttentionGroup& group, size_t chunk, float* scores,
                              float* parts) {
  constexpr bool kScaled = sizeof(T) == 1;
  const size_t head_dim = group.head_dim;
  const size_t stride = AttentionPartSize(head_dim);
  const AttentionSpan& span = group.span;
  const size_t begin = span.begin + chunk * kAttentionChunk;
  const size_t end = HWY_MIN(begin + kAttentionChunk, span.end);
  const size_t length = end - begin;
  const uint8_t* values = RowOf<T>(group.values, head_dim, begin);
  ForEachBlock<T>(group.keys, head_dim, begin, end, values, [&](const BlockPart<T>& part) HWY_ATTR {
    ForEachHeads(group.heads, [&](auto queries, size_t head) HWY_ATTR {
      ScoreBlock<T, queries.value>(group.queries + head * head_dim, part.rows, head_dim, part.count,
                                   head == 0 ? part.next : nullptr,
                                   scores + head * kAttentionChunk + part.first);
    });
    for (size_t head = 0; kScaled && head < group.heads; ++head) {
      MultiplyByScales(part.scales, part.count, scores + head * kAttentionChunk + part.first);
    }
  });
  for (size_t head = 0; head < group.heads; ++head) {
    float* row = scores + head * kAttentionChunk;
    float* part = parts + head * stride;
    for (size_t t = 0; t < length; ++t) row[t] *= span.scale;
    if (span.soft_cap != 0.0f) CapSoftly(row, length, span.soft_cap);
    part[head_dim] = MaxValue(row, length);
    part[head_dim + 1] = SumExp<true>(row, length, part[head_dim], row);
    for (size_t i = 0; i < head_dim; ++i) part[i] = 0.0f;
  }
  const uint8_t* after = end < span.end ? RowOf<T>(group.keys, head_dim, end) : nullptr;
  ForEachBlock<T>(
      group.values, head_dim, begin, end, after, [&](const BlockPart<T>& part) HWY_ATTR {
        for (size_t head = 0; kScaled && head < group.heads; ++head) {
          MultiplyByScales(part.scales, part.count, scores + head * kAttentionChunk + part.first);
        }
        ForEachHeads(group.heads, [&](auto queries, size_t head) HWY_ATTR {
          AddBlock<T, queries.value>(scores + head * kAttentionChunk + part.first, part.rows,
                                     head_dim, part.count, head == 0 ? part.next : nullptr,
                                     parts + head * stride, stride);
        });
      });
}

void AttendChunk(const AttentionGroup& group, size_t chunk, float* scores, float* parts) {
  switch (group.type) {
    case KvType::kF32:
      return AttendChunkOf<float>(group, chunk, scores, parts);
    case KvType::kF16:
      return AttendChunkOf<F16>(group, chunk, scores, parts);
    case KvType::kInt8:
      return AttendChunkOf<int8_t>(group, chunk, scores, parts);
  }
}

HWY_INLINE float ExpOf(float x) {
  HWY_ALIGN float all[kLanes];
  Store(Exp(Broadcast(x)), all);
  return all[0];
}

void MergeAttention(const float* part, size_t head_dim, float* total) {
  const float largest = HWY_MAX(total[head_dim], part[head_dim]);
  const Lanes before = Broadcast(ExpOf(total[head_dim] - largest));
  const Lanes next = Broadcast(ExpOf(part[head_dim] - largest));
  const auto merge = [&](size_t i, size_t count) HWY_ATTR {
    const Lanes kept = Mul(LoadFirst(total + i, count), before);
    StoreFirst(MulAdd(LoadFirst(part + i, count), next, kept), total + i, count);
  };
  for (size_t i = 0; i < head_dim; i += kLanes) merge(i, HWY_MIN(kLanes, head_dim - i));
  merge(head_dim + 1, 1);
  total[head_dim] = largest;
}

void StoreHalfs(const float* values, size_t size, uint8_t* to) {
  size_t i = 0;
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == TF_HWY_NEON
  const PartTag d;
  const hn::Rebind<hwy::float16_t, PartTag> d16;
  const hn::Rebind<uint16_t, PartTag> bits;
  const auto limit = hn::Set(d, 65504.0f);
  for (; i + kPartLanes <= size; i += kPartLanes) {
    const Part part = hn::Min(hn::Max(LoadPart(values + i), hn::Neg(limit)), limit);
    const auto half = hn::BitCast(bits, hn::DemoteTo(d16, part));
    hn::StoreU(half, bits, reinterpret_cast<uint16_t*>(to) + i);
  }
#endif
  for (; i < size; ++i) {
    const uint16_t half = F16FromFloat(std::clamp(values[i], -65504.0f, 65504.0f));
    std::memcpy(to + 2 * i, &half, sizeof(half));
  }
}

// Returns the scale of the codes.
float StoreCodes(const float* values, size_t size, int8_t* codes) {
  float largest = 0.0f;
  for (size_t i = 0; i < size; ++i) largest = HWY_MAX(largest, std::abs(values[i]));
  const bool zero = !(largest > 1e-30f);  // 127 / largest must stay finite
  const float factor = zero ? 0.0f : 127.0f / largest;
  for (size_t i = 0; i < size; ++i) {
    codes[i] = static_cast<int8_t>(std::nearbyint(values[i] * factor));
  }
  return zero ? 0.0f : largest / 127.0f;
}

void StoreKv(KvType type, const float* values, size_t head_dim, size_t slot, uint8_t* head) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(head + slot * head_dim * sizeof(float), values, head_dim * sizeof(float));
      return;
    case KvType::kF16:
      return StoreHalfs(values, head_dim, head + slot * head_dim * sizeof(uint16_t));
    case KvType::kInt8: {
      const float scale =
          StoreCodes(values, head_dim, reinterpret_cast<int8_t*>(head) + slot * head_dim);
      std::memcpy(head + kKvBlockTokens * head_dim + slot * sizeof(float), &scale, sizeof(scale));
    }
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {

HWY_EXPORT(AttendChunk);
HWY_EXPORT(MergeAttention);
HWY_EXPORT(StoreKv);

size_t KvHeadBytes(KvType type, size_t head_dim) {
  switch (type) {
    case KvType::kF32:
      return kKvBlockTokens * head_dim * sizeof(float);
    case KvType::kF16:
      return kKvBlockTokens * head_dim * sizeof(uint16_t);
    default:
      return kKvBlockTokens * (head_dim + sizeof(float));
  }
}

void StoreKv(KvType type, const float* values, size_t head_dim, size_t slot, uint8_t* head) {
  HWY_DYNAMIC_DISPATCH(StoreKv)(type, values, head_dim, slot, head);
}

void AttendChunk(const AttentionGroup& group, size_t chunk, float* scores, float* parts) {
  HWY_DYNAMIC_DISPATCH(AttendChunk)(group, chunk, scores, parts);
}

void MergeAttention(const float* part, size_t head_dim, float* total) {
  HWY_DYNAMIC_DISPATCH(MergeAttention)(part, head_dim, total);
}

void FinishAttention(const float* total, size_t head_dim, float* out) {
  const float sum = total[head_dim + 1];
  for (size_t i = 0; i < head_dim; ++i) out[i] = total[i] / sum;
}

void AttendAll(const AttentionGroup& group, float* scratch, float* out) {
  const size_t part_size = AttentionPartSize(group.head_dim);
  float* scores = scratch;
  float* totals = scores + group.heads * kAttentionChunk;
  float* parts = totals + group.heads * part_size;
  for (size_t chunk = 0; chunk < group.span.Chunks(); ++chunk) {
    AttendChunk(group, chunk, scores, chunk == 0 ? totals : parts);
    for (size_t head = 0; chunk != 0 && head < group.heads; ++head) {
      MergeAttention(parts + head * part_size, group.head_dim, totals + head * part_size);
    }
  }
  for (size_t head = 0; head < group.heads; ++head) {
    FinishAttention(totals + head * part_size, group.head_dim, out + head * group.head_dim);
  }
}

}  // namespace tf
#endif  // HWY_ONCE
