// SPDX-License-Identifier: Apache-2.0
// Matrix products with f32, f16, bf16 and int8 weights: register tiles of rows x tokens.
#include "kernels/dense_linear.h"

#include <cstring>

#include "base/float16.h"
#include "kernels/unpack.h"
#include "simd/highway_targets.h"
// After highway_targets.h
#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/dense_linear.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "simd/float-inl.h"

#ifndef TERNARYFORGE_KERNELS_DENSE_LINEAR_ONCE
#define TERNARYFORGE_KERNELS_DENSE_LINEAR_ONCE
namespace tf {

// The arguments of one call, with the weights as raw bytes.
struct DenseLinearArgs {
  const uint8_t* weight;
  const float* scales;  // null, or factors of the sums
  size_t scale_step;    // 1: one scale per row; 0: one for all
  size_t cols;
  const float* x;
  size_t tokens;
  size_t x_stride;
  size_t row_begin;
  size_t row_end;
  float* out;
  size_t out_stride;
};

}  // namespace tf
#endif

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Tiles are as large as the registers allow; every output is its own sum, so tiles do not change
// results. One token streams rows from memory; several tokens reuse each converted weight.
#if HWY_TARGET == HWY_AVX3  // 32 registers, one per 16 lanes
inline constexpr size_t kStreamRows = 4, kTileRows = 4, kTileTokens = 4;
#elif HWY_TARGET == HWY_AVX2     // 16 registers, two per 16 lanes
inline constexpr size_t kStreamRows = 4, kTileRows = 2, kTileTokens = 3;
#elif HWY_TARGET == TF_HWY_NEON  // 32 registers, four per 16 lanes
inline constexpr size_t kStreamRows = 4, kTileRows = 2, kTileTokens = 3;
#else                            // 16 registers, four per 16 lanes
inline constexpr size_t kStreamRows = 2, kTileRows = 1, kTileTokens = 3;
#endif

// Memory reads ahead within a page only, and a row is about one page: without this, every row
// starts with a wait.
template <size_t kBytes>
HWY_INLINE void PrefetchBytes(const uint8_t* bytes) {
  constexpr size_t kLine = 64;
  for (size_t i = 0; i < kBytes; i += kLine) hwy::Prefetch(bytes + i);
}

// Rows row .. row + kRows - 1 for tokens token .. token + kTokens - 1.
template <typename W, size_t kRows, size_t kTokens>
HWY_INLINE void LinearTile(const DenseLinearArgs& args, size_t row, size_t token) {
  const size_t cols = args.cols;
  const size_t x_stride = args.x_stride;
  const W* weight = reinterpret_cast<const W*>(args.weight) + row * cols;
  const float* x = args.x + token * x_stride;
  Lanes sum[kRows][kTokens];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTokens; ++t) sum[r][t] = ZeroLanes();
  }

  // The first tokens fetch the next rows, which lie right behind these, as one stream.
  const bool fetch_next = token == 0 && row + 2 * kRows <= args.row_end;
  const uint8_t* next = reinterpret_cast<const uint8_t*>(weight + kRows * cols);
  const size_t whole = cols - cols % kLanes;
  for (size_t c = 0; c < whole; c += kLanes) {
    constexpr size_t kBytesPerCol = kRows * sizeof(W);
    if (fetch_next) PrefetchBytes<kLanes * kBytesPerCol>(next + c * kBytesPerCol);
    // Part by part, so that few registers hold weights.
    for (size_t p = 0; p < kParts; ++p) {
      const size_t i = c + p * kPartLanes;
      Part w[kRows];
      for (size_t r = 0; r < kRows; ++r) w[r] = LoadPart(weight + r * cols + i);
      for (size_t t = 0; t < kTokens; ++t) {
        const Part x_part = LoadPart(x + t * x_stride + i);
        for (size_t r = 0; r < kRows; ++r) {
          sum[r][t].part[p] = hn::MulAdd(w[r], x_part, sum[r][t].part[p]);
        }
      }
    }
  }
  const size_t rest = cols - whole;
  if (rest != 0) {
    for (size_t r = 0; r < kRows; ++r) {
      const Lanes w = LoadFirst(weight + r * cols + whole, rest);
      for (size_t t = 0; t < kTokens; ++t) {
        sum[r][t] = MulAdd(w, LoadFirst(x + t * x_stride + whole, rest), sum[r][t]);
      }
    }
  }

  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTokens; ++t) {
      float result = SumLanes(sum[r][t]);
      if (args.scales != nullptr) result *= args.scales[(row + r) * args.scale_step];
      args.out[(token + t) * args.out_stride + row + r] = result;
    }
  }
}

// Rows row_begin .. row_end - 1 for kTokens tokens.
template <typename W, size_t kTokens>
HWY_INLINE void LinearRows(const DenseLinearArgs& args, size_t row_begin, size_t row_end,
                           size_t token) {
  constexpr size_t kRows = kTokens == 1 ? kStreamRows : kTileRows;
  size_t row = row_begin;
  for (; row + kRows <= row_end; row += kRows) LinearTile<W, kRows, kTokens>(args, row, token);
  for (; row < row_end; ++row) LinearTile<W, 1, kTokens>(args, row, token);
}

// Blocks of rows that stay in the second-level cache while all tokens pass by.
template <typename W>
HWY_INLINE void LinearOf(const DenseLinearArgs& args) {
  constexpr size_t kBlockBytes = size_t{128} << 10;
  constexpr size_t kTile = HWY_MAX(kTileRows, kStreamRows);  // a multiple of both
  const size_t block = (1 + kBlockBytes / (kTile * args.cols * sizeof(W))) * kTile;
  for (size_t row = args.row_begin; row < args.row_end; row += block) {
    const size_t row_end = HWY_MIN(row + block, args.row_end);
    for (size_t token = 0; token < args.tokens; token += kTileTokens) {
      switch (HWY_MIN(args.tokens - token, kTileTokens)) {
        case 1:
          LinearRows<W, 1>(args, row, row_end, token);
          break;
        case 2:
          LinearRows<W, 2>(args, row, row_end, token);
          break;
        case 3:
          LinearRows<W, 3>(args, row, row_end, token);
          break;
        default:
          LinearRows<W, kTileTokens>(args, row, row_end, token);
          break;
      }
    }
  }
}

void DenseLinearF32(const DenseLinearArgs& args) { LinearOf<float>(args); }
void DenseLinearF16(const DenseLinearArgs& args) { LinearOf<F16>(args); }
void DenseLinearBf16(const DenseLinearArgs& args) { LinearOf<Bf16>(args); }
void DenseLinearInt8(const DenseLinearArgs& args) { LinearOf<int8_t>(args); }

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(DenseLinearF32);
HWY_EXPORT(DenseLinearF16);
HWY_EXPORT(DenseLinearBf16);
HWY_EXPORT(DenseLinearInt8);

}  // namespace

void DenseLinear(const PackedTensor& weight, const float* x, size_t tokens, size_t x_stride,
                 size_t row_begin, size_t row_end, float* out, size_t out_stride) {
  const Scales& scales = weight.scales();
  const DenseLinearArgs args = {
      .weight = weight.bytes().data(),
      .scales = scales.kind == ScaleKind::kNone ? nullptr : scales.effective.data(),
      .scale_step = scales.kind == ScaleKind::kRow ? size_t{1} : size_t{0},
      .cols = weight.cols(),
      .x = x,
      .tokens = tokens,
      .x_stride = x_stride,
      .row_begin = row_begin,
      .row_end = row_end,
      .out = out,
      .out_stride = out_stride,
  };
  switch (weight.layout()) {
    case Layout::kF32:
      return HWY_DYNAMIC_DISPATCH(DenseLinearF32)(args);
    case Layout::kF16:
      return HWY_DYNAMIC_DISPATCH(DenseLinearF16)(args);
    case Layout::kBf16:
      return HWY_DYNAMIC_DISPATCH(DenseLinearBf16)(args);
    default:
      return HWY_DYNAMIC_DISPATCH(DenseLinearInt8)(args);
  }
}

void CopyRow(const PackedTensor& weight, size_t row, float* out) {
  const size_t cols = weight.cols();
  const Scales& scales = weight.scales();
  const uint8_t* bytes = weight.bytes().data();
  const auto half = [&](size_t col) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes + 2 * (row * cols + col), sizeof(bits));
    return bits;
  };
  switch (weight.layout()) {
    case Layout::kF32:
      std::memcpy(out, bytes + row * cols * sizeof(float), cols * sizeof(float));
      break;
    case Layout::kF16:
      for (size_t col = 0; col < cols; ++col) out[col] = FloatFromF16(half(col));
      break;
    case Layout::kBf16:
      for (size_t col = 0; col < cols; ++col) out[col] = FloatFromBf16(half(col));
      break;
    case Layout::kT8:
    case Layout::kT16:
      CopyTernaryRow(weight, row, out);
      break;
    default: {
      const float scale = scales.effective[scales.kind == ScaleKind::kRow ? row : 0];
      for (size_t col = 0; col < cols; ++col) {
        out[col] = static_cast<float>(static_cast<int8_t>(bytes[row * cols + col])) * scale;
      }
    }
  }
}

}  // namespace tf
#endif  // HWY_ONCE
