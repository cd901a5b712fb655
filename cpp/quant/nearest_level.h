// SPDX-License-Identifier: Apache-2.0
// Rounding to the levels of one or two trit planes.
#pragma once

#include <cmath>

namespace tf {

// The integer within -max_level .. max_level nearest to value / step for step > 0; of two, the one
// that is nearer to 0.
inline int NearestLevel(double value, double step, int max_level) {
  const double size = std::abs(value);
  int level = 0;
  while (level < max_level && size > (level + 0.5) * step) ++level;
  return value < 0 ? -level : level;
}

}  // namespace tf
