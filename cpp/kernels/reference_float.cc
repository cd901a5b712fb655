// SPDX-License-Identifier: Apache-2.0
// Plain loops in double.
#include "kernels/reference_float.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "base/float16.h"

namespace tf::reference {
namespace {

template <typename T>
T ElementOf(const PackedTensor& weight, size_t index) {
  T element;
  std::memcpy(&element, weight.bytes().data() + index * sizeof(T), sizeof(T));
  return element;
}

// exp(x - max), so that no term overflows, and their sum.
double Exponentials(const double* x, size_t size, double* exps) {
  const double max = *std::max_element(x, x + size);
  double sum = 0.0;
  for (size_t i = 0; i < size; ++i) {
    exps[i] = std::exp(x[i] - max);
    sum += exps[i];
  }
  return sum;
}

}  // namespace

double DenseWeight(const PackedTensor& weight, size_t row, size_t col) {
  const size_t index = row * weight.cols() + col;
  switch (weight.layout()) {
    case Layout::kF32:
      return static_cast<double>(ElementOf<float>(weight, index));
    case Layout::kF16:
      return static_cast<double>(FloatFromF16(ElementOf<uint16_t>(weight, index)));
    case Layout::kBf16:
      return static_cast<double>(FloatFromBf16(ElementOf<uint16_t>(weight, index)));
    default: {
      const Scales& scales = weight.scales();
      const float scale = scales.effective[scales.kind == ScaleKind::kRow ? row : 0];
      return static_cast<double>(ElementOf<int8_t>(weight, index)) * static_cast<double>(scale);
    }
  }
}

void DenseLinear(const PackedTensor& weight, const float* x, size_t tokens, double* out) {
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t row = 0; row < weight.rows(); ++row) {
      double sum = 0.0;
      for (size_t col = 0; col < weight.cols(); ++col) {
        sum += DenseWeight(weight, row, col) * static_cast<double>(x[t * weight.cols() + col]);
      }
      out[t * weight.rows() + row] = sum;
    }
  }
}

void RmsNorm(const float* x, const float* weight, size_t size, float epsilon, double* out) {
  double squares = 0.0;
  for (size_t i = 0; i < size; ++i)
    squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double root = std::sqrt(squares / static_cast<double>(size) + static_cast<double>(epsilon));
  for (size_t i = 0; i < size; ++i) {
    out[i] = static_cast<double>(x[i]) / root * static_cast<double>(weight[i]);
  }
}

void LayerNorm(const float* x, const float* weight, const float* bias, size_t size, float epsilon,
               double* out) {
  const double count = static_cast<double>(size);
  double mean = 0, variance = 0;
  for (size_t i = 0; i < size; ++i) mean += static_cast<double>(x[i]) / count;
  for (size_t i = 0; i < size; ++i) {
    variance += std::pow(static_cast<double>(x[i]) - mean, 2) / count;
  }
  const double factor = 1.0 / std::sqrt(variance + static_cast<double>(epsilon));
  for (size_t i = 0; i < size; ++i) {
    out[i] = (static_cast<double>(x[i]) - mean) * factor * static_cast<double>(weight[i]) +
             static_cast<double>(bias[i]);
  }
}

void RotateHalves(const float* head, const float* cos, const float* sin, size_t half, double* out) {
  for (size_t i = 0; i < half; ++i) {
    const double a = static_cast<double>(head[i]);
    const double b = static_cast<double>(head[half + i]);
    const double c = static_cast<double>(cos[i]);
    const double s = static_cast<double>(sin[i]);
    out[i] = a * c - b * s;
    out[half + i] = b * c + a * s;
  }
}

void Softmax(const float* x, size_t size, double* out) {
  const std::vector<double> values(x, x + size);
  const double sum = Exponentials(values.data(), size, out);
  for (size_t i = 0; i < size; ++i) out[i] /= sum;
}

double LogSumExp(const float* x, size_t size) {
  const std::vector<double> values(x, x + size);
  std::vector<double> exps(size);
  const double sum = Exponentials(values.data(), size, exps.data());
  return *std::max_element(values.begin(), values.end()) + std::log(sum);
}

void SiluMultiply(const float* gate, const float* up, size_t size, double* out) {
  for (size_t i = 0; i < size; ++i) {
    const double g = static_cast<double>(gate[i]);
    out[i] = g / (1.0 + std::exp(-g)) * static_cast<double>(up[i]);
  }
}

void ReluMultiply(const float* gate, const float* up, size_t size, double* out) {
  for (size_t i = 0; i < size; ++i) {
    out[i] = std::max(static_cast<double>(gate[i]), 0.0) * static_cast<double>(up[i]);
  }
}

void ReluSquaredMultiply(const float* gate, const float* up, size_t size, double* out) {
  for (size_t i = 0; i < size; ++i) {
    const double relu = std::max(static_cast<double>(gate[i]), 0.0);
    out[i] = relu * relu * static_cast<double>(up[i]);
  }
}

void GeluMultiply(const float* gate, const float* up, size_t size, double* out) {
  const double factor = std::sqrt(2.0 / std::numbers::pi);
  for (size_t i = 0; i < size; ++i) {
    const double x = static_cast<double>(gate[i]);
    out[i] = x * (1.0 + std::tanh(factor * (x + 0.044715 * x * x * x))) / 2.0 *
             static_cast<double>(up[i]);
  }
}

void GeluErfMultiply(const float* gate, const float* up, size_t size, double* out) {
  for (size_t i = 0; i < size; ++i) {
    const double x = static_cast<double>(gate[i]);
    out[i] = x * (1.0 + std::erf(x / std::numbers::sqrt2)) / 2.0 * static_cast<double>(up[i]);
  }
}

void AttendHead(const float* query, const float* keys, const float* values, size_t head_dim,
                size_t length, float scale, float soft_cap, double* out) {
  const double cap = static_cast<double>(soft_cap);
  std::vector<double> scores(length, 0.0);
  for (size_t t = 0; t < length; ++t) {
    for (size_t i = 0; i < head_dim; ++i) {
      scores[t] += static_cast<double>(query[i]) * static_cast<double>(keys[t * head_dim + i]);
    }
    scores[t] *= static_cast<double>(scale);
    if (cap != 0.0) scores[t] = cap * std::tanh(scores[t] / cap);
  }
  const double sum = Exponentials(scores.data(), length, scores.data());
  for (size_t i = 0; i < head_dim; ++i) {
    out[i] = 0.0;
    for (size_t t = 0; t < length; ++t) {
      out[i] += scores[t] / sum * static_cast<double>(values[t * head_dim + i]);
    }
  }
}

}  // namespace tf::reference
