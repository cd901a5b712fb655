// SPDX-License-Identifier: Apache-2.0
// The public names of KvType.
#pragma once

#include <string>

#include "base/check.h"
#include "kernels/attention.h"

namespace tf {

inline KvType KvTypeFromName(const std::string& name) {
  if (name == "f32") return KvType::kF32;
  if (name == "f16") return KvType::kF16;
  Check(name == "int8", "[kv] kv is f32, f16 or int8, got '", name, "'");
  return KvType::kInt8;
}

inline const char* KvTypeName(KvType type) {
  switch (type) {
    case KvType::kF32:
      return "f32";
    case KvType::kF16:
      return "f16";
    default:
      return "int8";
  }
}

}  // namespace tf
