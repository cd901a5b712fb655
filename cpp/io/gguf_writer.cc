// SPDX-License-Identifier: Apache-2.0
// The order of a GGUF file, kept while it is written.
#include "io/gguf_writer.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/aligned.h"
#include "base/check.h"
#include "io/gguf_cursor.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

namespace tf {
namespace {

constexpr size_t kMaxNameBytes = 63;  // llama.cpp keeps 64 with the zero
constexpr size_t kMaxDimensions = 4;
constexpr uint64_t kMaxElements = uint64_t{1} << 60;
constexpr std::string_view kAlignmentKey = "general.alignment";

template <typename T>
void Append(std::string& to, T value) {
  static_assert(std::endian::native == std::endian::little);
  to.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void AppendString(std::string& to, std::string_view text) {
  Append<uint64_t>(to, text.size());
  to.append(text);
}

bool IsName(std::string_view name) {
  return !name.empty() && name.find('\0') == std::string_view::npos && IsUtf8(name);
}

int ProcessId() {
#ifdef _WIN32
  return _getpid();
#else
  return getpid();
#endif
}

}  // namespace

GgufWriter::GgufWriter(const std::filesystem::path& path, uint64_t alignment)
    : path_(path), temporary_(path), alignment_(alignment) {
  Check(std::has_single_bit(alignment) && alignment <= (uint64_t{1} << 30),
        "[gguf] the alignment is a power of two, got ", alignment);
  temporary_ += StrCat(".", ProcessId(), ".part");
  errno = 0;
  file_.open(temporary_, std::ios::binary | std::ios::trunc);
  if (!file_) throw FileError(errno != 0 ? errno : EIO, temporary_.string());
  if (alignment != 32) {
    const auto number = static_cast<uint32_t>(alignment);
    AddValue(kAlignmentKey, GgufValueType::kUint32, GgufValueType::kUint32, 1,
             {reinterpret_cast<const uint8_t*>(&number), sizeof(number)});
  }
}

GgufWriter::~GgufWriter() { Discard(); }

void GgufWriter::Discard() {
  if (!std::exchange(open_, false)) return;
  file_.close();
  std::error_code ignored;
  std::filesystem::remove(temporary_, ignored);
}

void GgufWriter::AddValue(std::string_view key, GgufValueType type, GgufValueType element,
                          uint64_t count, std::span<const uint8_t> bytes) {
  Check(open_ && !in_data_, "[gguf] the key '", key, "' comes too late: tensors are being written");
  Check(IsName(key), "[gguf] a key is UTF-8, not empty, without a zero byte");
  Check(key != kAlignmentKey || (alignment_ != 32 && keys_.empty()),
        "[gguf] general.alignment follows from the argument alignment");
  Check(keys_.insert(std::string(key)).second, "[gguf] the key '", key, "' is there already");
  AppendString(values_, key);
  Append(values_, static_cast<uint32_t>(type));
  if (type == GgufValueType::kArray) {
    Append(values_, static_cast<uint32_t>(element));
    Append(values_, count);
  }
  values_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  ++value_count_;
}

void GgufWriter::AddTensor(std::string_view name, std::span<const uint64_t> shape,
                           std::string_view type_name) {
  Check(open_ && !in_data_, "[gguf] the tensor '", name,
        "' comes too late: tensors are being written");
  Check(IsName(name) && name.size() <= kMaxNameBytes,
        "[gguf] the name of a tensor is UTF-8 of 1 to ", kMaxNameBytes, " bytes, got '", name, "'");
  Check(!name.ends_with("_scale"), "[gguf] the tensor '", name,
        "' must not end in _scale: bitnet.cpp drops such tensors");
  Check(!names_.contains(std::string(name)), "[gguf] the tensor '", name, "' is there already");
  Check(!shape.empty() && shape.size() <= kMaxDimensions, "[gguf] the tensor '", name, "' has ",
        shape.size(), " dimensions, possible are 1 to ", kMaxDimensions);
  uint64_t elements = 1;
  for (const uint64_t size : shape) {
    Check(size > 0 && size <= kMaxElements / elements, "[gguf] the tensor '", name,
          "' has a dimension of ", size, ", which is zero or too large");
    elements *= size;
  }
  const GgmlType* type = FindGgmlType(type_name);
  Check(type != nullptr && type->name != "TL1" && type->name != "TL2" && type->name != "STQ1_0",
        "[gguf] the tensor '", name, "' cannot be written as '", type_name, "'");
  const uint64_t bytes = GgmlBytes(*type, elements / shape.back(), shape.back());
  Check(bytes > 0, "[gguf] the tensor '", name, "' of ", shape.back(), " columns cannot be ",
        type_name, ", which has blocks of ", type->block_cols);
  names_.insert(std::string(name));
  tensors_.push_back({std::string(name), {shape.begin(), shape.end()}, type, bytes});
}

void GgufWriter::Put(const void* data, size_t size) {
  errno = 0;
  file_.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
  if (!file_) throw FileError(errno != 0 ? errno : EIO, temporary_.string());
  position_ += size;
}

void GgufWriter::Pad() {
  const std::string zeros(static_cast<size_t>(RoundUp(position_, alignment_) - position_), '\0');
  Put(zeros.data(), zeros.size());
}

void GgufWriter::BeginData() {
  std::string header("GGUF");
  Append<uint32_t>(header, 3);
  Append<uint64_t>(header, tensors_.size());
  Append<uint64_t>(header, value_count_);
  Put(header.data(), header.size());
  Put(values_.data(), values_.size());
  header.clear();
  uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    AppendString(header, tensor.name);
    Append(header, static_cast<uint32_t>(tensor.shape.size()));
    for (size_t i = tensor.shape.size(); i-- > 0;) Append(header, tensor.shape[i]);
    Append(header, tensor.type->id);
    Append(header, offset);
    offset = RoundUp(offset + tensor.bytes, alignment_);
  }
  Put(header.data(), header.size());
  Pad();
  in_data_ = true;
}

void GgufWriter::StepOverComplete() {
  while (current_ < tensors_.size() && written_ == tensors_[current_].bytes) {
    Pad();
    ++current_;
    written_ = 0;
  }
}

void GgufWriter::Write(std::string_view name, std::span<const uint8_t> bytes) {
  Check(open_, "[gguf] the file is finished");
  if (!in_data_) BeginData();
  StepOverComplete();
  Check(current_ < tensors_.size(), "[gguf] all tensors are complete, got more bytes for '", name,
        "'");
  const Tensor& tensor = tensors_[current_];
  Check(tensor.name == name, "[gguf] the next bytes are those of the tensor '", tensor.name, "' (",
        written_, " of ", tensor.bytes, " are there), got some for '", name, "'");
  Check(bytes.size() <= tensor.bytes - written_, "[gguf] the tensor '", name, "' takes ",
        tensor.bytes, " bytes, got ", written_ + bytes.size());
  Put(bytes.data(), bytes.size());
  written_ += bytes.size();
}

void GgufWriter::Finish() {
  Check(open_, "[gguf] the file is finished");
  if (!in_data_) BeginData();
  StepOverComplete();
  if (current_ < tensors_.size()) {
    throw std::invalid_argument(StrCat("[gguf] the tensor '", tensors_[current_].name, "' has ",
                                       written_, " of ", tensors_[current_].bytes, " bytes"));
  }
  errno = 0;
  file_.close();
  if (!file_) throw FileError(errno != 0 ? errno : EIO, temporary_.string());
  std::error_code error;
  std::filesystem::rename(temporary_, path_, error);
  if (error) throw FileError(error.default_error_condition().value(), path_.string());
  open_ = false;
}

}  // namespace tf
