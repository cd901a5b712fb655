// SPDX-License-Identifier: Apache-2.0
// From exact integer sums of codes to scaled floats: shared by the kernels on run-time tiles.

#if defined(TERNARYFORGE_KERNELS_EPILOGUE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TERNARYFORGE_KERNELS_EPILOGUE_INL_H_
#undef TERNARYFORGE_KERNELS_EPILOGUE_INL_H_
#else
#define TERNARYFORGE_KERNELS_EPILOGUE_INL_H_
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "formats/packed_tensor.h"
#include "formats/t16.h"
#include "formats/t8.h"
#include "kernels/quantize_acts.h"
#include "simd/float-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

// Tensor and row scales count as one group that spans all columns. Multiplications and additions
// are separate (never fused) and in the order of the groups, so that every target gives the same
// bits.
class Epilogue {
 public:
  Epilogue(const PackedTensor& weight, const QuantizedActs& acts)
      : weight_(weight),
        acts_(acts),
        scales_(weight.panel_scales()),
        groups_(weight.scales().PerRow(weight.cols())),
        group_chunks_(weight.scales().kind == ScaleKind::kGroup
                          ? weight.scales().group_size / kChunkCols
                          : ChunkCount(weight.cols())),
        bias_(weight.layout() == Layout::kT8 ? static_cast<uint32_t>(kT8Bias) : 1) {}

  using Sums = hn::Vec<hn::Rebind<int32_t, PartTag>>;  // of kPartLanes rows

  // total + scales * (sum of the rows' codes - act_sum).
  static HWY_INLINE Part AddExact(Part total, Sums sums, uint32_t act_sum, Part scales) {
    const hn::Rebind<uint32_t, PartTag> du32;
    const hn::Rebind<int32_t, PartTag> d32;
    // The codes are trit + 1 or level + 4, so every sum is too large by ActSum. Unsigned, because
    // parts may leave 32 bits where the result does not: |code| <= 32639, and CheckExact.
    const auto exact = hn::Sub(hn::BitCast(du32, sums), hn::Set(du32, act_sum));
    return hn::Add(total, hn::Mul(hn::ConvertTo(PartTag(), hn::BitCast(d32, exact)), scales));
  }

  // The sums of an int16 token from those of its two lanes, modulo 2^32.
  static HWY_INLINE Sums Join(Sums high, Sums low) {
    const hn::Rebind<uint32_t, PartTag> du32;
    const auto shifted = hn::ShiftLeft<8>(hn::BitCast(du32, high));
    return hn::BitCast(hn::Rebind<int32_t, PartTag>(), hn::Add(shifted, hn::BitCast(du32, low)));
  }

  // totals[row] += scale * (sum of the row's codes - ActSum of the group), for 16 rows of a panel
  // and one token. lane_sums: 16 sums for each lane of the token, `lane_stride` apart.
  HWY_INLINE void AddGroup(size_t panel, size_t group, size_t token, const int32_t* lane_sums,
                           size_t lane_stride, float* totals) const {
    const hn::Rebind<int32_t, PartTag> d32;
    const uint32_t act_sum = ActSum(group, token);
    const Lanes scales = LoadScales(panel, group);
    for (size_t p = 0; p < kParts; ++p) {
      const int32_t* from = lane_sums + p * kPartLanes;
      Sums sums = hn::LoadU(d32, from);
      if (acts_.lanes_per_token == 2) sums = Join(sums, hn::LoadU(d32, from + lane_stride));
      float* to = totals + p * kPartLanes;
      hn::StoreU(AddExact(hn::LoadU(PartTag(), to), sums, act_sum, scales.part[p]), PartTag(), to);
    }
  }

  // Writes the rows of a panel that exist to out[panel * 16 ..].
  HWY_INLINE void Store(size_t panel, size_t token, const float* totals, float* out) const {
    const size_t rows = std::min(kPanelRows, weight_.rows() - panel * kPanelRows);
    StoreFirst(Div(Load(totals), Broadcast(acts_.scales[token])), out + panel * kPanelRows, rows);
  }

  // The scales of 16 rows of a panel.
  HWY_INLINE Lanes LoadScales(size_t panel, size_t group) const {
    if (scales_ == nullptr) return Broadcast(weight_.scales().effective[0]);
    const size_t first = (panel * groups_ + group) * kPanelRows;
    if (scales_->half() != nullptr)
      return Load(reinterpret_cast<const F16*>(scales_->half() + first));
    return Load(scales_->single() + first);
  }

  // Asks memory for the scales that are `ahead` groups further on than these, in this panel or the
  // next ones.
  HWY_INLINE void PrefetchScales(size_t panel, size_t group, size_t ahead) const {
    if (scales_ == nullptr) return;
    const size_t first = (panel * groups_ + group + ahead) * kPanelRows;
    if (scales_->half() != nullptr) {
      hwy::Prefetch(scales_->half() + first);
    } else {
      hwy::Prefetch(scales_->single() + first);
    }
  }

  // Sums of the activations of a group, times what a code is larger than its weight, modulo 2^32.
  HWY_INLINE uint32_t ActSum(size_t group, size_t token) const {
    const uint32_t* sums = acts_.prefix_sums + token * acts_.prefix_stride;
    const size_t end = std::min((group + 1) * group_chunks_, ChunkCount(weight_.cols()));
    return bias_ * (sums[end] - sums[group * group_chunks_]);
  }

 private:
  const PackedTensor& weight_;
  const QuantizedActs& acts_;
  const PanelScales* scales_;
  size_t groups_;
  size_t group_chunks_;
  uint32_t bias_;
};

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // TERNARYFORGE_KERNELS_EPILOGUE_INL_H_
