// SPDX-License-Identifier: Apache-2.0
// The public names of HeadMode.
#pragma once

#include <string>
#include <utility>

#include "base/check.h"
#include "model/transformer.h"

namespace tf {

inline constexpr std::pair<const char*, HeadMode> kHeadModes[] = {
    {"exact", HeadMode::kExact}, {"int8", HeadMode::kInt8},          {"int6", HeadMode::kInt6},
    {"int4", HeadMode::kInt4},   {"two-stage", HeadMode::kTwoStage},
};

inline HeadMode HeadModeFromName(const std::string& name) {
  for (const auto& [known, mode] : kHeadModes) {
    if (name == known) return mode;
  }
  throw std::invalid_argument(
      StrCat("[head] head is exact, int8, int6, int4 or two-stage, got '", name, "'"));
}

inline const char* HeadModeName(HeadMode mode) {
  for (const auto& [name, known] : kHeadModes) {
    if (mode == known) return name;
  }
  return "";
}

}  // namespace tf
