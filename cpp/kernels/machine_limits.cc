// SPDX-License-Identifier: Apache-2.0
// Reading and multiplying as fast as the machine can; see machine_limits.h.
#include "kernels/machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "base/aligned.h"
#include "base/check.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/machine_limits.cc"
#include "simd/highway_targets.h"
// After highway_targets.h
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "simd/dot-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd_hwy = simd::HWY_NAMESPACE;

// Adds up `count` words modulo 2^32, a multiple of 64 of them.
void ReadWords(const uint32_t* HWY_RESTRICT words, size_t count, uint32_t* HWY_RESTRICT sum) {
  const hn::CappedTag<uint32_t, 16> d;
  constexpr size_t kLanes = hn::MaxLanes(d);
  constexpr size_t kVectors = 4;  // their additions do not wait for each other
  constexpr size_t kPrefetchWords = 1024;
  hn::Vec<decltype(d)> sums[kVectors];
  for (auto& vector : sums) vector = hn::Zero(d);
  for (size_t i = 0; i < count; i += kVectors * kLanes) {
    for (size_t v = 0; v < kVectors; ++v) {
      if (v * kLanes % 16 == 0) hwy::Prefetch(words + i + kPrefetchWords + v * kLanes);
      sums[v] = hn::Add(sums[v], hn::LoadU(d, words + i + v * kLanes));
    }
  }
  alignas(64) uint32_t lanes[kVectors * kLanes];
  for (size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[v], d, lanes + v * kLanes);
  *sum = 0;
  for (const uint32_t lane : lanes) *sum += lane;
}

// As many independent sums as hide the latency of a step and leave registers for its operands.
inline constexpr size_t kCodeVectors = simd_hwy::kDotBytes == 64 ? 3 : 2;
inline constexpr size_t kActVectors = simd_hwy::kDotBytes == 32 ? 6 : 4;

// *total = the sum modulo 2^32 of every code vector with every act vector, `rounds` times. The
// operands are loaded anew each round, or a compiler would multiply only once.
template <simd::DotKind kDot>
void MultiplyRounds(const uint8_t* HWY_RESTRICT codes, size_t window,
                    const int8_t* HWY_RESTRICT acts, size_t rounds, uint32_t* HWY_RESTRICT total) {
  constexpr size_t kBytes = simd_hwy::kDotBytes;
  alignas(64) int32_t lanes[kActVectors * kCodeVectors][kBytes / 4] = {};
#if HWY_TARGET == HWY_SCALAR
  for (size_t round = 0; round < rounds; ++round) {
    const uint8_t* HWY_RESTRICT from = codes + round % window * kCodeVectors * kBytes;
    for (size_t i = 0; i < kActVectors * kCodeVectors; ++i) {
      simd_hwy::DotOnce<kDot>(from + i % kCodeVectors * kBytes, acts + i / kCodeVectors * kBytes,
                              lanes[i]);
    }
  }
#else
  // Without a dot instruction sums have 16 bits for this many rounds: 64 pairs of products of codes
  // up to 2 lie in -32768 .. 32512.
  constexpr bool kPairs = kDot == simd::DotKind::kPortable;
  const size_t fold_rounds = kPairs ? 64 : rounds;
  using SumsTag = std::conditional_t<kPairs, simd_hwy::DotPairsTag, simd_hwy::DotSumsTag>;
  const simd_hwy::DotBytesTag d8;
  const simd_hwy::DotSumsTag d32;
  const hn::RebindToSigned<simd_hwy::DotBytesTag> di8;
  for (size_t begin = 0; begin < rounds; begin += fold_rounds) {
    hn::Vec<SumsTag> sums[kActVectors][kCodeVectors];
    for (auto& row : sums) {
      for (auto& vector : row) vector = hn::Zero(SumsTag());
    }
    const size_t end = std::min(begin + fold_rounds, rounds);
    for (size_t round = begin; round < end; ++round) {
      const uint8_t* HWY_RESTRICT from = codes + round % window * kCodeVectors * kBytes;
      simd_hwy::DotCodes code[kCodeVectors];
      for (size_t c = 0; c < kCodeVectors; ++c) code[c] = hn::LoadU(d8, from + c * kBytes);
      for (size_t a = 0; a < kActVectors; ++a) {
        const auto act = hn::LoadU(di8, acts + a * kBytes);
        for (size_t c = 0; c < kCodeVectors; ++c) {
          if constexpr (kPairs) {
            sums[a][c] = simd_hwy::AddPairProducts(sums[a][c], code[c], act);
          } else {
            sums[a][c] = simd_hwy::DotStep<kDot>(sums[a][c], code[c], act);
          }
        }
      }
    }
    for (size_t i = 0; i < kActVectors * kCodeVectors; ++i) {
      const auto before = hn::LoadU(d32, lanes[i]);
      const auto& added = sums[i / kCodeVectors][i % kCodeVectors];
      if constexpr (kPairs) {
        hn::StoreU(simd_hwy::FoldPairs(before, added), d32, lanes[i]);
      } else {
        hn::StoreU(hn::Add(before, added), d32, lanes[i]);
      }
    }
  }
#endif
  *total = 0;
  for (const auto& vector : lanes) {
    for (const int32_t lane : vector) *total += static_cast<uint32_t>(lane);
  }
}

void Multiply(simd::DotKind dot, const uint8_t* codes, size_t window, const int8_t* acts,
              size_t rounds, uint32_t* total) {
  simd::HWY_NAMESPACE::WithDot(dot, [&]<simd::DotKind kDot>() HWY_ATTR {
    MultiplyRounds<kDot>(codes, window, acts, rounds, total);
  });
}

void RoundShape(size_t* vector_bytes, size_t* code_vectors, size_t* act_vectors) {
  *vector_bytes = simd_hwy::kDotBytes;
  *code_vectors = kCodeVectors;
  *act_vectors = kActVectors;
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(ReadWords);
HWY_EXPORT(Multiply);
HWY_EXPORT(RoundShape);

// Runs `work(worker)` on the team `passes` times. Returns the shortest time in seconds and the
// number of workers.
template <typename Work>
std::pair<double, size_t> ShortestRun(const Team& team, size_t passes, const Work& work) {
  double shortest = std::numeric_limits<double>::infinity();
  std::atomic<size_t> workers{0};
  for (size_t pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    team.Run([&](Worker& worker) {
      work(worker);
      if (worker.index() == 0) workers = worker.count();
    });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    shortest = std::min(shortest, taken.count());
  }
  return {shortest, workers};
}

void CheckSum(const char* what, uint32_t expected, uint32_t found) {
  if (found == expected) return;
  throw std::runtime_error(
      StrCat("[machine_limits] the sum of ", what, " should be ", expected, ", got ", found));
}

}  // namespace

double ReadBandwidth(size_t bytes, size_t passes, const Team& team) {
  Check(bytes >= 1 && passes >= 1, "[machine_limits] bytes and passes are positive, got ", bytes,
        " and ", passes);
  constexpr size_t kChunk = 64;  // words
  const size_t chunks = DivCeil(bytes, kChunk * sizeof(uint32_t));
  AlignedArray<uint32_t> words(chunks * kChunk);
  std::memset(words.data(), 1, words.size() * sizeof(uint32_t));
  std::atomic<uint32_t> sum{0};
  const auto [seconds, workers] = ShortestRun(team, passes, [&](Worker& worker) {
    const Range share = worker.Share(chunks);
    uint32_t part = 0;
    HWY_DYNAMIC_DISPATCH(ReadWords)
    (words.data() + share.begin * kChunk, (share.end - share.begin) * kChunk, &part);
    sum += part;
  });
  CheckSum("words", static_cast<uint32_t>(passes * words.size() * 0x01010101), sum);
  return static_cast<double>(words.size() * sizeof(uint32_t)) / seconds;
}

double DotPeak(size_t rounds, size_t passes, const Team& team) {
  Check(rounds >= 1 && passes >= 1, "[machine_limits] rounds and passes are positive, got ", rounds,
        " and ", passes);
  constexpr size_t kWindow = 4;  // rounds until the same codes come again: 768 bytes at most
  rounds = RoundUp(rounds, kWindow);
  size_t step = 0, code_vectors = 0, act_vectors = 0;  // step: bytes of a vector
  HWY_DYNAMIC_DISPATCH(RoundShape)(&step, &code_vectors, &act_vectors);
  AlignedArray<uint8_t> codes(kWindow * code_vectors * step);
  AlignedArray<int8_t> acts(act_vectors * step);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>((i + i / 7) % 3);
  for (size_t i = 0; i < acts.size(); ++i)
    acts[i] = static_cast<int8_t>(static_cast<int>(i * 37 % 251) - 125);
  uint32_t expected = 0;  // of one walk through the window
  for (size_t i = 0; i < codes.size(); ++i) {
    for (size_t a = 0; a < acts.size(); a += step)
      expected += static_cast<uint32_t>(codes[i] * acts[a + i % step]);
  }
  std::atomic<uint32_t> sum{0};
  const simd::DotKind dot = simd::ActiveDot();
  const auto [seconds, workers] = ShortestRun(team, passes, [&](Worker& worker) {
    (void)worker;
    uint32_t total = 0;
    HWY_DYNAMIC_DISPATCH(Multiply)(dot, codes.data(), kWindow, acts.data(), rounds, &total);
    sum += total;
  });
  CheckSum("products", static_cast<uint32_t>(expected * (rounds / kWindow) * passes * workers),
           sum);
  return static_cast<double>(workers * rounds * code_vectors * act_vectors * step) / seconds;
}

}  // namespace tf
#endif  // HWY_ONCE
