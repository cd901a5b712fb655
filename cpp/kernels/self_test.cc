// SPDX-License-Identifier: Apache-2.0
// Made cases for every kernel; see self_test.h.
#include "kernels/self_test.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "formats/hf_packed.h"
#include "formats/t16.h"
#include "formats/two_plane.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/dense_linear.h"
#include "kernels/linear.h"
#include "kernels/norm.h"
#include "kernels/reference.h"
#include "kernels/reference_float.h"
#include "kernels/repack.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"
#include "kernels/ternary_gemv.h"
#include "kernels/two_plane_linear.h"

namespace tf {
namespace {

class Tester {
 public:
  std::vector<std::string> TakeErrors() { return std::move(errors_); }

  float Normal() { return normal_(random_); }
  int Int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  std::vector<float> Floats(size_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = Normal();
    return values;
  }

  std::vector<int8_t> Trits(size_t size) { return Levels(size, 1); }
  std::vector<int8_t> Levels(size_t size, int max_level) {
    std::vector<int8_t> levels(size);
    for (int8_t& level : levels) level = static_cast<int8_t>(Int(-max_level, max_level));
    return levels;
  }

  // `magnitude` is what rounding errors grow with.
  void ExpectNear(std::string_view what, double expected, double actual, double magnitude) {
    if (std::abs(expected - actual) <= 2e-6 * (magnitude + 1e-6)) return;
    if (errors_.size() < kMaxErrors)
      errors_.push_back(StrCat(what, ": expected ", expected, ", got ", actual));
  }

  void Expect(std::string_view what, bool condition) {
    if (!condition && errors_.size() < kMaxErrors) errors_.emplace_back(what);
  }

 private:
  static constexpr size_t kMaxErrors = 20;
  std::mt19937 random_{1};
  std::normal_distribution<float> normal_;
  std::vector<std::string> errors_;
};

std::span<const uint8_t> AsBytes(const std::vector<float>& values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(float)};
}

double Magnitude(std::span<const float> values) {
  double sum = 0;
  for (const float value : values) sum += std::abs(static_cast<double>(value));
  return sum;
}

Scales RandomScales(Tester& test, ScaleKind kind, size_t rows, size_t cols) {
  const size_t count = kind == ScaleKind::kTensor ? 1
                       : kind == ScaleKind::kRow  ? rows
                                                  : rows * DivCeil(cols, 64);
  std::vector<float> stored(count);
  for (float& value : stored) value = 0.5f + std::abs(test.Normal());
  return MakeScales(kind, 64, ScaleConvention::kMultiply, std::move(stored), rows, cols);
}

// Packs through hf_packed and the repacker, so that the codecs are part of the test.
PackedTensor Pack(const std::vector<int8_t>& trits, size_t rows, size_t cols, Scales scales) {
  uint8_t* bytes = nullptr;
  const PackedTensor packed =
      PackedTensor::Allocate(Layout::kHfPacked, rows, cols, std::move(scales), &bytes);
  HfPack(trits, rows, cols, {bytes, packed.bytes().size()});
  return RepackT16(packed, Team(1));
}

// The same for two planes, through two_plane.
PackedTensor PackLevels(const std::vector<int8_t>& levels, size_t rows, size_t cols,
                        Scales scales) {
  uint8_t* bytes = nullptr;
  const PackedTensor packed =
      PackedTensor::Allocate(Layout::kTwoPlane, rows, cols, std::move(scales), &bytes);
  TwoPlanePack(levels, rows, cols, {bytes, packed.bytes().size()});
  return RepackT8(packed, Team(1));
}

void TestTernaryDot(Tester& test, size_t rows, size_t cols) {
  std::vector<int8_t> trits = test.Trits(rows * cols);
  std::fill_n(trits.begin(), cols, int8_t{1});  // one row at the end of the range
  const PackedTensor weight =
      Pack(trits, rows, cols, RandomScales(test, ScaleKind::kTensor, rows, cols));
  for (const int extreme : {0, 127, -128}) {
    AlignedArray<int8_t> codes(PaddedCols(cols));
    for (size_t i = 0; i < cols; ++i)
      codes[i] = static_cast<int8_t>(extreme != 0 ? extreme : test.Int(-128, 127));
    std::vector<int32_t> sums(rows);
    TernaryDot(weight, codes.data(), 0, PanelCount(rows), sums.data());
    const std::string what =
        StrCat("ternary dot ", rows, " x ", cols, ", activations of ", extreme);
    const std::vector<int32_t> expected =
        reference::TernaryDot(trits, rows, codes.span().first(cols));
    test.Expect(what, sums == expected);
    TernaryDot(RepackT20(weight, Team(1)), codes.data(), 0, PanelCount(rows), sums.data());
    test.Expect(what + ", t20", sums == expected);
  }
}

void TestTernaryLinear(Tester& test, ScaleKind kind, size_t rows, size_t cols, size_t tokens) {
  const std::vector<int8_t> trits = test.Trits(rows * cols);
  const Scales scales = RandomScales(test, kind, rows, cols);
  const PackedTensor weight = Pack(trits, rows, cols, scales);
  const PackedTensor dense = RepackT20(weight, Team(1));
  const std::vector<float> x = test.Floats(tokens * cols);
  LinearInput input(tokens, cols);
  for (size_t t = 0; t < tokens; ++t) std::copy_n(x.data() + t * cols, cols, input.Row(t));
  const std::pair<ActivationMode, int> modes[] = {{ActivationMode::kInt8, kInt8MaxCode},
                                                  {ActivationMode::kInt16, kInt16MaxCode},
                                                  {ActivationMode::kFloat, 0}};
  for (const auto& [tested_mode, max_code] : modes) {
    const ActivationMode mode = tested_mode;  // clang captures no structured binding
    for (size_t t = 0; t < tokens; ++t) input.Quantize(mode, t, tokens, cols);
    std::vector<float> out(tokens * rows);
    const LinearJob job[] = {{&weight, out.data(), rows}};
    Team(2).Run([&](Worker& worker) { RunLinears(worker, job, input, tokens, mode); });
    std::vector<float> dense_out(tokens * rows);
    const LinearJob dense_job[] = {{&dense, dense_out.data(), rows}};
    Team(2).Run([&](Worker& worker) { RunLinears(worker, dense_job, input, tokens, mode); });
    test.Expect(StrCat("t16 and t20 agree, activations up to ", max_code), out == dense_out);
    for (size_t t = 0; t < tokens; ++t) {
      const std::span<const float> token = std::span(x).subspan(t * cols, cols);
      const std::vector<double> expected =
          max_code == 0 ? reference::TernaryLinearF32(trits, rows, scales, token)
                        : reference::TernaryLinearInteger(trits, rows, scales, token, max_code);
      for (size_t row = 0; row < rows; ++row) {
        test.ExpectNear(StrCat("ternary linear, activations up to ", max_code), expected[row],
                        static_cast<double>(out[t * rows + row]), 4 * Magnitude(token));
      }
    }
  }
}

void TestTwoPlaneDot(Tester& test, size_t rows, size_t cols) {
  std::vector<int8_t> levels = test.Levels(rows * cols, 4);
  std::fill_n(levels.begin(), cols, int8_t{4});
  const PackedTensor weight =
      PackLevels(levels, rows, cols, RandomScales(test, ScaleKind::kTensor, rows, cols));
  for (const int extreme : {0, 127, -128}) {
    AlignedArray<int8_t> codes(PaddedCols(cols));
    for (size_t i = 0; i < cols; ++i)
      codes[i] = static_cast<int8_t>(extreme != 0 ? extreme : test.Int(-128, 127));
    std::vector<int32_t> sums(rows);
    TwoPlaneDot(weight, codes.data(), 0, PanelCount(rows), sums.data());
    test.Expect(StrCat("two-plane dot ", rows, " x ", cols, ", activations of ", extreme),
                sums == reference::TernaryDot(levels, rows, codes.span().first(cols)));
  }
}

void TestTwoPlaneLinear(Tester& test, ScaleKind kind, size_t rows, size_t cols, size_t tokens) {
  const std::vector<int8_t> levels = test.Levels(rows * cols, 4);
  const Scales scales = RandomScales(test, kind, rows, cols);
  const PackedTensor weight = PackLevels(levels, rows, cols, scales);
  const std::vector<float> x = test.Floats(tokens * cols);
  const std::pair<ActivationMode, int> modes[] = {{ActivationMode::kInt8, kInt8MaxCode},
                                                  {ActivationMode::kInt16, kInt16MaxCode},
                                                  {ActivationMode::kFloat, 0}};
  for (const auto& [mode, max_code] : modes) {
    std::vector<float> out(tokens * rows);
    const LinearJob job[] = {{&weight, out.data(), weight.rows()}};
    ApplyLinears(job, x.data(), tokens, mode, Team(2));
    for (size_t t = 0; t < tokens; ++t) {
      const std::span<const float> token = std::span(x).subspan(t * cols, cols);
      const std::vector<double> expected =
          max_code == 0 ? reference::TernaryLinearF32(levels, rows, scales, token)
                        : reference::TernaryLinearInteger(levels, rows, scales, token, max_code);
      for (size_t row = 0; row < rows; ++row) {
        test.ExpectNear(StrCat("two-plane linear, activations up to ", max_code), expected[row],
                        static_cast<double>(out[t * rows + row]), 16 * Magnitude(token));
      }
    }
  }
}

void TestDenseLinear(Tester& test, size_t rows, size_t cols, size_t tokens) {
  const std::vector<float> values = test.Floats(rows * cols);
  std::vector<uint16_t> half(values.size());
  std::transform(values.begin(), values.end(), half.begin(), F16FromFloat);
  const auto* half_bytes = reinterpret_cast<const uint8_t*>(half.data());
  const PackedTensor weights[] = {
      PackedTensor(Layout::kF32, rows, cols, AsBytes(values), nullptr, {}),
      PackedTensor(Layout::kF16, rows, cols, {half_bytes, 2 * half.size()}, nullptr, {}),
      PackedTensor(Layout::kBf16, rows, cols, {half_bytes, 2 * half.size()}, nullptr, {}),
  };
  const std::vector<float> x = test.Floats(tokens * cols);
  for (const PackedTensor& weight : weights) {
    std::vector<float> out(tokens * rows);
    std::vector<double> expected(tokens * rows);
    DenseLinear(weight, x.data(), tokens, cols, 0, rows, out.data(), rows);
    reference::DenseLinear(weight, x.data(), tokens, expected.data());
    for (size_t i = 0; i < out.size(); ++i) {
      std::vector<float> row(cols);
      CopyRow(weight, i % rows, row.data());
      test.ExpectNear(StrCat("dense linear ", LayoutName(weight.layout())), expected[i],
                      static_cast<double>(out[i]), Magnitude(row));
    }
  }
}

void TestVectors(Tester& test, size_t size) {
  const std::vector<float> x = test.Floats(size), y = test.Floats(size), z = test.Floats(size);
  std::vector<float> out(size);
  std::vector<double> expected(size);
  const auto compare = [&](std::string_view what) {
    for (size_t i = 0; i < size; ++i)
      test.ExpectNear(what, expected[i], static_cast<double>(out[i]), 4.0);
  };
  RmsNorm(x.data(), y.data(), size, 1e-5f, out.data());
  reference::RmsNorm(x.data(), y.data(), size, 1e-5f, expected.data());
  compare("rms norm");
  LayerNorm(x.data(), y.data(), z.data(), size, 1e-5f, out.data());
  reference::LayerNorm(x.data(), y.data(), z.data(), size, 1e-5f, expected.data());
  compare("layer norm");
  SiluMultiply(x.data(), y.data(), size, out.data());
  reference::SiluMultiply(x.data(), y.data(), size, expected.data());
  compare("silu");
  ReluMultiply(x.data(), y.data(), size, out.data());
  reference::ReluMultiply(x.data(), y.data(), size, expected.data());
  compare("relu");
  ReluSquaredMultiply(x.data(), y.data(), size, out.data());
  reference::ReluSquaredMultiply(x.data(), y.data(), size, expected.data());
  compare("relu squared");
  GeluMultiply(x.data(), y.data(), size, out.data());
  reference::GeluMultiply(x.data(), y.data(), size, expected.data());
  compare("gelu");
  GeluErfMultiply(x.data(), y.data(), size, out.data());
  reference::GeluErfMultiply(x.data(), y.data(), size, expected.data());
  compare("exact gelu");
  out = x;
  Softmax(out.data(), size);
  reference::Softmax(x.data(), size, expected.data());
  compare("softmax");
  test.ExpectNear("log sum exp", reference::LogSumExp(x.data(), size),
                  static_cast<double>(LogSumExp(x.data(), size)), 4.0);
  if (size % 2 == 0) {
    out = x;
    RotateHalves(out.data(), y.data(), y.data() + size / 2, size / 2);
    reference::RotateHalves(x.data(), y.data(), y.data() + size / 2, size / 2, expected.data());
    compare("rope");
  }
}

void TestAttention(Tester& test, size_t head_dim, size_t begin, size_t length, float soft_cap) {
  const size_t head_bytes = KvHeadBytes(KvType::kF32, head_dim);
  const size_t blocks = DivCeil(length, kKvBlockTokens), heads = 3;
  const std::vector<float> queries = test.Floats(heads * head_dim);
  const std::vector<float> keys = test.Floats(length * head_dim),
                           values = test.Floats(length * head_dim);
  AlignedArray<uint8_t> cache(2 * head_bytes * blocks);
  std::vector<const uint8_t*> block_starts;
  for (size_t block = 0; block < blocks; ++block) {
    block_starts.push_back(cache.data() + 2 * block * head_bytes);
  }
  for (size_t t = 0; t < length; ++t) {
    uint8_t* block = cache.data() + 2 * (t / kKvBlockTokens) * head_bytes;
    const size_t slot = t % kKvBlockTokens;
    StoreKv(KvType::kF32, keys.data() + t * head_dim, head_dim, slot, block);
    StoreKv(KvType::kF32, values.data() + t * head_dim, head_dim, slot, block + head_bytes);
  }
  std::vector<float> scratch(AttentionScratch(heads, head_dim)), out(heads * head_dim);
  std::vector<double> expected(head_dim);
  AttendAll({KvType::kF32,
             head_dim,
             heads,
             queries.data(),
             {block_starts.data(), 0},
             {block_starts.data(), head_bytes},
             {begin, length, 0.3f, soft_cap}},
            scratch.data(), out.data());
  for (size_t head = 0; head < heads; ++head) {
    reference::AttendHead(queries.data() + head * head_dim, keys.data() + begin * head_dim,
                          values.data() + begin * head_dim, head_dim, length - begin, 0.3f,
                          soft_cap, expected.data());
    for (size_t i = 0; i < head_dim; ++i) {
      test.ExpectNear("attention", expected[i], static_cast<double>(out[head * head_dim + i]), 4.0);
    }
  }
}

}  // namespace

std::vector<std::string> SelfTest() {
  Tester test;
  const std::pair<size_t, size_t> shapes[] = {{4, 1}, {16, 16}, {20, 33}, {36, 257}, {48, 6912}};
  for (const auto& [rows, cols] : shapes) {
    TestTernaryDot(test, rows, cols);
    TestTwoPlaneDot(test, rows, cols);
    for (const ScaleKind kind : {ScaleKind::kTensor, ScaleKind::kRow, ScaleKind::kGroup}) {
      for (const size_t tokens : {1u, 2u, 3u, 9u}) {
        TestTernaryLinear(test, kind, rows, std::min<size_t>(cols, 700), tokens);
        TestTwoPlaneLinear(test, kind, rows, std::min<size_t>(cols, 700), tokens);
      }
    }
    TestDenseLinear(test, rows, std::min<size_t>(cols, 300), 3);
  }
  for (const size_t size : {1u, 2u, 15u, 16u, 17u, 31u, 64u, 1001u}) TestVectors(test, size);
  for (const size_t length : {1u, 31u, 32u, 33u, 100u, 600u}) {
    TestAttention(test, 8, 0, length, 0.0f);
    TestAttention(test, 80, length / 3, length, 2.0f);
  }
  return test.TakeErrors();
}

}  // namespace tf
