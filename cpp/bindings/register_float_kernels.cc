// SPDX-License-Identifier: Apache-2.0
// Python module `kernels`, the part on floats: norm, rotation, softmax, activations, attention.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "bindings/array.h"
#include "bindings/kv_type.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/softmax.h"

namespace tf {
namespace {

namespace py = pybind11;

using Floats = py::array_t<float>;

std::span<const float> TakeFloats(const py::array& array, py::ssize_t rank, std::string_view op,
                                  std::string_view name) {
  return TakeArray<float>(array, rank, op, name);
}

// The length of the last axis, at least one.
size_t RowSize(const py::array& array, std::string_view op, std::string_view name) {
  Check(array.ndim() > 0 && array.shape(array.ndim() - 1) > 0, "[", op, "] the last axis of ", name,
        " has at least one element, got none");
  return static_cast<size_t>(array.shape(array.ndim() - 1));
}

Floats PyRmsNorm(const py::array& x, const py::array& weight, float epsilon) {
  const auto x_span = TakeFloats(x, kAnyRank, "rms_norm", "x");
  const auto weight_span = TakeFloats(weight, 1, "rms_norm", "weight");
  const size_t size = RowSize(x, "rms_norm", "x");
  Check(weight_span.size() == size, "[rms_norm] weight has the length of x's last axis, ", size,
        ", got ", weight_span.size());
  Floats out(ShapeOf(x));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    for (size_t i = 0; i < x_span.size(); i += size) {
      RmsNorm(x_span.data() + i, weight_span.data(), size, epsilon, out_span.data() + i);
    }
  }
  return out;
}

Floats PyLayerNorm(const py::array& x, const py::array& weight, const py::array& bias,
                   float epsilon) {
  const auto x_span = TakeFloats(x, kAnyRank, "layer_norm", "x");
  const auto weight_span = TakeFloats(weight, 1, "layer_norm", "weight");
  const auto bias_span = TakeFloats(bias, 1, "layer_norm", "bias");
  const size_t size = RowSize(x, "layer_norm", "x");
  Check(weight_span.size() == size && bias_span.size() == size,
        "[layer_norm] weight and bias have the length of x's last axis, ", size, ", got ",
        weight_span.size(), " and ", bias_span.size());
  Floats out(ShapeOf(x));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    for (size_t i = 0; i < x_span.size(); i += size) {
      LayerNorm(x_span.data() + i, weight_span.data(), bias_span.data(), size, epsilon,
                out_span.data() + i);
    }
  }
  return out;
}

Floats PyRotateHalves(const py::array& heads, const py::array& cos, const py::array& sin) {
  const auto heads_span = TakeFloats(heads, kAnyRank, "rotate_halves", "heads");
  const auto cos_span = TakeFloats(cos, 1, "rotate_halves", "cos");
  const auto sin_span = TakeFloats(sin, 1, "rotate_halves", "sin");
  const size_t head_dim = RowSize(heads, "rotate_halves", "heads");
  const size_t half = head_dim / 2;
  Check(head_dim % 2 == 0, "[rotate_halves] the last axis of heads is even, got ", head_dim);
  Check(cos_span.size() == half && sin_span.size() == half,
        "[rotate_halves] cos and sin have half the length of a head, ", half, ", got ",
        cos_span.size(), " and ", sin_span.size());
  Floats out(ShapeOf(heads));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    std::copy(heads_span.begin(), heads_span.end(), out_span.begin());
    for (size_t i = 0; i < out_span.size(); i += head_dim) {
      RotateHalves(out_span.data() + i, cos_span.data(), sin_span.data(), half);
    }
  }
  return out;
}

Floats PySoftmax(const py::array& x) {
  const auto x_span = TakeFloats(x, kAnyRank, "softmax", "x");
  const size_t size = RowSize(x, "softmax", "x");
  Floats out(ShapeOf(x));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    std::copy(x_span.begin(), x_span.end(), out_span.begin());
    for (size_t i = 0; i < out_span.size(); i += size) Softmax(out_span.data() + i, size);
  }
  return out;
}

float PyLogSumExp(const py::array& x) {
  const auto x_span = TakeFloats(x, 1, "log_sum_exp", "x");
  const size_t size = RowSize(x, "log_sum_exp", "x");
  py::gil_scoped_release unlocked;
  return LogSumExp(x_span.data(), size);
}

using PairKernel = void(const float* gate, const float* up, size_t size, float* out);

Floats MapPairs(PairKernel* kernel, const py::array& gate, const py::array& up,
                std::string_view op) {
  const auto gate_span = TakeFloats(gate, kAnyRank, op, "gate");
  const auto up_span = TakeFloats(up, kAnyRank, op, "up");
  Check(ShapeOf(gate) == ShapeOf(up), "[", op, "] gate and up have one shape, got ",
        gate_span.size(), " and ", up_span.size(), " elements in ", gate.ndim(), " and ", up.ndim(),
        " dimensions");
  Floats out(ShapeOf(gate));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    kernel(gate_span.data(), up_span.data(), out_span.size(), out_span.data());
  }
  return out;
}

Floats PySiluMultiply(const py::array& gate, const py::array& up) {
  return MapPairs(&SiluMultiply, gate, up, "silu_multiply");
}

Floats PyReluSquaredMultiply(const py::array& gate, const py::array& up) {
  return MapPairs(&ReluSquaredMultiply, gate, up, "relu_squared_multiply");
}

Floats PyGeluMultiply(const py::array& gate, const py::array& up) {
  return MapPairs(&GeluMultiply, gate, up, "gelu_multiply");
}

Floats PyReluMultiply(const py::array& gate, const py::array& up) {
  return MapPairs(&ReluMultiply, gate, up, "relu_multiply");
}

Floats PyGeluErfMultiply(const py::array& gate, const py::array& up) {
  return MapPairs(&GeluErfMultiply, gate, up, "gelu_erf_multiply");
}

// Keys and values in cache blocks that lie in memory in reverse order, with all bits set wherever
// no token is, so that attention has to follow the block pointers and must not read too far.
class ReversedCache {
 public:
  ReversedCache(KvType type, std::span<const float> keys, std::span<const float> values,
                size_t head_dim)
      : head_bytes_(KvHeadBytes(type, head_dim)) {
    const size_t length = keys.size() / head_dim;
    const size_t count = DivCeil(length, kKvBlockTokens);
    storage_ = AlignedArray<uint8_t>(2 * head_bytes_ * count);
    std::fill_n(storage_.data(), storage_.size(), uint8_t{0xFF});
    for (size_t block = 0; block < count; ++block) {
      uint8_t* data = storage_.data() + (count - 1 - block) * 2 * head_bytes_;
      const size_t begin = block * kKvBlockTokens;
      for (size_t t = begin; t < std::min(begin + kKvBlockTokens, length); ++t) {
        StoreKv(type, keys.data() + t * head_dim, head_dim, t - begin, data);
        StoreKv(type, values.data() + t * head_dim, head_dim, t - begin, data + head_bytes_);
      }
      blocks_.push_back(data);
    }
  }

  KvHead keys() const { return {blocks_.data(), 0}; }
  KvHead values() const { return {blocks_.data(), head_bytes_}; }

 private:
  size_t head_bytes_;
  AlignedArray<uint8_t> storage_;
  std::vector<const uint8_t*> blocks_;
};

Floats PyAttend(const py::array& queries, const py::array& keys, const py::array& values,
                float scale, size_t begin, float soft_cap, const std::string& kv) {
  const KvType type = KvTypeFromName(kv);
  const auto query_span = TakeFloats(queries, 2, "attend", "queries");
  const auto keys_span = TakeFloats(keys, 2, "attend", "keys");
  const auto values_span = TakeFloats(values, 2, "attend", "values");
  const size_t head_dim = RowSize(queries, "attend", "queries");
  const size_t length = static_cast<size_t>(keys.shape(0));
  const std::vector<size_t> expected{length, head_dim};
  Check(length > 0 && ShapeOf(keys) == expected && ShapeOf(values) == expected,
        "[attend] keys and values are [tokens, ", head_dim, "] with at least one token, got [",
        keys.shape(0), ", ", keys.shape(1), "] and [", values.shape(0), ", ", values.shape(1), "]");
  Check(begin < length, "[attend] begin lies below ", length, " tokens, got ", begin);
  Floats out(ShapeOf(queries));
  const auto out_span = SpanOf(out);
  {
    py::gil_scoped_release unlocked;
    const ReversedCache cache(type, keys_span, values_span, head_dim);
    const size_t heads = query_span.size() / head_dim;
    AlignedArray<float> scratch(AttentionScratch(heads, head_dim));
    AttendAll({type,
               head_dim,
               heads,
               query_span.data(),
               cache.keys(),
               cache.values(),
               {begin, length, scale, soft_cap}},
              scratch.data(), out_span.data());
  }
  return out;
}

}  // namespace

void register_float_kernels(py::module_& kernels) {
  kernels.def("rms_norm", &PyRmsNorm, py::arg("x"), py::arg("weight"), py::arg("epsilon"),
              "x / sqrt(mean(x^2) + epsilon) * weight over the last axis.");
  kernels.def("layer_norm", &PyLayerNorm, py::arg("x"), py::arg("weight"), py::arg("bias"),
              py::arg("epsilon"),
              "(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis.");
  kernels.def(
      "rotate_halves", &PyRotateHalves, py::arg("heads"), py::arg("cos"), py::arg("sin"),
      "Every head [..., 2 n] with pairs (i, n + i) rotated by the angles of cos and sin [n].");
  kernels.def("softmax", &PySoftmax, py::arg("x"), "Softmax over the last axis.");
  kernels.def("log_sum_exp", &PyLogSumExp, py::arg("x"), "log(sum(exp(x))) of a vector.");
  kernels.def("silu_multiply", &PySiluMultiply, py::arg("gate"), py::arg("up"),
              "gate / (1 + exp(-gate)) * up.");
  kernels.def("relu_multiply", &PyReluMultiply, py::arg("gate"), py::arg("up"),
              "max(gate, 0) * up.");
  kernels.def("relu_squared_multiply", &PyReluSquaredMultiply, py::arg("gate"), py::arg("up"),
              "max(gate, 0)^2 * up.");
  kernels.def(
      "attend", &PyAttend, py::arg("queries"), py::arg("keys"), py::arg("values"), py::arg("scale"),
      py::kw_only(), py::arg("begin") = 0, py::arg("soft_cap") = 0.0f, py::arg("kv") = "f32",
      "softmax(scale * keys query) values of query heads [heads, n] that share one KV head, from "
      "keys and values [tokens, n] stored as kv; only tokens from `begin` on, scores s as soft_cap "
      "* tanh(s / soft_cap) unless that is 0.");
  kernels.def("gelu_multiply", &PyGeluMultiply, py::arg("gate"), py::arg("up"),
              "gelu(gate) * up, in the tanh form.");
  kernels.def("gelu_erf_multiply", &PyGeluErfMultiply, py::arg("gate"), py::arg("up"),
              "gelu(gate) * up, in the exact form.");
}

}  // namespace tf
