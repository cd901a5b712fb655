// SPDX-License-Identifier: Apache-2.0
// Type numbers that several engines use, told apart by sizes and scales.
#include "io/gguf_type_choice.h"

#include <algorithm>
#include <map>

#include "io/gguf_cursor.h"

namespace tf {
namespace {

// Another engine's 34 bytes for 128 columns under the number 42, with the scale last.
constexpr std::string_view kScaleLast =
    "the blocks have their scale at the end (TQ2_0_g128 of oxibonsai), which is not supported: "
    "convert the source model again";

bool Fits(const GgmlType& type, const TensorRoom& tensor, uint64_t alignment) {
  const uint64_t size = GgmlBytes(type, tensor.rows, tensor.cols);
  return size > 0 && size <= tensor.bytes && tensor.bytes - size < PaddingLimit(type, alignment);
}

// Whether the f16 at `offset` of the first blocks could be a scale: not negative, finite. The codes
// of ternary weights look negative in every third block.
bool LooksLikeScales(const GgmlType& type, const TensorRoom& tensor, size_t offset) {
  const uint64_t blocks = tensor.rows * (tensor.cols / type.block_cols);
  for (uint64_t i = 0; i < std::min<uint64_t>(blocks, 256); ++i) {
    const uint8_t high = tensor.data[static_cast<size_t>(i) * type.block_bytes + offset + 1];
    if (high >= 0x7C) return false;
  }
  return true;
}

std::string Names(std::span<const GgmlType* const> types) {
  std::string names;
  for (const GgmlType* type : types) names += StrCat(names.empty() ? "" : ", ", type->name);
  return names;
}

}  // namespace

uint64_t PaddingLimit(const GgmlType& type, uint64_t alignment) {
  return type.name == "TL1" || type.name == "TL2" ? 2 * alignment : alignment;
}

std::vector<const GgmlType*> ChooseTypes(std::span<const TensorRoom> tensors, uint64_t alignment,
                                         std::string_view type_42, const std::string& path) {
  const auto fail = [&](const TensorRoom& tensor, const auto&... message) {
    FailGguf(path, "tensor '", tensor.name, "' has the type number ", tensor.type_id, ", ",
             message...);
  };
  std::map<uint32_t, std::vector<const GgmlType*>> candidates;
  for (const TensorRoom& tensor : tensors) {
    const auto [entry, fresh] = candidates.try_emplace(tensor.type_id);
    std::vector<const GgmlType*>& types = entry->second;
    if (fresh) {
      if (const std::string_view why = WhyUnreadable(tensor.type_id); !why.empty())
        fail(tensor, why);
      for (const GgmlType& type : GgmlTypesOf(tensor.type_id)) {
        if (tensor.type_id != 42 || type_42.empty() || type.name == type_42) types.push_back(&type);
      }
      if (types.empty()) fail(tensor, "which no known engine uses");
      if (types.size() == 1) continue;
    }
    if (types.size() == 1 && GgmlTypesOf(tensor.type_id).size() == 1) continue;
    const std::string before = Names(types);
    std::erase_if(types, [&](const GgmlType* type) { return !Fits(*type, tensor, alignment); });
    if (types.empty())
      fail(tensor, "and its ", tensor.bytes, " bytes for ", tensor.rows, " x ", tensor.cols,
           " fit none of ", before, ": the file was cut off, is damaged or of another engine");
  }
  std::vector<const GgmlType*> chosen;
  for (const TensorRoom& tensor : tensors) {
    const std::vector<const GgmlType*>& types = candidates[tensor.type_id];
    if (types.size() > 1)
      fail(tensor, "which by size may be any of ", Names(types),
           tensor.type_id == 42 ? ": say which with type_42" : "");
    if (tensor.type_id == 42 && types[0]->name == "PQ2_0" && type_42.empty() &&
        !LooksLikeScales(*types[0], tensor, 0) && LooksLikeScales(*types[0], tensor, 32))
      fail(tensor, "and ", kScaleLast);
    chosen.push_back(types[0]);
  }
  return chosen;
}

}  // namespace tf
