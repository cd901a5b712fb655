// SPDX-License-Identifier: Apache-2.0
// Row and group scales in the order in which the kernels on run-time tiles read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/aligned.h"

namespace tf {

// The 16 scales of group g of panel p stand at (p * groups + g) * 16, zeros for rows that do not
// exist. Binary16 where every scale is exact in it, which halves what a kernel reads, else float32.
class PanelScales {
 public:
  // effective: row-major [rows, groups].
  PanelScales(std::span<const float> effective, size_t rows, size_t groups);

  // One of the two is null.
  const uint16_t* half() const { return half_.data(); }
  const float* single() const { return single_.data(); }

  float At(size_t row, size_t group) const;
  size_t Bytes() const { return 2 * half_.size() + 4 * single_.size(); }

 private:
  size_t Index(size_t row, size_t group) const;

  size_t groups_;
  AlignedArray<uint16_t> half_;
  AlignedArray<float> single_;
};

}  // namespace tf
