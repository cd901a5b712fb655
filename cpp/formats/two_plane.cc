// SPDX-License-Identifier: Apache-2.0
// Scalar codec of two tied trit planes.
#include "formats/two_plane.h"

#include <vector>

#include "base/check.h"
#include "formats/hf_packed.h"

namespace tf {
namespace {

// The trit with weight 3; the rest, -1 .. 1, is the other.
int FirstTrit(int level) { return (level > 1) - (level < -1); }

}  // namespace

size_t TwoPlaneBytes(size_t rows, size_t cols) { return 2 * HfPackedBytes(rows, cols); }

void TwoPlanePack(std::span<const int8_t> levels, size_t rows, size_t cols,
                  std::span<uint8_t> packed) {
  const size_t plane = HfPackedBytes(rows, cols);
  Check(levels.size() == rows * cols && packed.size() == 2 * plane,
        "[two_plane] sizes do not match ", rows, " x ", cols);
  std::vector<int8_t> trits(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    Check(levels[i] >= -4 && levels[i] <= 4, "[two_plane] a level lies in -4 .. 4, got ",
          static_cast<int>(levels[i]), " at row ", i / cols, ", column ", i % cols);
    trits[i] = static_cast<int8_t>(FirstTrit(levels[i]));
  }
  HfPack(trits, rows, cols, packed.first(plane));
  for (size_t i = 0; i < levels.size(); ++i)
    trits[i] = static_cast<int8_t>(levels[i] - 3 * FirstTrit(levels[i]));
  HfPack(trits, rows, cols, packed.last(plane));
}

void TwoPlaneUnpack(std::span<const uint8_t> packed, size_t rows, size_t cols,
                    std::span<int8_t> levels) {
  const size_t plane = HfPackedBytes(rows, cols);
  Check(levels.size() == rows * cols && packed.size() == 2 * plane,
        "[two_plane] sizes do not match ", rows, " x ", cols);
  std::vector<int8_t> second(levels.size());
  HfUnpack(packed.first(plane), rows, cols, levels);
  HfUnpack(packed.last(plane), rows, cols, second);
  for (size_t i = 0; i < levels.size(); ++i)
    levels[i] = static_cast<int8_t>(3 * levels[i] + second[i]);
}

}  // namespace tf
