// SPDX-License-Identifier: Apache-2.0
// Types of the values in a GGUF header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tf {

// The numbers are those of the file.
enum class GgufValueType : uint32_t {
  kUint8,
  kInt8,
  kUint16,
  kInt16,
  kUint32,
  kInt32,
  kFloat32,
  kBool,
  kString,
  kArray,
  kUint64,
  kInt64,
  kFloat64,
};

inline constexpr uint32_t kGgufValueTypes = 13;

// "uint8", ..., "bool", "string", "array".
std::string_view GgufValueTypeName(GgufValueType type);

// Bytes of one number or bool; 0 for strings and arrays.
size_t GgufValueBytes(GgufValueType type);

}  // namespace tf
