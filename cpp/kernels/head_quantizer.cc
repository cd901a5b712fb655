// SPDX-License-Identifier: Apache-2.0
// Making the quantized form of a head and of its activations; see head.h.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/check.h"
#include "kernels/dense_linear.h"
#include "kernels/head.h"
#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/head_quantizer.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "simd/float-inl.h"

#ifndef TERNARYFORGE_KERNELS_HEAD_QUANTIZER_ONCE
#define TERNARYFORGE_KERNELS_HEAD_QUANTIZER_ONCE
namespace tf {

// One row on its way into a panel.
struct HeadRow {
  const float* weights;  // groups * HeadGroupCols, zeros behind the last column
  size_t cols, groups;
  uint8_t* codes;         // as many
  uint8_t* group_scales;  // one every kHeadPanelRows bytes
  float row_scale;
  float square_sum;           // of the row as quantized
  float residual_square_sum;  // of what was taken away
  bool finite;
};

}  // namespace tf
#endif

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Rounded half to even.
HWY_INLINE Lanes RoundLanes(Lanes x) {
  for (size_t p = 0; p < kParts; ++p) x.part[p] = hn::Round(x.part[p]);
  return x;
}

HWY_INLINE Lanes MinLanes(Lanes a, const Lanes& b) {
  for (size_t p = 0; p < kParts; ++p) a.part[p] = hn::Min(a.part[p], b.part[p]);
  return a;
}

// The codes 0 .. 2^kBits - 1 of 16 weights. Products and sums are rounded apart, so that all
// targets choose the same.
template <size_t kBits>
HWY_INLINE Lanes CodesOf(const Lanes& weights, const Lanes& inverse) {
  constexpr float kLargest = static_cast<float>((1 << kBits) - 1);
  const Lanes code = RoundLanes(Add(Mul(weights, inverse), Broadcast(kLargest / 2)));
  return MinLanes(Max(code, ZeroLanes()), Broadcast(kLargest));
}

// What is lost of 16 weights.
template <size_t kBits>
HWY_INLINE Lanes LossOf(const Lanes& weights, const Lanes& codes, const Lanes& scale) {
  constexpr float kCenter = static_cast<float>((1 << kBits) - 1) / 2;
  return Sub(weights, Mul(Sub(codes, Broadcast(kCenter)), scale));
}

template <size_t kBits>
HWY_INLINE float SquaredLoss(const float* weights, float scale) {
  const Lanes inverse = Broadcast(1.0f / scale), scales = Broadcast(scale);
  Lanes sum = ZeroLanes();
  for (size_t i = 0; i < HeadGroupCols(kBits); i += kLanes) {
    const Lanes x = Load(weights + i);
    const Lanes loss = LossOf<kBits>(x, CodesOf<kBits>(x, inverse), scales);
    sum = Add(sum, Mul(loss, loss));
  }
  return SumLanes(sum);
}

// The group scale, 1 .. 255, with the least squared error around `wanted`, which makes the largest
// weight the outermost code. Larger ones are tried too: how 16 weights happen to fall on a grid of
// 6 bits matters as much as its step (errors 2 % below those of Q6_K; with smaller ones alone 12 %
// above).
template <size_t kBits>
HWY_INLINE uint8_t BestScale(const float* weights, float row_scale, float wanted) {
  float best = 0, least = std::numeric_limits<float>::infinity();
  float last = 0;
  for (const float share : {1.08f, 1.05f, 1.03f, 1.01f, 1.0f, 0.99f, 0.97f, 0.95f, 0.91f, 0.87f}) {
    const float candidate = HWY_MIN(HWY_MAX(1.0f, std::nearbyint(wanted * share)), 255.0f);
    if (candidate == last) continue;
    last = candidate;
    const float loss = SquaredLoss<kBits>(weights, row_scale * candidate);
    if (loss >= least && best != 0) continue;
    least = loss;
    best = candidate;
  }
  return static_cast<uint8_t>(best);
}

// `x`, zero behind column `cols` where `begin` is that of its first lane.
HWY_INLINE Lanes FirstOf(const Lanes& x, size_t cols, size_t begin) {
  if (begin + kLanes <= cols) return x;
  HWY_ALIGN float all[kLanes];
  Store(x, all);
  return LoadFirst(all, begin < cols ? cols - begin : 0);
}

template <size_t kBits>
HWY_INLINE void QuantizeRowOf(HeadRow& row) {
  constexpr size_t kCols = HeadGroupCols(kBits);
  constexpr float kHalf = static_cast<float>((1 << kBits) - 1) / 2;
  const size_t cols = row.groups * kCols;
  Lanes largest = ZeroLanes(), not_finite = ZeroLanes();
  for (size_t i = 0; i < cols; i += kLanes) {
    const Lanes x = Load(row.weights + i);
    largest = Max(largest, Max(x, Sub(ZeroLanes(), x)));
    not_finite = Add(not_finite, Mul(x, ZeroLanes()));  // NaN for infinities and NaN
  }
  row.finite = SumLanes(not_finite) == 0.0f;
  const float row_largest = MaxLane(largest);
  row.row_scale = row.square_sum = row.residual_square_sum = 0.0f;
  const bool zero = !(row_largest > 1e-30f);  // all quotients below stay normal
  if (!zero) {                                // up to eight significant bits
    const uint32_t bits = std::bit_cast<uint32_t>(row_largest / (kHalf * 255.0f));
    row.row_scale = std::bit_cast<float>((bits + 0xFFFFu) & 0xFFFF0000u);
  }
  Lanes squares = ZeroLanes(), residuals = ZeroLanes();
  for (size_t g = 0; g < row.groups; ++g) {
    const float* weights = row.weights + g * kCols;
    Lanes group_largest = ZeroLanes();
    for (size_t i = 0; i < kCols; i += kLanes) {
      const Lanes x = Load(weights + i);
      group_largest = Max(group_largest, Max(x, Sub(ZeroLanes(), x)));
    }
    uint8_t scale = 0;
    if (!zero) {
      const float wanted = MaxLane(group_largest) / kHalf / row.row_scale;
      if (wanted > 0) scale = BestScale<kBits>(weights, row.row_scale, wanted);
    }
    row.group_scales[g * kHeadPanelRows] = scale;
    const float step = row.row_scale * static_cast<float>(scale);
    const Lanes inverse = Broadcast(scale == 0 ? 0.0f : 1.0f / step), steps = Broadcast(step);
    for (size_t i = 0; i < kCols; i += kLanes) {
      const Lanes x = Load(weights + i);
      const Lanes codes = CodesOf<kBits>(x, inverse);
      const Lanes loss = FirstOf(LossOf<kBits>(x, codes, steps), row.cols, g * kCols + i);
      const Lanes all_kept = Sub(ZeroLanes(), LossOf<kBits>(ZeroLanes(), codes, steps));
      const Lanes kept = FirstOf(all_kept, row.cols, g * kCols + i);
      residuals = MulAdd(loss, loss, residuals);
      squares = MulAdd(kept, kept, squares);
      HWY_ALIGN float all[kLanes];
      Store(codes, all);
      for (size_t l = 0; l < kLanes; ++l) {
        row.codes[g * kCols + i + l] = static_cast<uint8_t>(all[l]);
      }
    }
  }
  row.square_sum = SumLanes(squares);
  row.residual_square_sum = SumLanes(residuals);
}

void QuantizeHeadRow(size_t bits, HeadRow& row) {
  switch (bits) {
    case 4:
      return QuantizeRowOf<4>(row);
    case 6:
      return QuantizeRowOf<6>(row);
    default:
      return QuantizeRowOf<8>(row);
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(QuantizeHeadRow);

// Not less than the root of a sum of `size` squares that was added up in f32, each square from a
// difference in f32: every rounding is below 2^-24 of its result, or 2^-149 where that is
// subnormal.
float NormAbove(float square_sum, size_t size) {
  const double n = static_cast<double>(size);
  const double norm = std::sqrt(static_cast<double>(square_sum)) * (1 + (n + 64) * 0x1p-23);
  return std::nextafter(static_cast<float>(norm + std::sqrt(n) * 0x1p-70),
                        std::numeric_limits<float>::infinity());
}

uint32_t FourCodes(const uint8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, sizeof(four));
  return four;
}

void PutFour(uint32_t four, uint8_t* to) { std::memcpy(to, &four, sizeof(four)); }

// Packs the codes of row `row` of a panel into one group.
void PackGroup(size_t bits, const uint8_t* codes, size_t row, uint8_t* group) {
  uint8_t* to = group + 4 * row;
  if (bits == 8) {
    for (size_t step = 0; step < 8; ++step) PutFour(FourCodes(codes + 4 * step), to + 64 * step);
    return;
  }
  constexpr uint32_t kNibbles = 0x0F0F0F0Fu;
  const size_t steps = HeadGroupCols(bits) / 4;
  uint32_t high = 0;
  for (size_t step = 0; step < steps; step += 2) {
    const uint32_t even = FourCodes(codes + 4 * step), odd = FourCodes(codes + 4 * step + 4);
    PutFour((even & kNibbles) | (odd & kNibbles) << 4, to + 32 * step);
    high |= (even >> 4 & 0x03030303u) << (2 * step % 8) | (odd >> 4 & 0x03030303u)
                                                              << (2 * step % 8 + 2);
  }
  if (bits == 6) PutFour(high, to + 128);
}

uint8_t CodeAt(size_t bits, const uint8_t* group, size_t row, size_t col) {
  const size_t step = col / 4, byte = 4 * row + col % 4;
  if (bits == 8) return group[64 * step + byte];
  const int low = group[64 * (step / 2) + byte] >> (4 * (step % 2)) & 15;
  if (bits == 4) return static_cast<uint8_t>(low);
  return static_cast<uint8_t>(low | (group[128 + byte] >> (2 * step) & 3) << 4);
}

}  // namespace

QuantizedHead::QuantizedHead(const PackedTensor& weight, size_t bits, const Team& team)
    : rows_(weight.rows()), cols_(weight.cols()), bits_(bits) {
  Check(bits == 4 || bits == 6 || bits == 8, "[head] a head has 4, 6 or 8 bits, got ", bits);
  Check(weight.alphabet() == Alphabet::kFloat, "[head] only a floating-point head is quantized");
  const size_t padded_rows = panels() * kHeadPanelRows,
               padded_cols = groups() * HeadGroupCols(bits);
  codes_ = AlignedArray<uint8_t>(panels() * groups() * HeadGroupBytes(bits));
  group_scales_ = AlignedArray<uint8_t>(padded_rows * groups());
  row_scales_ = AlignedArray<float>(padded_rows);
  norms_ = AlignedArray<float>(padded_rows);
  residuals_ = AlignedArray<float>(padded_rows);
  AlignedArray<float> all_weights(team.threads() * padded_cols);
  AlignedArray<uint8_t> all_codes(team.threads() * padded_cols);
  std::atomic<size_t> not_finite = rows_;
  team.Run([&](Worker& worker) {
    float* weights = all_weights.data() + worker.index() * padded_cols;
    uint8_t* codes = all_codes.data() + worker.index() * padded_cols;
    const Range share = worker.Share(panels());
    for (size_t r = share.begin * kHeadPanelRows; r < std::min(share.end * kHeadPanelRows, rows_);
         ++r) {
      const size_t panel = r / kHeadPanelRows, in_panel = r % kHeadPanelRows;
      tf::CopyRow(weight, r, weights);
      HeadRow row = {weights,
                     cols_,
                     groups(),
                     codes,
                     group_scales_.data() + panel * groups() * kHeadPanelRows + in_panel,
                     0,
                     0,
                     0,
                     true};
      HWY_DYNAMIC_DISPATCH(QuantizeHeadRow)(bits_, row);
      if (!row.finite) not_finite.store(r);
      row_scales_[r] = row.row_scale;
      norms_[r] = NormAbove(row.square_sum, cols_);
      residuals_[r] = NormAbove(row.residual_square_sum, cols_);
      for (size_t g = 0; g < groups(); ++g) {
        PackGroup(bits_, codes + g * HeadGroupCols(bits_), in_panel,
                  codes_.data() + (panel * groups() + g) * HeadGroupBytes(bits_));
      }
    }
  });
  Check(not_finite.load() == rows_, "[head] row ", not_finite.load(),
        " of the head holds a value that is not finite: only head=\"exact\" takes it");
  for (const float scale : row_scales_.span()) {
    largest_row_scale_ = std::max(largest_row_scale_, scale);
  }
}

void QuantizedHead::CopyRow(size_t row, float* out) const {
  const size_t group_cols = HeadGroupCols(bits_), panel = row / kHeadPanelRows;
  const size_t in_panel = row % kHeadPanelRows;
  const float center = static_cast<float>((1 << bits_) - 1) / 2;
  for (size_t col = 0; col < cols_; ++col) {
    const size_t group = panel * groups() + col / group_cols;
    const uint8_t code =
        CodeAt(bits_, codes_.data() + group * HeadGroupBytes(bits_), in_panel, col % group_cols);
    const auto scale = static_cast<float>(group_scales_[group * kHeadPanelRows + in_panel]);
    out[col] = (static_cast<float>(code) - center) * (row_scales_[row] * scale);
  }
}

HeadActs::HeadActs(size_t max_tokens, const QuantizedHead& head)
    : cols_(head.cols()),
      groups_(head.groups()),
      group_cols_(HeadGroupCols(head.bits())),
      stride_(groups_ * group_cols_),
      center_(static_cast<float>((1 << head.bits()) - 1) / 2),
      high_(max_tokens * stride_),
      low_(max_tokens * stride_),
      offsets_(max_tokens * groups_),
      scales_(max_tokens),
      norms_(max_tokens),
      residuals_(max_tokens) {}

bool HeadActs::Quantize(const float* x, size_t token) {
  float largest = 0.0f;
  bool finite = true;
  for (size_t i = 0; i < cols_; ++i) {
    finite &= std::abs(x[i]) <= std::numeric_limits<float>::max();
    largest = std::max(largest, std::abs(x[i]));
  }
  if (!finite) {
    scales_[token] = std::numeric_limits<float>::quiet_NaN();  // so are its products
    return false;
  }
  const bool zero = !(largest > 1e-30f);  // 16319 / largest must stay finite
  const float factor = zero ? 0.0f : 16319.0f / largest;
  const float scale = zero ? 0.0f : largest / 16319.0f;
  scales_[token] = scale;
  double squares = 0, residual_squares = 0;
  int8_t* high = high_.data() + token * stride_;
  int8_t* low = low_.data() + token * stride_;
  for (size_t g = 0; g < groups_; ++g) {
    int32_t sum = 0;
    for (size_t i = g * group_cols_; i < std::min((g + 1) * group_cols_, cols_); ++i) {
      const auto code =
          static_cast<int32_t>(std::clamp(std::nearbyint(x[i] * factor), -16319.0f, 16319.0f));
      high[i] = static_cast<int8_t>((code + 64) >> 7);
      low[i] = static_cast<int8_t>(code - 128 * high[i]);
      sum += code;
      const double value = static_cast<double>(x[i]);
      const double loss = value - static_cast<double>(scale) * static_cast<double>(code);
      squares += value * value;
      residual_squares += loss * loss;
    }
    offsets_[token * groups_ + g] = -center_ * static_cast<float>(sum);
  }
  norms_[token] = std::sqrt(squares) * (1 + 1e-9);
  residuals_[token] = std::sqrt(residual_squares) * (1 + 1e-9);
  return true;
}

}  // namespace tf
#endif  // HWY_ONCE
