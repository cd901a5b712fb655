// SPDX-License-Identifier: Apache-2.0
// Affine groups to trits.
#include "formats/mlx.h"

#include <atomic>
#include <cmath>

#include "base/check.h"

namespace tf {
namespace {

// One group. Doubles hold every weight exactly, since scale and bias come from 16-bit floats; where
// they do not, a weight that is off is refused like any other.
bool DecodeGroup(const uint8_t* codes, size_t first, size_t count, size_t bits, double scale,
                 double bias, int8_t* trits, float* trit_scale) {
  if (!std::isfinite(scale) || !std::isfinite(bias)) return false;
  const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1);
  double magnitude = 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t bit = (first + i) * bits;
    const double weight = scale * ((codes[bit / 8] >> (bit % 8)) & mask) + bias;
    if (magnitude == 0) magnitude = std::fabs(weight);
    if (weight != 0 && std::fabs(weight) != magnitude) return false;
    trits[i] = static_cast<int8_t>((weight > 0) - (weight < 0));
  }
  *trit_scale = static_cast<float>(magnitude);
  return *trit_scale == magnitude;
}

}  // namespace

void DecodeMlx(std::span<const uint8_t> codes, std::span<const float> scales,
               std::span<const float> biases, size_t bits, size_t group_size, size_t rows,
               size_t cols, const Team& team, std::span<int8_t> trits,
               std::span<float> trit_scales) {
  Check(bits == 1 || bits == 2, "[mlx] ternary weights have 1 or 2 bits, got ", bits);
  Check(group_size > 0 && cols % group_size == 0 && cols * bits % 32 == 0, "[mlx] ", cols,
        " columns of ", bits, " bits are no whole words, or no whole groups of ", group_size);
  const size_t groups = cols / group_size, row_bytes = cols * bits / 8;
  Check(codes.size() == rows * row_bytes && scales.size() == rows * groups &&
            biases.size() == rows * groups && trits.size() == rows * cols &&
            trit_scales.size() == rows * groups,
        "[mlx] sizes do not match ", rows, " x ", cols, " in groups of ", group_size);
  std::atomic<size_t> bad = rows * groups;
  team.Run([&](Worker& worker) {
    const Range share = worker.Share(rows * groups);
    for (size_t i = share.begin; i < share.end; ++i) {
      const size_t row = i / groups, first = i % groups * group_size;
      if (!DecodeGroup(codes.data() + row * row_bytes, first, group_size, bits, scales[i],
                       biases[i], trits.data() + row * cols + first, &trit_scales[i])) {
        bad = i;
        return;
      }
    }
  });
  if (bad < rows * groups) {
    throw FormatError(StrCat("[mlx] the weights of row ", bad / groups, ", columns ",
                             bad % groups * group_size, " to ", (bad % groups + 1) * group_size - 1,
                             " are not -s, 0 and +s (scale ", scales[bad], ", bias ", biases[bad],
                             "): the tensor is not ternary"));
  }
}

}  // namespace tf
