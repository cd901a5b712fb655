// SPDX-License-Identifier: Apache-2.0
// Timing of the tile layouts; see tile_choice.h.
#include "kernels/tile_choice.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "formats/t16.h"
#include "kernels/linear.h"
#include "simd/targets.h"

namespace tf {
namespace {

constexpr size_t kCols = 2560;
constexpr size_t kRows = 153600;  // 94 MiB of t16: more than the caches of most machines
constexpr int kTurns = 3;
constexpr size_t kPasses = 2;

PackedTensor SomeTiles(Layout layout) {
  const Scales scales =
      MakeScales(ScaleKind::kTensor, 0, ScaleConvention::kMultiply, {1.0f}, kRows, kCols);
  uint8_t* bytes = nullptr;
  PackedTensor tiles = PackedTensor::Allocate(layout, kRows, kCols, scales, &bytes);
  // The time does not depend on the values, but pages that nobody wrote are all one page of zeros,
  // which stays in the cache.
  std::memset(bytes, kT16Zeros, tiles.bytes().size());
  return tiles;
}

Layout MeasureTiles(ActivationMode mode, const Team& team) {
  const PackedTensor t16 = SomeTiles(Layout::kT16), t20 = SomeTiles(Layout::kT20);
  double t16_seconds = std::numeric_limits<double>::infinity(), t20_seconds = t16_seconds;
  for (int turn = 0; turn < kTurns; ++turn) {  // others on the machine disturb both alike
    t16_seconds = std::min(t16_seconds, std::ranges::min(TimeLinear(t16, 1, mode, team, kPasses)));
    t20_seconds = std::min(t20_seconds, std::ranges::min(TimeLinear(t20, 1, mode, team, kPasses)));
  }
  return t20_seconds < t16_seconds ? Layout::kT20 : Layout::kT16;
}

}  // namespace

std::vector<double> TimeLinear(const PackedTensor& weight, size_t tokens, ActivationMode mode,
                               const Team& team, size_t passes) {
  LinearInput input(tokens, weight.cols());
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t col = 0; col < weight.cols(); ++col)
      input.Row(token)[col] = static_cast<float>((token + 7 * col) % 31) - 15.0f;
    input.Quantize(mode, token, tokens, weight.cols());
  }
  AlignedArray<float> out(tokens * weight.rows());
  const LinearJob job[] = {{&weight, out.data(), weight.rows()}};
  std::vector<double> seconds;
  for (size_t pass = 0; pass <= passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    team.Run([&](Worker& worker) { RunLinears(worker, job, input, tokens, mode); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (pass != 0) seconds.push_back(taken.count());
  }
  return seconds;
}

Layout FastestTiles(size_t weights, ActivationMode mode, const Team& team) {
  const std::string target = simd::ActiveTarget();
  if (weights < size_t{1} << 25 || mode == ActivationMode::kFloat || target == "scalar")
    return Layout::kT16;
  static std::mutex mutex;
  static std::map<std::tuple<std::string, size_t, ActivationMode>, Layout> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({target, team.threads(), mode}, Layout::kT16);
  if (is_new) entry->second = MeasureTiles(mode, team);
  return entry->second;
}

}  // namespace tf
