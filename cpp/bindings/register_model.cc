// SPDX-License-Identifier: Apache-2.0
// Bindings of the layer model.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/activation_mode.h"
#include "bindings/array.h"
#include "bindings/head_mode.h"
#include "bindings/kv_type.h"
#include "bindings/registers.h"
#include "model/spec.h"
#include "model/transformer.h"

namespace tf {
namespace {

namespace py = pybind11;

template <typename Value>
struct Named {
  const char* name;
  Value value;
};

constexpr Named<Activation> kActivations[] = {
    {"silu", Activation::kSilu},         {"relu", Activation::kRelu},
    {"relu2", Activation::kReluSquared}, {"gelu", Activation::kGelu},
    {"gelu_erf", Activation::kGeluErf},
};
constexpr Named<NormKind> kNorms[] = {{"rms", NormKind::kRms}, {"layer", NormKind::kLayer}};
constexpr Named<LogitsWanted> kLogitsWanted[] = {
    {"none", LogitsWanted::kNone}, {"last", LogitsWanted::kLast}, {"all", LogitsWanted::kAll}};

// Throws std::invalid_argument that lists the names.
template <typename Value, size_t kSize>
Value FromName(const Named<Value> (&table)[kSize], const char* what, const std::string& name) {
  std::string known;
  for (const auto& entry : table) {
    if (name == entry.name) return entry.value;
    known += StrCat(known.empty() ? "" : ", ", entry.name);
  }
  throw std::invalid_argument(StrCat(what, " is one of ", known, ", got '", name, "'"));
}

template <typename Value, size_t kSize>
const char* NameOf(const Named<Value> (&table)[kSize], Value value) {
  return std::find_if(std::begin(table), std::end(table),
                      [&](const auto& entry) { return entry.value == value; })
      ->name;
}

std::optional<Layout> TilesFromName(const std::string& name) {
  if (name == "auto") return std::nullopt;
  Check(name == "t16" || name == "t20", "[layout] the run-time layout is auto, t16 or t20, got '",
        name, "'");
  return LayoutFromName(name);
}

py::array_t<float> Forward(Transformer& transformer,
                           const std::vector<std::pair<py::array, SequenceState*>>& batch,
                           const std::string& logits) {
  const LogitsWanted wanted = FromName(kLogitsWanted, "[forward] logits", logits);
  std::vector<BatchItem> items;
  for (const auto& [tokens, state] : batch) {
    items.push_back({TakeArray<int32_t>(tokens, 1, "forward", "tokens"), state});
  }
  auto out =
      py::array_t<float>({Transformer::LogitRows(items, wanted), transformer.spec().vocab_size});
  const std::span<float> result = SpanOf(out);
  const py::gil_scoped_release release;
  transformer.Forward(items, wanted, result);
  return out;
}

std::vector<int32_t> LikeliestTokens(
    Transformer& transformer, const std::vector<std::pair<py::array, SequenceState*>>& batch) {
  std::vector<BatchItem> items;
  for (const auto& [tokens, state] : batch) {
    items.push_back({TakeArray<int32_t>(tokens, 1, "forward", "tokens"), state});
  }
  const py::gil_scoped_release release;
  return transformer.LikeliestTokens(items);
}

py::array_t<float> EmbedTokens(Transformer& transformer, const py::array& tokens) {
  const std::span<const int32_t> ids = TakeArray<int32_t>(tokens, 1, "embed", "tokens");
  auto out = py::array_t<float>({ids.size(), transformer.spec().hidden_size});
  const std::span<float> hidden = SpanOf(out);
  const py::gil_scoped_release release;
  transformer.EmbedTokens(ids, hidden);
  return out;
}

py::tuple ForwardBlock(Transformer& transformer, size_t layer, const py::array& hidden,
                       const std::vector<std::string>& tapped) {
  const std::span<const float> before = TakeArray<float>(hidden, 2, "forward_block", "hidden");
  const ModelSpec& spec = transformer.spec();
  Check(layer < spec.layers.size(), "[forward_block] the model has ", spec.layers.size(),
        " layers, got layer ", layer);
  const size_t tokens = ShapeOf(hidden)[0];
  Check(ShapeOf(hidden)[1] == spec.hidden_size, "[forward_block] hidden is [tokens, ",
        spec.hidden_size, "], got [", tokens, ", ", ShapeOf(hidden)[1], "]");
  auto after = py::array_t<float>({tokens, spec.hidden_size});
  const std::span<float> result = SpanOf(after);
  py::dict copies;
  Taps taps;
  const LayerSpec& shape = spec.layers[layer];
  for (const std::string& name : tapped) {
    const auto copy = [&](size_t cols) {
      auto values = py::array_t<float>({tokens, cols});
      copies[py::str(name)] = values;
      return SpanOf(values);
    };
    if (name == "query") {
      taps.query = copy(spec.hidden_size);
    } else if (name == "output") {
      taps.output = copy(shape.heads * shape.head_dim);
    } else if (name == "up") {
      taps.up = copy(spec.hidden_size);
    } else {
      Check(name == "down", "[forward_block] a tap is query, output, up or down, got '", name, "'");
      taps.down = copy(shape.ffn_size);
    }
  }
  {
    const py::gil_scoped_release release;
    std::copy(before.begin(), before.end(), result.begin());
    transformer.ForwardBlock(layer, result, taps);
  }
  return py::make_tuple(after, copies);
}

py::dict SearchCountsOf(Transformer& transformer) {
  const SearchCounts found = transformer.search_counts();
  py::dict counts;
  counts["searches"] = found.searches;
  counts["fallbacks"] = found.fallbacks;
  counts["rows"] = found.rows;
  return counts;
}

py::dict PartSeconds(Transformer& transformer) {
  py::dict seconds;
  seconds["matmul"] = transformer.SecondsOf(Part::kMatmul);
  seconds["head"] = transformer.SecondsOf(Part::kHead);
  seconds["attention"] = transformer.SecondsOf(Part::kAttention);
  seconds["rest"] = transformer.SecondsOf(Part::kRest);
  return seconds;
}

// A copy of a float matrix.
PackedTensor TakeMatrix(const py::array& array, const std::string& name) {
  const std::span<const float> values = TakeArray<float>(array, 2, "adapter", name);
  const std::vector<size_t> shape = ShapeOf(array);
  Check(!values.empty(), "[adapter] ", name, " has at least one row and column, got [", shape[0],
        ", ", shape[1], "]");
  uint8_t* bytes = nullptr;
  PackedTensor tensor = PackedTensor::Allocate(Layout::kF32, shape[0], shape[1], {}, &bytes);
  std::memcpy(bytes, values.data(), values.size_bytes());
  return tensor;
}

Adapters TakeAdapters(
    const std::map<std::string, std::tuple<py::array, py::array, float>>& arrays) {
  Adapters adapters;
  for (const auto& [slot, parts] : arrays) {
    const auto& [a, b, scaling] = parts;
    adapters[slot] = {TakeMatrix(a, "A of '" + slot + "'"), TakeMatrix(b, "B of '" + slot + "'"),
                      scaling};
  }
  return adapters;
}

}  // namespace

void register_model(py::module_& model) {
  py::class_<LayerSpec>(model, "LayerSpec", "One decoder layer as data.")
      .def(py::init([](size_t heads, size_t kv_heads, size_t head_dim, std::vector<float> rotation,
                       float rotation_scale, std::optional<float> attention_scale,
                       float attention_soft_cap, size_t window, size_t ffn_size,
                       const std::string& activation, bool gated, const std::string& norm,
                       bool parallel, float residual_scale, bool projection_bias, bool output_bias,
                       bool ffn_bias, bool head_norms, bool sub_norms, bool post_norms) {
             return LayerSpec{
                 .heads = heads,
                 .kv_heads = kv_heads,
                 .head_dim = head_dim,
                 .rotation = std::move(rotation),
                 .rotation_scale = rotation_scale,
                 .attention_scale =
                     attention_scale.value_or(1.0f / std::sqrt(static_cast<float>(head_dim))),
                 .attention_soft_cap = attention_soft_cap,
                 .window = window,
                 .ffn_size = ffn_size,
                 .activation = FromName(kActivations, "[spec] activation", activation),
                 .gated = gated,
                 .norm = FromName(kNorms, "[spec] norm", norm),
                 .parallel = parallel,
                 .residual_scale = residual_scale,
                 .projection_bias = projection_bias,
                 .output_bias = output_bias,
                 .ffn_bias = ffn_bias,
                 .head_norms = head_norms,
                 .sub_norms = sub_norms,
                 .post_norms = post_norms,
             };
           }),
           py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
           py::arg("rotation"), py::arg("rotation_scale") = 1.0f,
           py::arg("attention_scale") = py::none(), py::arg("attention_soft_cap") = 0.0f,
           py::arg("window") = 0, py::arg("ffn_size"), py::arg("activation"),
           py::arg("gated") = true, py::arg("norm") = "rms", py::arg("parallel") = false,
           py::arg("residual_scale") = 1.0f, py::arg("projection_bias") = false,
           py::arg("output_bias") = false, py::arg("ffn_bias") = false,
           py::arg("head_norms") = false, py::arg("sub_norms") = false,
           py::arg("post_norms") = false)
      .def_readonly("heads", &LayerSpec::heads)
      .def_readonly("kv_heads", &LayerSpec::kv_heads)
      .def_readonly("head_dim", &LayerSpec::head_dim)
      .def_readonly("rotation", &LayerSpec::rotation)
      .def_readonly("rotation_scale", &LayerSpec::rotation_scale)
      .def_readonly("attention_scale", &LayerSpec::attention_scale)
      .def_readonly("attention_soft_cap", &LayerSpec::attention_soft_cap)
      .def_readonly("window", &LayerSpec::window)
      .def_readonly("ffn_size", &LayerSpec::ffn_size)
      .def_readonly("gated", &LayerSpec::gated)
      .def_readonly("parallel", &LayerSpec::parallel)
      .def_readonly("residual_scale", &LayerSpec::residual_scale)
      .def_readonly("projection_bias", &LayerSpec::projection_bias)
      .def_readonly("output_bias", &LayerSpec::output_bias)
      .def_readonly("ffn_bias", &LayerSpec::ffn_bias)
      .def_readonly("head_norms", &LayerSpec::head_norms)
      .def_readonly("sub_norms", &LayerSpec::sub_norms)
      .def_readonly("post_norms", &LayerSpec::post_norms)
      .def_property_readonly(
          "activation",
          [](const LayerSpec& layer) { return NameOf(kActivations, layer.activation); })
      .def_property_readonly("norm",
                             [](const LayerSpec& layer) { return NameOf(kNorms, layer.norm); });
  py::class_<ModelSpec>(model, "ModelSpec", "A decoder as data.")
      .def(py::init([](size_t vocab_size, size_t hidden_size, size_t context_length,
                       float norm_epsilon, const std::vector<LayerSpec>& layers, bool tied_head,
                       bool head_bias, float embedding_scale, bool position_embedding,
                       float norm_offset, float logit_soft_cap) {
             ModelSpec spec{
                 .vocab_size = vocab_size,
                 .hidden_size = hidden_size,
                 .context_length = context_length,
                 .norm_epsilon = norm_epsilon,
                 .layers = layers,
                 .tied_head = tied_head,
                 .head_bias = head_bias,
                 .embedding_scale = embedding_scale,
                 .position_embedding = position_embedding,
                 .norm_offset = norm_offset,
                 .logit_soft_cap = logit_soft_cap,
             };
             spec.Validate();
             return spec;
           }),
           py::kw_only(), py::arg("vocab_size"), py::arg("hidden_size"), py::arg("context_length"),
           py::arg("norm_epsilon"), py::arg("layers"), py::arg("tied_head"),
           py::arg("head_bias") = false, py::arg("embedding_scale") = 1.0f,
           py::arg("position_embedding") = false, py::arg("norm_offset") = 0.0f,
           py::arg("logit_soft_cap") = 0.0f)
      .def_readonly("vocab_size", &ModelSpec::vocab_size)
      .def_readonly("hidden_size", &ModelSpec::hidden_size)
      .def_readonly("context_length", &ModelSpec::context_length)
      .def_readonly("norm_epsilon", &ModelSpec::norm_epsilon)
      .def_readonly("layers", &ModelSpec::layers)
      .def_readonly("tied_head", &ModelSpec::tied_head)
      .def_readonly("head_bias", &ModelSpec::head_bias)
      .def_readonly("embedding_scale", &ModelSpec::embedding_scale)
      .def_readonly("position_embedding", &ModelSpec::position_embedding)
      .def_readonly("norm_offset", &ModelSpec::norm_offset)
      .def_readonly("logit_soft_cap", &ModelSpec::logit_soft_cap)
      .def(
          "slots",
          [](const ModelSpec& spec) {
            py::dict slots;
            for (const Slot& slot : spec.Slots())
              slots[py::str(slot.name)] = py::make_tuple(slot.rows, slot.cols);
            return slots;
          },
          "Every weight by name, with its shape.");
  py::class_<SequenceState>(model, "SequenceState", "What the model remembers of one sequence.")
      .def_property_readonly("length", &SequenceState::length)
      .def("repeat", &SequenceState::Repeat, py::arg("length"),
           "Extends to `length` tokens that repeat what is present: a long context to measure.")
      .def("truncate", &SequenceState::Truncate, py::arg("length"),
           "Rolls back to the first `length` tokens.");
  model.def(
      "kv_bytes_per_token",
      [](const ModelSpec& spec, const std::string& kv) {
        return KvCache(spec, KvTypeFromName(kv)).bytes_per_token();
      },
      py::arg("spec"), py::arg("kv"), "What a model would remember of one token.");
  py::class_<Transformer>(model, "Transformer",
                          "The decoder, with weights repacked for this machine.")
      .def(py::init(
               [](const ModelSpec& spec, std::map<std::string, PackedTensor> weights,
                  const std::string& activations, const std::string& kv, const std::string& head,
                  size_t threads, const std::string& layout,
                  const std::map<std::string, std::tuple<py::array, py::array, float>>& adapters) {
                 const ActivationMode mode = ActivationModeFromName(activations);
                 const KvType kv_type = KvTypeFromName(kv);
                 const HeadMode head_mode = HeadModeFromName(head);
                 const std::optional<Layout> tiles = TilesFromName(layout);
                 Adapters taken = TakeAdapters(adapters);
                 const py::gil_scoped_release release;
                 return std::make_unique<Transformer>(spec, std::move(weights), std::move(taken),
                                                      mode, kv_type, head_mode, threads, tiles);
               }),
           py::arg("spec"), py::arg("weights"), py::kw_only(), py::arg("activations"),
           py::arg("kv") = "f32", py::arg("head") = "exact", py::arg("threads"),
           py::arg("layout") = "auto", py::arg("adapters") = py::dict())
      .def_property_readonly("spec", &Transformer::spec)
      .def_property_readonly("threads", [](const Transformer& t) { return t.team().threads(); })
      .def_property_readonly("activations",
                             [](const Transformer& t) { return ActivationModeName(t.mode()); })
      .def_property_readonly("weight_bytes", &Transformer::weight_bytes)
      .def_property_readonly("token_bytes", &Transformer::token_bytes)
      .def_property_readonly("layout", [](const Transformer& t) { return std::string(t.layout()); })
      .def_property_readonly("kv",
                             [](const Transformer& t) { return KvTypeName(t.cache().type()); })
      .def_property_readonly("head",
                             [](const Transformer& t) { return HeadModeName(t.head_mode()); })
      .def_property_readonly("head_bytes", &Transformer::head_bytes)
      .def_property_readonly("kv_bytes_per_token",
                             [](const Transformer& t) { return t.cache().bytes_per_token(); })
      .def("new_sequence", &Transformer::NewSequence)
      .def("time_parts", &Transformer::TimeParts, py::arg("on"),
           py::call_guard<py::gil_scoped_release>(),
           "Starts, from zero, or ends adding up where the time of forward passes goes.")
      .def("part_seconds", &PartSeconds, "Seconds since time_parts by part of the forward pass.")
      .def("embed", &EmbedTokens, py::arg("tokens"),
           "The residual stream at the start of one sequence: [tokens, hidden_size].")
      .def("forward_block", &ForwardBlock, py::arg("layer"), py::arg("hidden"), py::kw_only(),
           py::arg("taps") = std::vector<std::string>(),
           "One layer on one whole sequence: the residual stream behind it, and by name what the "
           "linear layers saw.")
      .def("replace_linear", &Transformer::ReplaceLinear, py::arg("slot"), py::arg("tensor"),
           py::call_guard<py::gil_scoped_release>(), "Another matrix for layers.I.NAME.")
      .def(
          "replace_norm",
          [](Transformer& t, const std::string& slot, const py::array& weight) {
            t.ReplaceNorm(slot, TakeArray<float>(weight, 1, "replace", "weight"));
          },
          py::arg("slot"), py::arg("weight"), "Other weights for a norm of a layer.")
      .def("forward", &Forward, py::arg("batch"), py::kw_only(), py::arg("logits") = "last",
           "Appends tokens to sequences; logits [sequences or tokens, vocab].")
      .def("search_counts", &SearchCountsOf,
           "What the two-stage head did since the model was made.")
      .def("likeliest_tokens", &LikeliestTokens, py::arg("batch"),
           "Appends tokens to sequences; the likeliest next token of each.");
}

}  // namespace tf
