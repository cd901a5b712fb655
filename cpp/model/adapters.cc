// SPDX-License-Identifier: Apache-2.0
// Checks and the second product of adapters; the first runs with the layer's own weights.
#include "model/adapters.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/dense_linear.h"

namespace tf {
namespace {

bool IsFinite(const PackedTensor& tensor) {
  for (size_t i = 0; i < tensor.bytes().size(); i += sizeof(float)) {
    float value = 0;
    std::memcpy(&value, tensor.bytes().data() + i, sizeof(value));
    if (!std::isfinite(value)) return false;
  }
  return true;
}

}  // namespace

void CheckAdapter(const std::string& slot, const Adapter& adapter, size_t rows, size_t cols) {
  const PackedTensor &a = adapter.a, &b = adapter.b;
  Check(a.cols() == cols && b.rows() == rows && a.rows() == b.cols(), "[adapter] '", slot,
        "' takes A [rank, ", cols, "] and B [", rows, ", rank], got [", a.rows(), ", ", a.cols(),
        "] and [", b.rows(), ", ", b.cols(), "]");
  Check(std::isfinite(adapter.scaling) && IsFinite(a) && IsFinite(b), "[adapter] '", slot,
        "' holds NaN or infinity");
}

void AddAdapter(const Worker& worker, const Adapter& adapter, const float* reduced,
                size_t reduced_stride, size_t tokens, float* sums, float* out, size_t out_stride) {
  const Range rows = worker.Share(adapter.b.rows());
  if (rows.begin == rows.end) return;
  DenseLinear(adapter.b, reduced, tokens, reduced_stride, rows.begin, rows.end, sums, out_stride);
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t row = rows.begin; row < rows.end; ++row) {
      out[t * out_stride + row] += adapter.scaling * sums[t * out_stride + row];
    }
  }
}

}  // namespace tf
