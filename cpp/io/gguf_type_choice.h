// SPDX-License-Identifier: Apache-2.0
// Which type a tensor has whose number several engines use.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/ggml_type.h"

namespace tf {

// A tensor before its type is known.
struct TensorRoom {
  uint32_t type_id;
  uint64_t rows, cols;
  uint64_t bytes;                 // up to the next tensor, or the end of the file
  std::span<const uint8_t> data;  // at least `bytes`
  std::string_view name;
};

// Bytes behind a tensor up to the next one are fewer than this: padding, and for the table types of
// bitnet.cpp perhaps one more slot.
uint64_t PaddingLimit(const GgmlType& type, uint64_t alignment);

// One type per tensor. A number with several meanings gets the one whose sizes fit all its tensors
// in this file up to the padding; `type_42` decides for the number 42 where several do. Throws
// FormatError that names the tensor for unknown and removed numbers, and where no meaning or more
// than one fits.
std::vector<const GgmlType*> ChooseTypes(std::span<const TensorRoom> tensors, uint64_t alignment,
                                         std::string_view type_42, const std::string& path);

}  // namespace tf
