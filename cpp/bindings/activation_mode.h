// SPDX-License-Identifier: Apache-2.0
// The public names of ActivationMode.
#pragma once

#include <string>

#include "base/check.h"
#include "kernels/linear.h"

namespace tf {

inline ActivationMode ActivationModeFromName(const std::string& name) {
  if (name == "int8") return ActivationMode::kInt8;
  Check(name == "float", "[activations] activations is int8 or float, got '", name, "'");
  return ActivationMode::kFloat;
}

inline const char* ActivationModeName(ActivationMode mode) {
  return mode == ActivationMode::kInt8 ? "int8" : "float";
}

}  // namespace tf
