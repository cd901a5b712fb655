// SPDX-License-Identifier: Apache-2.0
// Names and sizes of GGUF values.
#include "io/gguf_types.h"

namespace tf {

std::string_view GgufValueTypeName(GgufValueType type) {
  constexpr std::string_view kNames[kGgufValueTypes] = {
      "uint8", "int8",   "uint16", "int16",  "uint32", "int32",  "float32",
      "bool",  "string", "array",  "uint64", "int64",  "float64"};
  return kNames[static_cast<size_t>(type)];
}

size_t GgufValueBytes(GgufValueType type) {
  constexpr size_t kBytes[kGgufValueTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kBytes[static_cast<size_t>(type)];
}

}  // namespace tf
