// SPDX-License-Identifier: Apache-2.0
// Where the time of forward passes goes, for benchmarks.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "base/parallel.h"

namespace tf {

enum class Part : uint8_t {
  kMatmul,     // the linear layers of all layers
  kHead,       // final norm, logits
  kAttention,  // scores and weighted sums over the cache
  kRest,       // embedding, norms, activations, quantization, rotation, storing keys and values
};
inline constexpr size_t kParts = 4;

// Adds up wall-clock seconds by part, waiting for other workers included. Off at first; then a mark
// costs one branch.
class PartClock {
 public:
  // Turns the clock on, at zero, or off. Not during a forward pass.
  void Use(bool on) {
    on_ = on;
    seconds_ = {};
  }

  // Where every worker passes: the first one's time since its last mark belongs to `part`.
  void Mark(const Worker& worker, Part part) {
    if (on_ && worker.index() == 0) Add(part);
  }

  // Starts a pass.
  void Begin() {
    if (on_) last_ = std::chrono::steady_clock::now();
  }

  double seconds(Part part) const { return seconds_[static_cast<size_t>(part)]; }

 private:
  void Add(Part part) {
    const auto now = std::chrono::steady_clock::now();
    seconds_[static_cast<size_t>(part)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  bool on_ = false;
  std::array<double, kParts> seconds_ = {};
  std::chrono::steady_clock::time_point last_;
};

}  // namespace tf
