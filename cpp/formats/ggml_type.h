// SPDX-License-Identifier: Apache-2.0
// The tensor types of GGUF files: numbers, names and sizes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace tf {

// One meaning of a type number. Forks of llama.cpp gave some numbers twice.
struct GgmlType {
  uint32_t id;
  std::string_view name;   // as its owner writes it; lower-case it is the name of the layout
  std::string_view owner;  // the engine that defined it
  size_t block_cols;       // 0: the size is not a number of bytes per block
  size_t block_bytes;
  size_t row_bytes;     // before the blocks of each row
  size_t tensor_bytes;  // after all rows
};

// Every meaning that a number may have; empty for a number that nobody is known to use.
std::span<const GgmlType> GgmlTypesOf(uint32_t id);

// The type of a name; null for an unknown one. PQ2_0 is found with PrismML's own number.
const GgmlType* FindGgmlType(std::string_view name);

// What became of a number that llama.cpp took out of use, or whose layout needs what is not in the
// file; empty for others.
std::string_view WhyUnreadable(uint32_t id);

// Bytes of `rows` rows of `cols`; 0 where the type cannot hold the shape. rows * cols < 2^60.
uint64_t GgmlBytes(const GgmlType& type, uint64_t rows, uint64_t cols);

}  // namespace tf
