// SPDX-License-Identifier: Apache-2.0
// Bindings of the quantized output head, for tests and benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "bindings/array.h"
#include "bindings/registers.h"
#include "kernels/head.h"
#include "model/two_stage_head.h"

namespace tf {
namespace {

namespace py = pybind11;

using Floats = py::array_t<float>;

Floats RowFloats(const QuantizedHead& head, std::span<const float> values) {
  return Floats(static_cast<py::ssize_t>(head.rows()), values.data());
}

Floats Rows(const QuantizedHead& head) {
  auto out = Floats({head.rows(), head.cols()});
  const std::span<float> values = SpanOf(out);
  const py::gil_scoped_release release;
  for (size_t row = 0; row < head.rows(); ++row) {
    head.CopyRow(row, values.data() + row * head.cols());
  }
  return out;
}

// Products of x [tokens, cols], or upper bounds of the exact ones.
Floats Multiply(const QuantizedHead& head, const py::array& x, bool bounds, size_t threads) {
  const std::span<const float> values = TakeArray<float>(x, 2, "head", "x");
  const size_t tokens = ShapeOf(x)[0], cols = ShapeOf(x)[1];
  Check(cols == head.cols(), "[head] x has ", head.cols(), " columns like the head, got ", cols);
  Check(!bounds || tokens <= kMaxBoundTokens, "[head] bounds are of at most ", kMaxBoundTokens,
        " tokens, got ", tokens);
  Check(!bounds || head.bits() != 8, "[head] bounds are of heads of 4 or 6 bits");
  auto out = Floats({tokens, head.rows()});
  const std::span<float> result = SpanOf(out);
  const py::gil_scoped_release release;
  HeadActs acts(tokens, head);
  for (size_t t = 0; t < tokens; ++t) acts.Quantize(values.data() + t * cols, t);
  Team(threads).Run([&](Worker& worker) {
    const Range share = worker.Share(head.panels());
    (bounds ? HeadUpperBounds : HeadProducts)(head, acts, tokens, share.begin, share.end,
                                              result.data(), head.rows());
  });
  return out;
}

// A two-stage head with its matrix and team.
struct Finder {
  Finder(const PackedTensor& tensor, size_t threads)
      : exact(tensor),
        team(threads),
        head(exact, team),
        input(TwoStageHead::kMaxTokens, tensor.cols()) {
    Check(!head.empty(), "[head] a two-stage head is of finite floats");
  }
  PackedTensor exact;
  Team team;
  TwoStageHead head;
  LinearInput input;
};

py::list Find(Finder& finder, const py::array& x, size_t count, float temperature, float penalty,
              const std::vector<int32_t>& seen) {
  const std::span<const float> values = TakeArray<float>(x, 2, "head", "x");
  const size_t tokens = ShapeOf(x)[0], cols = ShapeOf(x)[1];
  Check(cols == finder.exact.cols() && tokens <= TwoStageHead::kMaxTokens && count >= 1,
        "[head] x is [at most ", TwoStageHead::kMaxTokens, ", ", finder.exact.cols(),
        "] and count at least 1, got [", tokens, ", ", cols, "] and ", count);
  std::vector<Candidates> found(tokens);
  const std::vector<CandidateSearch> searches(tokens, {count, temperature, penalty, seen});
  std::vector<Candidates*> results;
  for (Candidates& candidates : found) results.push_back(&candidates);
  {
    const py::gil_scoped_release release;
    for (size_t t = 0; t < tokens; ++t) {
      std::copy_n(values.data() + t * cols, cols, finder.input.Row(t));
    }
    finder.team.Run(
        [&](Worker& worker) { finder.head.Run(worker, finder.input, searches, results); });
  }
  py::list out;
  for (const Candidates& candidates : found) {
    out.append(py::make_tuple(
        py::array_t<int32_t>(static_cast<py::ssize_t>(candidates.tokens.size()),
                             candidates.tokens.data()),
        Floats(static_cast<py::ssize_t>(candidates.logits.size()), candidates.logits.data()),
        candidates.complete));
  }
  return out;
}

}  // namespace

void register_head(py::module_& kernels) {
  kernels.def("quantized_head_bytes", &QuantizedHeadBytes, py::arg("rows"), py::arg("cols"),
              py::arg("bits"), "What a quantized head takes and one product reads.");
  py::class_<QuantizedHead>(kernels, "QuantizedHead", "An output head in 4, 6 or 8 bits.")
      .def(py::init([](const PackedTensor& tensor, size_t bits, size_t threads) {
             const py::gil_scoped_release release;
             return std::make_unique<QuantizedHead>(tensor, bits, Team(threads));
           }),
           py::arg("tensor"), py::arg("bits"), py::kw_only(), py::arg("threads") = 1)
      .def_property_readonly("bytes", &QuantizedHead::bytes)
      .def_property_readonly("rows", &Rows, "As it is multiplied: float32 [rows, cols].")
      .def_property_readonly(
          "norms", [](const QuantizedHead& h) { return RowFloats(h, {h.norms(), h.rows()}); })
      .def_property_readonly(
          "residuals",
          [](const QuantizedHead& h) { return RowFloats(h, {h.residuals(), h.rows()}); })
      .def("multiply", &Multiply, py::arg("x"), py::kw_only(), py::arg("bounds") = false,
           py::arg("threads") = 1,
           "x [tokens, cols] times the transposed head, or upper bounds of what the exact head "
           "gives: [tokens, rows].");
  py::class_<Finder>(kernels, "TwoStageHead", "Finds the likeliest tokens of an exact head.")
      .def(py::init([](const PackedTensor& tensor, size_t threads) {
             const py::gil_scoped_release release;
             return std::make_unique<Finder>(tensor, threads);
           }),
           py::arg("tensor"), py::kw_only(), py::arg("threads") = 1)
      .def_property_readonly("bytes", [](const Finder& f) { return f.head.bytes(); })
      .def("find", &Find, py::arg("x"), py::kw_only(), py::arg("count") = 1,
           py::arg("temperature") = 1.0f, py::arg("penalty") = 1.0f,
           py::arg("seen") = std::vector<int32_t>(),
           "For each row of x, (tokens, exact logits, complete).");
}

}  // namespace tf
