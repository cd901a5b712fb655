// SPDX-License-Identifier: Apache-2.0
// GGUF files, read in place: header, metadata, and tensors as views of the mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mapped_file.h"
#include "formats/ggml_type.h"
#include "io/gguf_types.h"

namespace tf {

// A value of the header, as its bytes lie in the file.
struct GgufValue {
  std::string key;
  GgufValueType type;
  GgufValueType element;  // of an array, else the same as `type`
  uint64_t count;         // elements of an array, else 1
  std::span<const uint8_t>
      bytes;  // numbers one after another; each string is its length (u64), then UTF-8
};

// One tensor. Its data lie in the file `path`, from byte `offset` on.
struct GgufTensor {
  std::string name;
  const GgmlType* type;
  std::vector<uint64_t> shape;  // slowest dimension first: (rows, cols)
  uint64_t offset;
  std::span<const uint8_t> data;
  std::shared_ptr<const MappedFile> file;  // keeps `data` alive
  std::filesystem::path path;
};

// A GGUF file of version 2 or 3, or the first part of a split one. The whole header was checked
// when the constructor returns: every count, length, type and offset lies within the file, keys and
// tensor names are unique, strings are UTF-8. Memory stays below a small multiple of the header.
class GgufFile {
 public:
  // `type_42` says what tensors with the type number 42 are ("Q2_0", "PQ2_0", "TL2", "STQ1_0")
  // where their sizes leave it open. Throws FileError, and FormatError that names file, and key or
  // tensor.
  explicit GgufFile(const std::filesystem::path& path, std::string_view type_42 = {});

  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }
  const std::vector<GgufValue>& metadata() const { return metadata_; }  // of the first part
  const std::vector<GgufTensor>& tensors() const { return tensors_; }   // in the order of the parts
  const std::vector<std::filesystem::path>& paths() const { return paths_; }

 private:
  void TakeParts(const std::filesystem::path& path, std::string_view type_42);

  uint32_t version_ = 0;
  uint64_t alignment_ = 0;
  std::vector<GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::filesystem::path> paths_;
  std::shared_ptr<const MappedFile> file_;  // the first part: values point into it
};

}  // namespace tf
