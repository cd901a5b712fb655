// SPDX-License-Identifier: Apache-2.0
// The GGUF header and its parts; which meaning a type number has is decided in gguf_type_choice.cc.
#include "io/gguf_reader.h"

#include <algorithm>
#include <cstdio>
#include <unordered_set>
#include <utility>

#include "base/aligned.h"
#include "io/gguf_cursor.h"
#include "io/gguf_type_choice.h"

namespace tf {
namespace {

constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxElements = uint64_t{1} << 60;
constexpr size_t kSmallestValue = 8 + 1 + 4 + 1;           // key of one byte, type, one byte
constexpr size_t kSmallestTensor = 8 + 1 + 4 + 8 + 4 + 8;  // name of one byte, one dimension
constexpr uint32_t kMaxDimensions = 4;

// One file: what its header says.
struct Part {
  uint32_t version = 0;
  uint64_t alignment = kDefaultAlignment;
  std::vector<GgufValue> metadata;
  std::vector<GgufTensor> tensors;
};

const GgufValue* Find(const std::vector<GgufValue>& metadata, std::string_view key) {
  const auto found = std::find_if(metadata.begin(), metadata.end(),
                                  [&](const GgufValue& value) { return value.key == key; });
  return found == metadata.end() ? nullptr : &*found;
}

GgufValueType TakeType(GgufCursor& cursor, std::string_view key) {
  const auto type = cursor.Number<uint32_t>("the type of a value");
  if (type >= kGgufValueTypes)
    cursor.Fail("key '", key, "' has the value type ", type, ", known are 0 to ",
                kGgufValueTypes - 1);
  return static_cast<GgufValueType>(type);
}

// Steps over `count` values of a type that is no array.
void Skip(GgufCursor& cursor, GgufValueType type, uint64_t count, const std::string& key) {
  const std::string what = "the value of key '" + key + "'";
  if (type == GgufValueType::kString) {
    if (count > cursor.remaining() / sizeof(uint64_t))
      cursor.Fail(what, " has ", count, " strings, more than the file holds");
    for (uint64_t i = 0; i < count; ++i) cursor.String(what);
    return;
  }
  const uint64_t size = GgufValueBytes(type);
  if (count > cursor.remaining() / size)
    cursor.Fail(what, " has ", count, " elements, more than the file holds");
  const auto bytes = cursor.Take(count * size, what);
  if (type == GgufValueType::kBool &&
      std::any_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte > 1; }))
    cursor.Fail(what, " is a bool that is neither 0 nor 1");
}

GgufValue TakeValue(GgufCursor& cursor, std::span<const uint8_t> file) {
  GgufValue value;
  value.key = cursor.String("a key");
  if (value.key.empty() || value.key.find('\0') != std::string::npos)
    cursor.Fail("a key at byte ", cursor.position(), " is empty or has a zero byte");
  value.type = value.element = TakeType(cursor, value.key);
  value.count = 1;
  if (value.type == GgufValueType::kArray) {
    value.element = TakeType(cursor, value.key);
    if (value.element == GgufValueType::kArray)
      cursor.Fail("key '", value.key, "' is an array of arrays, which GGUF does not have");
    value.count = cursor.Number<uint64_t>("the length of an array");
  }
  const size_t begin = cursor.position();
  Skip(cursor, value.element, value.count, value.key);
  value.bytes = file.subspan(begin, cursor.position() - begin);
  return value;
}

GgufTensor TakeTensor(GgufCursor& cursor, uint32_t* type_id) {
  GgufTensor tensor;
  tensor.name = cursor.String("the name of a tensor");
  if (tensor.name.empty() || tensor.name.find('\0') != std::string::npos)
    cursor.Fail("the name of a tensor at byte ", cursor.position(), " is empty or has a zero byte");
  const auto dimensions = cursor.Number<uint32_t>("the rank of a tensor");
  if (dimensions < 1 || dimensions > kMaxDimensions)
    cursor.Fail("tensor '", tensor.name, "' has ", dimensions, " dimensions, known are 1 to ",
                kMaxDimensions);
  uint64_t elements = 1;
  for (uint32_t i = 0; i < dimensions; ++i) {
    const auto size = cursor.Number<uint64_t>("the shape of a tensor");
    if (size == 0 || size > kMaxElements / elements)
      cursor.Fail("tensor '", tensor.name, "' has a dimension of ", size,
                  ", which is zero or too large");
    elements *= size;
    tensor.shape.insert(tensor.shape.begin(), size);
  }
  *type_id = cursor.Number<uint32_t>("the type of a tensor");
  tensor.offset = cursor.Number<uint64_t>("the offset of a tensor");
  return tensor;
}

uint64_t GgufInteger(const GgufValue& value, const std::string& path) {
  const auto read = [&]<typename T>(T number) {
    std::memcpy(&number, value.bytes.data(), sizeof(T));
    if (number < T{0}) FailGguf(path, "the key '", value.key, "' must not be negative");
    return static_cast<uint64_t>(number);
  };
  switch (value.type) {
    case GgufValueType::kUint8:
      return read(uint8_t{});
    case GgufValueType::kInt8:
      return read(int8_t{});
    case GgufValueType::kUint16:
      return read(uint16_t{});
    case GgufValueType::kInt16:
      return read(int16_t{});
    case GgufValueType::kUint32:
      return read(uint32_t{});
    case GgufValueType::kInt32:
      return read(int32_t{});
    case GgufValueType::kUint64:
      return read(uint64_t{});
    case GgufValueType::kInt64:
      return read(int64_t{});
    default:
      FailGguf(path, "the key '", value.key, "' must be an integer, got ",
               GgufValueTypeName(value.type));
  }
}

uint64_t AlignmentOf(const GgufCursor& cursor, const std::vector<GgufValue>& metadata) {
  const GgufValue* value = Find(metadata, "general.alignment");
  if (value == nullptr) return kDefaultAlignment;
  const uint64_t alignment = GgufInteger(*value, cursor.path());
  if (alignment == 0 || (alignment & (alignment - 1)) != 0 || alignment > (uint64_t{1} << 30))
    cursor.Fail("general.alignment must be a power of two, got ", alignment);
  return alignment;
}

// Tensors follow one another with nothing but padding between them; more bytes mean that this
// reader and the writer do not agree on a type. Behind the last tensor anything may lie, except for
// I2_S, whose number was once a larger type of llama.cpp.
void CheckGap(const GgufCursor& cursor, const GgufTensor& tensor, const GgmlType& type,
              uint64_t unused, uint64_t alignment, bool last) {
  if (unused < PaddingLimit(type, alignment) || (last && type.name != "I2_S")) return;
  cursor.Fail("tensor '", tensor.name, "' (", type.name, " of ", type.owner, ") leaves ", unused,
              " bytes unused",
              type.name == "I2_S" ? ": it may be IQ4_NL_4_4, a type that llama.cpp removed; "
                                    "convert the source model again"
                                  : ": the file is damaged or of an unknown engine");
}

// From offsets in the data section to views of the file.
void PlaceTensors(const GgufCursor& cursor, std::span<const uint8_t> file, uint64_t data_begin,
                  uint64_t alignment, const std::vector<uint32_t>& type_ids,
                  std::string_view type_42, std::vector<GgufTensor>& tensors) {
  const uint64_t data_bytes = file.size() > data_begin ? file.size() - data_begin : 0;
  std::vector<TensorRoom> rooms;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const GgufTensor& tensor = tensors[i];
    const bool last = i + 1 == tensors.size();
    const uint64_t end = last ? data_bytes : tensors[i + 1].offset;
    if (tensor.offset % alignment != 0)
      cursor.Fail("tensor '", tensor.name, "' begins at offset ", tensor.offset,
                  ", which is no multiple of the alignment ", alignment);
    if (tensor.offset > data_bytes)
      cursor.Fail("tensor '", tensor.name, "' begins at offset ", tensor.offset, " of ", data_bytes,
                  " bytes of data: the file was cut off or is damaged");
    if (i == 0 && tensor.offset != 0)
      cursor.Fail("tensor '", tensor.name, "' begins at offset ", tensor.offset,
                  ", the first one begins at 0");
    if (!last && end <= tensor.offset)
      cursor.Fail("tensor '", tensors[i + 1].name, "' begins at offset ", end,
                  ", not after the tensor '", tensor.name, "' before it");
    const uint64_t cols = tensor.shape.back();
    uint64_t rows = 1;
    for (size_t axis = 0; axis + 1 < tensor.shape.size(); ++axis) rows *= tensor.shape[axis];
    rooms.push_back({type_ids[i], rows, cols, std::min(end, data_bytes) - tensor.offset,
                     file.subspan(static_cast<size_t>(
                         std::min<uint64_t>(file.size(), data_begin + tensor.offset))),
                     tensor.name});
  }
  const std::vector<const GgmlType*> types = ChooseTypes(rooms, alignment, type_42, cursor.path());
  for (size_t i = 0; i < tensors.size(); ++i) {
    GgufTensor& tensor = tensors[i];
    const uint64_t size = GgmlBytes(*types[i], rooms[i].rows, rooms[i].cols);
    if (size == 0)
      cursor.Fail("tensor '", tensor.name, "' of ", rooms[i].cols, " columns cannot be ",
                  types[i]->name, ", which has blocks of ", types[i]->block_cols);
    if (size > rooms[i].bytes)
      cursor.Fail("tensor '", tensor.name, "' (", types[i]->name, ") takes ", size,
                  " bytes and has ", rooms[i].bytes,
                  " before the next tensor or the end of the file: it was cut off or is damaged");
    CheckGap(cursor, tensor, *types[i], rooms[i].bytes - size, alignment, i + 1 == tensors.size());
    tensor.type = types[i];
    tensor.offset += data_begin;
    tensor.data = file.subspan(static_cast<size_t>(tensor.offset), static_cast<size_t>(size));
  }
}

Part ReadPart(std::span<const uint8_t> file, const std::string& path, std::string_view type_42) {
  GgufCursor cursor(file, path);
  const auto magic = cursor.Take(4, "the magic number");
  if (std::memcmp(magic.data(), "GGUF", 4) != 0)
    cursor.Fail("the first four bytes are not 'GGUF': this is another format");
  Part part;
  part.version = cursor.Number<uint32_t>("the version");
  if (part.version != 2 && part.version != 3)
    cursor.Fail("version ", part.version, " is not known, only 2 and 3",
                (part.version & 0xFFFF) == 0 ? ": the file is for big-endian machines" : "");
  const auto tensor_count = cursor.Number<uint64_t>("the number of tensors");
  const auto value_count = cursor.Number<uint64_t>("the number of keys");
  if (value_count > cursor.remaining() / kSmallestValue ||
      tensor_count > cursor.remaining() / kSmallestTensor)
    cursor.Fail("the header counts ", tensor_count, " tensors and ", value_count,
                " keys, more than ", cursor.remaining(), " bytes can hold");
  std::unordered_set<std::string> seen;
  for (uint64_t i = 0; i < value_count; ++i) {
    part.metadata.push_back(TakeValue(cursor, file));
    if (!seen.insert(part.metadata.back().key).second)
      cursor.Fail("the key '", part.metadata.back().key, "' is there twice");
  }
  part.alignment = AlignmentOf(cursor, part.metadata);
  std::vector<uint32_t> type_ids;  // grows with what was read: a count may lie
  for (uint64_t i = 0; i < tensor_count; ++i)
    part.tensors.push_back(TakeTensor(cursor, &type_ids.emplace_back()));
  PlaceTensors(cursor, file, RoundUp(cursor.position(), part.alignment), part.alignment, type_ids,
               type_42, part.tensors);
  return part;
}

// "model-00001-of-00003.gguf" for another part; empty when the name has no such ending.
std::filesystem::path PartPath(const std::filesystem::path& first, uint64_t part, uint64_t count) {
  const std::string name = first.filename().string();
  const auto ending = [count](uint64_t i) {
    char text[64];
    std::snprintf(text, sizeof(text), "-%05llu-of-%05llu.gguf",
                  static_cast<unsigned long long>(i + 1), static_cast<unsigned long long>(count));
    return std::string(text);
  };
  if (!name.ends_with(ending(0))) return {};
  return first.parent_path() / (name.substr(0, name.size() - ending(0).size()) + ending(part));
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path, std::string_view type_42) {
  TakeParts(path, type_42);
}

void GgufFile::TakeParts(const std::filesystem::path& path, std::string_view type_42) {
  uint64_t count = 1, expected = 0;
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < count; ++i) {
    const std::filesystem::path part_path = i == 0 ? path : PartPath(path, i, count);
    auto file = std::make_shared<const MappedFile>(part_path);
    Part part = ReadPart(file->bytes(), part_path.string(), type_42);
    const auto fail = [&](const auto&... message) { FailGguf(part_path.string(), message...); };
    const auto integer = [&](const char* key, uint64_t otherwise) {
      const GgufValue* value = Find(part.metadata, key);
      return value == nullptr ? otherwise : GgufInteger(*value, part_path.string());
    };
    const uint64_t number = integer("split.no", 0), parts = integer("split.count", 1);
    if (i == 0) {
      count = std::max<uint64_t>(parts, 1);
      if (number != 0) fail("this is part ", number + 1, " of ", count, ": open the first part");
      if (count > 1 && PartPath(path, 0, count).empty())
        fail("a file of ", count, " parts ends in -00001-of-", count,
             ".gguf with five digits each: give it its name back");
      expected = integer("split.tensors.count", 0);
      version_ = part.version;
      alignment_ = part.alignment;
      metadata_ = std::move(part.metadata);
      file_ = file;
    } else if (number != i || parts != count) {
      fail("expected part ", i + 1, " of ", count, ", got part ", number + 1, " of ", parts);
    }
    paths_.push_back(part_path);
    for (GgufTensor& tensor : part.tensors) {
      if (!names.insert(tensor.name).second) fail("the tensor '", tensor.name, "' is there twice");
      tensor.file = file;
      tensor.path = part_path;
      tensors_.push_back(std::move(tensor));
    }
  }
  if (count > 1 && expected != 0 && expected != tensors_.size())
    FailGguf(path.string(), "the parts hold ", tensors_.size(),
             " tensors, split.tensors.count says ", expected);
}

}  // namespace tf
