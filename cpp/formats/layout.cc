// SPDX-License-Identifier: Apache-2.0
// The table of layouts.
#include "formats/layout.h"

#include <array>
#include <limits>
#include <string>

#include "base/aligned.h"
#include "base/check.h"
#include "formats/hf_packed.h"
#include "formats/onebit.h"
#include "formats/t16.h"
#include "formats/t20.h"
#include "formats/t8.h"
#include "formats/ternary_codec.h"
#include "formats/two_plane.h"

namespace tf {
namespace {

struct LayoutEntry {
  Layout layout;
  std::string_view name;
  Alphabet alphabet;
};

constexpr std::array<LayoutEntry, 24> kLayouts = {{
    {Layout::kF32, "f32", Alphabet::kFloat},
    {Layout::kF16, "f16", Alphabet::kFloat},
    {Layout::kBf16, "bf16", Alphabet::kFloat},
    {Layout::kInt8, "int8", Alphabet::kInt8},
    {Layout::kHfPacked, "hf_packed", Alphabet::kTrit},
    {Layout::kOnebit, "onebit", Alphabet::kTrit},
    {Layout::kOnebitBinary, "onebit_binary", Alphabet::kTrit},
    {Layout::kT16, "t16", Alphabet::kTrit},
    {Layout::kT20, "t20", Alphabet::kTrit},
    {Layout::kTwoPlane, "two_plane", Alphabet::kNineLevels},
    {Layout::kT8, "t8", Alphabet::kNineLevels},
    {Layout::kI2S, "i2_s", Alphabet::kTrit},
    {Layout::kI2S64, "i2_s_64", Alphabet::kTrit},
    {Layout::kI2SRows4, "i2_s_rows4", Alphabet::kTrit},
    {Layout::kTq10, "tq1_0", Alphabet::kTrit},
    {Layout::kTq20, "tq2_0", Alphabet::kTrit},
    {Layout::kQ10, "q1_0", Alphabet::kTrit},
    {Layout::kQ20, "q2_0", Alphabet::kTrit},
    {Layout::kPq20, "pq2_0", Alphabet::kTrit},
    {Layout::kPtq10, "ptq1_0", Alphabet::kTrit},
    {Layout::kQ2K, "q2_k", Alphabet::kTrit},
    {Layout::kQ40, "q4_0", Alphabet::kTrit},
    {Layout::kIq1Bn, "iq1_bn", Alphabet::kTrit},
    {Layout::kIq2Bn, "iq2_bn", Alphabet::kTrit},
}};

const LayoutEntry& Entry(Layout layout) { return kLayouts[static_cast<size_t>(layout)]; }

}  // namespace

Alphabet AlphabetOf(Layout layout) { return Entry(layout).alphabet; }

std::string_view LayoutName(Layout layout) { return Entry(layout).name; }

bool HoldsScales(Layout layout) { return FindTernaryCodec(layout) != nullptr; }

Layout LayoutFromName(std::string_view name) {
  std::string known;
  for (const LayoutEntry& entry : kLayouts) {
    if (entry.name == name) return entry.layout;
    known += StrCat(known.empty() ? "" : ", ", entry.name);
  }
  throw std::invalid_argument(StrCat("[layout] a layout is one of ", known, ", not '", name, "'"));
}

size_t LayoutBytes(Layout layout, size_t rows, size_t cols, size_t group_size) {
  constexpr size_t kLimit = std::numeric_limits<size_t>::max() / 64;
  Check(rows > 0 && cols > 0, "[layout] a matrix has at least one row and one column, got ", rows,
        " x ", cols);
  Check(rows <= kLimit && cols <= kLimit / rows, "[layout] the matrix is too large: ", rows, " x ",
        cols);
  switch (layout) {
    case Layout::kF32:
      return rows * cols * 4;
    case Layout::kF16:
    case Layout::kBf16:
      return rows * cols * 2;
    case Layout::kInt8:
      return rows * cols;
    case Layout::kHfPacked:
      return HfPackedBytes(rows, cols);
    case Layout::kOnebit:
      return OnebitTernaryBytes(rows, cols);
    case Layout::kOnebitBinary:
      return OnebitBinaryBytes(rows, cols);
    case Layout::kT16:
      return T16Bytes(rows, cols);
    case Layout::kT20:
      return T20Bytes(rows, cols, group_size);
    case Layout::kTwoPlane:
      return TwoPlaneBytes(rows, cols);
    case Layout::kT8:
      return T8Bytes(rows, cols);
    default:
      return FindTernaryCodec(layout)->bytes(rows, cols);
  }
}

}  // namespace tf
