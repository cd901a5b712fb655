// SPDX-License-Identifier: Apache-2.0
// Bindings of the layer runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array.h"
#include "bindings/registers.h"
#include "runtime/generator.h"
#include "runtime/sampler.h"

namespace tf {
namespace {

namespace py = pybind11;

py::object FinishReasonName(const GeneratedToken& token) {
  if (!token.finish.has_value()) return py::none();
  return py::str(*token.finish == FinishReason::kStop ? "stop" : "length");
}

std::unique_ptr<Generator> MakeGenerator(Transformer& transformer,
                                         const std::vector<py::array>& prompts,
                                         const std::vector<SamplingOptions>& options,
                                         size_t max_new_tokens, std::vector<int32_t> stop_ids) {
  std::vector<std::vector<int32_t>> ids;
  for (const py::array& prompt : prompts) {
    const std::span<const int32_t> values = TakeArray<int32_t>(prompt, 1, "generate", "prompt");
    ids.emplace_back(values.begin(), values.end());
  }
  return std::make_unique<Generator>(transformer, ids, options, max_new_tokens,
                                     std::move(stop_ids));
}

// A token as Python holds it: it keeps the generator, and so the weights, alive for the
// log-probability that it may be asked for later.
struct PyToken {
  GeneratedToken token;
  const Generator* generator;
};

py::list Step(py::object self) {
  auto& generator = self.cast<Generator&>();
  std::vector<GeneratedToken> tokens;
  {
    const py::gil_scoped_release release;
    tokens = generator.Step();
  }
  py::list result;
  for (GeneratedToken& token : tokens) {
    py::object item = py::cast(PyToken{std::move(token), &generator});
    py::detail::keep_alive_impl(item, self);
    result.append(std::move(item));
  }
  return result;
}

// Fills in what is pending; tokens of one generator go through the head together.
std::vector<float> LogProbabilities(const std::vector<const PyToken*>& tokens) {
  std::vector<const PyToken*> open;
  for (const PyToken* token : tokens) {
    const auto& pending = token->token.pending;
    if (pending != nullptr && !pending->value.has_value()) open.push_back(token);
  }
  if (!open.empty()) {
    const Generator* generator = open.front()->generator;
    std::vector<std::span<const float>> inputs;
    std::vector<int32_t> ids;
    for (const PyToken* token : open) {
      Check(token->generator == generator, "[log_probabilities] all tokens are of one generator");
      inputs.emplace_back(token->token.pending->input);
      ids.push_back(token->token.token);
    }
    std::vector<float> values;
    {
      const py::gil_scoped_release release;
      values = generator->transformer().LogProbabilities(inputs, ids);
    }
    for (size_t i = 0; i < open.size(); ++i) open[i]->token.pending->value = values[i];
  }
  std::vector<float> result;
  for (const PyToken* token : tokens) {
    const auto& pending = token->token.pending;
    result.push_back(pending == nullptr ? token->token.log_probability : *pending->value);
  }
  return result;
}

py::array_t<float> ScoreTokens(Transformer& transformer, const py::array& token_ids) {
  const std::span<const int32_t> tokens = TakeArray<int32_t>(token_ids, 1, "score", "token_ids");
  std::vector<float> scores;
  {
    const py::gil_scoped_release release;
    scores = Score(transformer, tokens, [] {
      const py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    });
  }
  return py::array_t<float>(static_cast<py::ssize_t>(scores.size()), scores.data());
}

}  // namespace

void register_runtime(py::module_& runtime) {
  py::class_<SamplingOptions>(runtime, "SamplingOptions",
                              "How the next token is chosen; temperature 0 is greedy.")
      .def(py::init([](float temperature, size_t top_k, float top_p, float min_p,
                       float repetition_penalty, uint64_t seed) {
             const SamplingOptions options{temperature,        top_k, top_p, min_p,
                                           repetition_penalty, seed};
             options.Validate();
             return options;
           }),
           py::kw_only(), py::arg("temperature") = 0.0f, py::arg("top_k") = 0,
           py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f, py::arg("repetition_penalty") = 1.0f,
           py::arg("seed") = 0);
  py::class_<PyToken>(runtime, "GeneratedToken", "One token of one sequence.")
      .def_property_readonly("sequence", [](const PyToken& t) { return t.token.sequence; })
      .def_property_readonly("token_id", [](const PyToken& t) { return t.token.token; })
      .def_property_readonly("logprob",
                             [](const PyToken& t) { return LogProbabilities({&t}).front(); })
      .def_property_readonly("finish_reason",
                             [](const PyToken& t) { return FinishReasonName(t.token); });
  py::class_<Generator>(runtime, "Generator",
                        "Prompts in, tokens out, several sequences in one batch.")
      .def(py::init(&MakeGenerator), py::arg("transformer"), py::arg("prompts"), py::arg("options"),
           py::kw_only(), py::arg("max_new_tokens"), py::arg("stop_ids"), py::keep_alive<1, 2>())
      .def_property_readonly("done", &Generator::done)
      .def("step", &Step, "One chunk of a prompt, or one token of every live sequence.")
      .def("stop", &Generator::Stop, py::arg("sequence"), "Ends one sequence.");
  runtime.def("log_probabilities", &LogProbabilities, py::arg("tokens"),
              "The logprob of several tokens of one generator, in fewer passes than one by one.");
  runtime.def("score", &ScoreTokens, py::arg("transformer"), py::arg("token_ids"),
              "Natural log-probability of every token but the first: [n - 1].");
}

}  // namespace tf
