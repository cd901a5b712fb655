// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes are a GGUF file that is read to its last value and tensor, or refused
// with the errors of the core. A second "GGUF" in the input begins the second part of a split file.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/parallel.h"
#include "fuzz/codec_checks.h"
#include "io/gguf_cursor.h"
#include "io/gguf_reader.h"

namespace {

using tf::GgufTensor;
using tf::GgufValue;
using tf::GgufValueType;

// A folder for the files of this process; TMPDIR says where.
const std::filesystem::path& Folder() {
  static const std::filesystem::path folder = [] {
    std::string name = (std::filesystem::temp_directory_path() / "ternaryforge_XXXXXX").string();
    tf::Require(mkdtemp(name.data()) != nullptr, "a folder");
    static std::string path;
    path = name;
    std::atexit([] { std::filesystem::remove_all(path); });
    return std::filesystem::path(name);
  }();
  return folder;
}

void WriteFile(const std::filesystem::path& path, const uint8_t* data, size_t size) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  tf::Require(file >= 0 && write(file, data, size) == static_cast<ssize_t>(size), "writing");
  close(file);
}

// Walks over a value as the bindings do.
void ReadValue(const GgufValue& value) {
  size_t at = 0;
  for (uint64_t i = 0; i < value.count; ++i) {
    if (value.element != GgufValueType::kString) {
      at += tf::GgufValueBytes(value.element);
      continue;
    }
    uint64_t size;
    tf::Require(value.bytes.size() - at >= sizeof(size), "the length of a string");
    std::memcpy(&size, value.bytes.data() + at, sizeof(size));
    at += sizeof(size);
    tf::Require(size <= value.bytes.size() - at, "the end of a string");
    const char* text = reinterpret_cast<const char*>(value.bytes.data() + at);
    tf::Require(tf::IsUtf8({text, static_cast<size_t>(size)}), "UTF-8");
    at += static_cast<size_t>(size);
  }
  tf::Require(at == value.bytes.size(), "the end of a value");
}

void ReadTensor(const GgufTensor& tensor) {
  const auto file = tensor.file->bytes();
  tf::Require(!tensor.data.empty() && tensor.data.data() >= file.data() &&
                  tensor.data.data() + tensor.data.size() <= file.data() + file.size(),
              "a tensor within its file");
  size_t rows = 1;
  for (size_t axis = 0; axis + 1 < tensor.shape.size(); ++axis) rows *= tensor.shape[axis];
  std::string layout(tensor.type->name);
  std::transform(layout.begin(), layout.end(), layout.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  tf::CheckTernary(layout, tensor.data, rows, tensor.shape.back());
  tf::CheckDense(tensor.type->name, tensor.data, rows, tensor.shape.back());
}

// The message of the error; empty where the file was read.
std::string ReadFile(const std::filesystem::path& path, const char* type_42) {
  try {
    const tf::GgufFile file(path, type_42);
    for (const GgufValue& value : file.metadata()) ReadValue(value);
    for (const GgufTensor& tensor : file.tensors()) ReadTensor(tensor);
  } catch (const tf::FormatError& error) {
    tf::Require(std::string_view(error.what()).starts_with("[gguf] " + Folder().string()),
                "an error that names the file");
    return error.what();
  } catch (const tf::FileError&) {  // a part that is not there
  }
  return {};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::filesystem::path first = Folder() / "m-00001-of-00002.gguf";
  static const std::filesystem::path second = Folder() / "m-00002-of-00002.gguf";
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const size_t middle = std::min(size, bytes.find("GGUF", 1));
  WriteFile(first, data, middle);
  if (middle < size) WriteFile(second, data + middle, size - middle);
  if (ReadFile(first, "").find("type_42") != std::string::npos) ReadFile(first, "PQ2_0");
  if (middle < size) unlink(second.c_str());
  return 0;
}
