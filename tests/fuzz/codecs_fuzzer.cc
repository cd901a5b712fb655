// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes as a tensor. The first byte chooses type and the second the shape.
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <vector>

#include "formats/mlx.h"
#include "fuzz/codec_checks.h"

namespace {

constexpr std::array<const char*, 13> kLayouts = {
    "tq1_0", "tq2_0", "q1_0",    "q2_0",       "pq2_0",  "ptq1_0", "q2_k",
    "q4_0",  "i2_s",  "i2_s_64", "i2_s_rows4", "iq1_bn", "iq2_bn"};
constexpr std::array<const char*, 7> kDense = {"F32",  "F16",  "BF16", "Q8_0",
                                               "Q6_K", "Q4_0", "Q2_K"};

// Groups of 64 columns, one after another: f32 scale, f32 bias, codes.
void CheckMlx(std::span<const uint8_t> data, size_t bits) {
  const size_t block = 8 + 8 * bits, groups = data.size() / block;
  if (groups == 0) return;
  std::vector<float> scales(groups), biases(groups), trit_scales(groups);
  std::vector<uint8_t> codes;
  for (size_t i = 0; i < groups; ++i) {
    const uint8_t* at = data.data() + i * block;
    std::memcpy(&scales[i], at, 4);
    std::memcpy(&biases[i], at + 4, 4);
    codes.insert(codes.end(), at + 8, at + block);
  }
  std::vector<int8_t> trits(64 * groups);
  try {
    tf::DecodeMlx(codes, scales, biases, bits, 64, 1, 64 * groups, tf::Team(1), trits, trit_scales);
  } catch (const tf::FormatError&) {
    return;
  }
  for (size_t i = 0; i < trits.size(); ++i) {
    const size_t code = (codes[i * bits / 8] >> (i * bits % 8)) & ((1u << bits) - 1);
    const double weight = double{scales[i / 64]} * static_cast<double>(code) + biases[i / 64];
    tf::Require(trits[i] * double{trit_scales[i / 64]} == weight, "the weights of a group");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 3) return 0;
  const size_t choice = data[0] % (kLayouts.size() + kDense.size() + 2);
  const size_t rows = 4 * (1 + data[1] % 2), cols = 256 * (1 + data[1] / 2 % 2);
  const std::span<const uint8_t> rest(data + 2, size - 2);
  // The bytes, repeated to the size of the matrix.
  const auto filled = [&](size_t bytes) {
    std::vector<uint8_t> result(bytes);
    for (size_t i = 0; i < bytes; ++i) result[i] = rest[i % rest.size()];
    return result;
  };
  if (choice < kLayouts.size()) {
    const size_t bytes = tf::LayoutBytes(tf::LayoutFromName(kLayouts[choice]), rows, cols);
    tf::CheckTernary(kLayouts[choice], filled(bytes), rows, cols);
  } else if (choice < kLayouts.size() + kDense.size()) {
    const char* type = kDense[choice - kLayouts.size()];
    tf::CheckDense(type, filled(tf::DenseBytes(*tf::FindDenseCodec(type), rows, cols)), rows, cols);
  } else {
    CheckMlx(rest, choice - kLayouts.size() - kDense.size() + 1);
  }
  return 0;
}
