// SPDX-License-Identifier: Apache-2.0
// The public names of ActivationMode.
#pragma once

#include <string>

#include "base/check.h"
#include "kernels/linear.h"

namespace tf {

inline ActivationMode ActivationModeFromName(const std::string& name) {
  if (name == "int8") return ActivationMode::kInt8;
  if (name == "int16") return ActivationMode::kInt16;
  Check(name == "float", "[activations] activations is int8, int16 or float, got '", name, "'");
  return ActivationMode::kFloat;
}

inline const char* ActivationModeName(ActivationMode mode) {
  constexpr const char* kNames[] = {"int8", "int16", "float"};
  return kNames[static_cast<size_t>(mode)];
}

}  // namespace tf
