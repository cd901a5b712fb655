// SPDX-License-Identifier: Apache-2.0
// The table of GGUF tensor types.
#include "formats/ggml_type.h"

#include <algorithm>
#include <iterator>

namespace tf {
namespace {

// By number.
constexpr GgmlType kTypes[] = {
    {0, "F32", "llama.cpp", 1, 4, 0, 0},
    {1, "F16", "llama.cpp", 1, 2, 0, 0},
    {2, "Q4_0", "llama.cpp", 32, 18, 0, 0},
    {3, "Q4_1", "llama.cpp", 32, 20, 0, 0},
    {6, "Q5_0", "llama.cpp", 32, 22, 0, 0},
    {7, "Q5_1", "llama.cpp", 32, 24, 0, 0},
    {8, "Q8_0", "llama.cpp", 32, 34, 0, 0},
    {9, "Q8_1", "llama.cpp", 32, 36, 0, 0},
    {10, "Q2_K", "llama.cpp", 256, 84, 0, 0},
    {11, "Q3_K", "llama.cpp", 256, 110, 0, 0},
    {12, "Q4_K", "llama.cpp", 256, 144, 0, 0},
    {13, "Q5_K", "llama.cpp", 256, 176, 0, 0},
    {14, "Q6_K", "llama.cpp", 256, 210, 0, 0},
    {15, "Q8_K", "llama.cpp", 256, 292, 0, 0},
    {16, "IQ2_XXS", "llama.cpp", 256, 66, 0, 0},
    {17, "IQ2_XS", "llama.cpp", 256, 74, 0, 0},
    {18, "IQ3_XXS", "llama.cpp", 256, 98, 0, 0},
    {19, "IQ1_S", "llama.cpp", 256, 50, 0, 0},
    {20, "IQ4_NL", "llama.cpp", 32, 18, 0, 0},
    {21, "IQ3_S", "llama.cpp", 256, 110, 0, 0},
    {22, "IQ2_S", "llama.cpp", 256, 82, 0, 0},
    {23, "IQ4_XS", "llama.cpp", 256, 136, 0, 0},
    {24, "I8", "llama.cpp", 1, 1, 0, 0},
    {25, "I16", "llama.cpp", 1, 2, 0, 0},
    {26, "I32", "llama.cpp", 1, 4, 0, 0},
    {27, "I64", "llama.cpp", 1, 8, 0, 0},
    {28, "F64", "llama.cpp", 1, 8, 0, 0},
    {29, "IQ1_M", "llama.cpp", 256, 56, 0, 0},
    {30, "BF16", "llama.cpp", 1, 2, 0, 0},
    {34, "TQ1_0", "llama.cpp", 256, 54, 0, 0},
    {35, "TQ2_0", "llama.cpp", 256, 66, 0, 0},
    {36, "I2_S", "bitnet.cpp", 128, 32, 0, 32},
    {38, "TL1", "bitnet.cpp", 4, 1, 0, 32},
    {39, "MXFP4", "llama.cpp", 32, 17, 0, 0},
    {39, "TL2", "bitnet.cpp", 0, 0, 0, 32},
    {40, "NVFP4", "llama.cpp", 64, 36, 0, 0},
    {41, "Q1_0", "llama.cpp", 128, 18, 0, 0},
    {42, "Q2_0", "llama.cpp", 64, 18, 0, 0},
    {42, "PQ2_0", "PrismML, before it had the number 142", 128, 34, 0, 0},
    {42, "TL2", "bitnet.cpp", 0, 0, 0, 32},
    {42, "STQ1_0", "Tencent", 256, 42, 0, 0},
    {134, "IQ1_BN", "ik_llama.cpp", 64, 13, 2, 0},
    {135, "IQ2_BN", "ik_llama.cpp", 64, 16, 4, 0},
    {142, "PQ2_0", "PrismML", 128, 34, 0, 0},
    {143, "PTQ1_0", "PrismML", 128, 28, 0, 0},
};

// The nibbles of the three-weight part, its signs, the two-weight part; see the tile sizes of the
// engine: all but 256 columns in triples of 5 bits, 256 columns in pairs of 4 bits.
uint64_t Tl2Bytes(uint64_t rows, uint64_t cols) {
  if (cols < 256) return 0;
  const uint64_t bytes = (cols - 256) * rows / 3 * 5 / 8 + 256 * rows / 2 * 4 / 8;
  return (bytes + 31) / 32 * 32;
}

}  // namespace

std::span<const GgmlType> GgmlTypesOf(uint32_t id) {
  const auto [first, last] =
      std::equal_range(std::begin(kTypes), std::end(kTypes), GgmlType{id, {}, {}, 0, 0, 0, 0},
                       [](const GgmlType& a, const GgmlType& b) { return a.id < b.id; });
  return {first, last};
}

const GgmlType* FindGgmlType(std::string_view name) {
  const GgmlType* found = nullptr;
  for (const GgmlType& type : kTypes) {
    if (type.name == name) found = &type;
  }
  return found;
}

std::string_view WhyUnreadable(uint32_t id) {
  switch (id) {
    case 4:
    case 5:
      return "Q4_2 and Q4_3, which llama.cpp removed in 2023: convert the source model again";
    case 31:
    case 32:
    case 33:
      return "Q4_0_4_4, Q4_0_4_8 or Q4_0_8_8, which llama.cpp removed: quantize to Q4_0 instead";
    case 37:
      return "I8_S of bitnet.cpp, or a removed type of llama.cpp: convert the source model again";
    case 43:
      return "a number of forks only (t5b, STQ1_0, F8): convert the source model again";
    case 335:
      return "IQ2_BN_R4 of ik_llama.cpp, rows interleaved for its kernels: export IQ2_BN instead";
    default:
      return {};
  }
}

uint64_t GgmlBytes(const GgmlType& type, uint64_t rows, uint64_t cols) {
  if (type.name == "TL2") {
    const uint64_t bytes = Tl2Bytes(rows, cols);
    return bytes == 0 ? 0 : bytes + type.tensor_bytes;
  }
  // The types that end in a tail run over the rows without a break.
  if (type.tensor_bytes > 0) {
    return rows * cols % type.block_cols == 0
               ? rows * cols / type.block_cols * type.block_bytes + type.tensor_bytes
               : 0;
  }
  if (cols % type.block_cols != 0) return 0;
  return rows * (type.row_bytes + cols / type.block_cols * type.block_bytes);
}

}  // namespace tf
