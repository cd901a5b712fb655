// SPDX-License-Identifier: Apache-2.0
// Blocks of the matrix are packed into the first cache, where four columns at a time meet two
// vectors of sums in registers.
#include "kernels/tile_products.h"

#include <algorithm>

#include "simd/highway_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/tile_products.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tf::HWY_NAMESPACE {

inline constexpr size_t kBlockTerms = 128, kBlockColumns = 32;  // 32 KiB
inline constexpr size_t kTogether = 4;                          // columns in registers

#if HWY_HAVE_FLOAT64
namespace hn = hwy::HWY_NAMESPACE;

// Four columns, `factors` [count][kTogether].
void AddTogether(const double* HWY_RESTRICT factors, size_t count, size_t width,
                 const double* HWY_RESTRICT values, double* HWY_RESTRICT sums) {
  const hn::CappedTag<double, kProductRows / 2> d;
  const size_t lanes = hn::Lanes(d);
  for (size_t row = 0; row < width; row += 2 * lanes) {
    double* to = sums + row;
    auto s00 = hn::LoadU(d, to), s01 = hn::LoadU(d, to + lanes);
    auto s10 = hn::LoadU(d, to + width), s11 = hn::LoadU(d, to + width + lanes);
    auto s20 = hn::LoadU(d, to + 2 * width), s21 = hn::LoadU(d, to + 2 * width + lanes);
    auto s30 = hn::LoadU(d, to + 3 * width), s31 = hn::LoadU(d, to + 3 * width + lanes);
    const double* value = values + row;
    const double* factor = factors;
    for (size_t t = 0; t < count; ++t, value += width, factor += kTogether) {
      const auto v0 = hn::LoadU(d, value), v1 = hn::LoadU(d, value + lanes);
      const auto f0 = hn::Set(d, factor[0]), f1 = hn::Set(d, factor[1]);
      s00 = hn::Add(s00, hn::Mul(f0, v0));
      s01 = hn::Add(s01, hn::Mul(f0, v1));
      s10 = hn::Add(s10, hn::Mul(f1, v0));
      s11 = hn::Add(s11, hn::Mul(f1, v1));
      const auto f2 = hn::Set(d, factor[2]), f3 = hn::Set(d, factor[3]);
      s20 = hn::Add(s20, hn::Mul(f2, v0));
      s21 = hn::Add(s21, hn::Mul(f2, v1));
      s30 = hn::Add(s30, hn::Mul(f3, v0));
      s31 = hn::Add(s31, hn::Mul(f3, v1));
    }
    hn::StoreU(s00, d, to);
    hn::StoreU(s01, d, to + lanes);
    hn::StoreU(s10, d, to + width);
    hn::StoreU(s11, d, to + width + lanes);
    hn::StoreU(s20, d, to + 2 * width);
    hn::StoreU(s21, d, to + 2 * width + lanes);
    hn::StoreU(s30, d, to + 3 * width);
    hn::StoreU(s31, d, to + 3 * width + lanes);
  }
}

// sum [width] += factor * value [width].
void AddOne(double factor, size_t width, const double* HWY_RESTRICT value,
            double* HWY_RESTRICT sum) {
  const hn::CappedTag<double, kProductRows / 2> d;
  const auto wide = hn::Set(d, factor);
  for (size_t row = 0; row < width; row += hn::Lanes(d)) {
    const auto product = hn::Mul(wide, hn::LoadU(d, value + row));
    hn::StoreU(hn::Add(hn::LoadU(d, sum + row), product), d, sum + row);
  }
}
#else
void AddOne(double factor, size_t width, const double* value, double* sum) {
  for (size_t row = 0; row < width; ++row) sum[row] += factor * value[row];
}

void AddTogether(const double* factors, size_t count, size_t width, const double* values,
                 double* sums) {
  for (size_t t = 0; t < count; ++t) {
    for (size_t i = 0; i < kTogether; ++i) {
      AddOne(factors[t * kTogether + i], width, values + t * width, sums + i * width);
    }
  }
}
#endif

// A block of the matrix, term after term for every kTogether columns.
void Pack(const double* from, size_t row_step, size_t column_step, size_t count, size_t columns,
          double* packed) {
  for (size_t i = 0; i < columns; i += kTogether, packed += count * kTogether) {
    for (size_t t = 0; t < count; ++t) {
      for (size_t c = 0; c < kTogether; ++c) {
        packed[t * kTogether + c] = from[t * row_step + (i + c) * column_step];
      }
    }
  }
}

void TileProducts(const double* matrix, size_t stride, bool transposed, Range terms, Range columns,
                  size_t width, const double* values, double* sums) {
  const size_t row_step = transposed ? 1 : stride, column_step = transposed ? stride : 1;
  const size_t block = terms.end - terms.begin == 1 ? 0 : kBlockColumns;
  double packed[kBlockTerms * kBlockColumns];
  for (size_t first = terms.begin; first < terms.end; first += kBlockTerms) {
    const size_t count = std::min(kBlockTerms, terms.end - first);
    const double* value = values + first * width;
    size_t k = columns.begin;
    while (k < columns.end) {
      const size_t size = std::min(block, columns.end - k) / kTogether * kTogether;
      const double* from = matrix + first * row_step + k * column_step;
      if (size > 0) {
        Pack(from, row_step, column_step, count, size, packed);
        for (size_t i = 0; i < size; i += kTogether) {
          AddTogether(packed + i * count, count, width, value, sums + (k + i) * width);
        }
        k += size;
      } else {
        for (size_t t = 0; t < count; ++t) {
          AddOne(from[t * row_step], width, value + t * width, sums + k * width);
        }
        ++k;
      }
    }
  }
}

}  // namespace tf::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tf {
namespace {

HWY_EXPORT(TileProducts);

}  // namespace

void AddTileProducts(const double* matrix, size_t stride, bool transposed, Range terms,
                     Range columns, size_t width, const double* values, double* sums) {
  HWY_DYNAMIC_DISPATCH(TileProducts)
  (matrix, stride, transposed, terms, columns, width, values, sums);
}

}  // namespace tf
#endif  // HWY_ONCE
