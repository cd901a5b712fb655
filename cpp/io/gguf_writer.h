// SPDX-License-Identifier: Apache-2.0
// Writes GGUF files, version 3.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "formats/ggml_type.h"
#include "io/gguf_types.h"

namespace tf {

// First the keys and the tensors are declared, then the bytes of the tensors come in the order of
// their declaration, each in any number of pieces, then Finish. Everything goes to a temporary file
// beside `path`, which takes its name in Finish and is removed when there is none. Tensors follow
// one another with nothing but padding between them, as llama.cpp demands.
//
// Throws std::invalid_argument that names the key or tensor for what would not be a valid file, and
// FileError.
class GgufWriter {
 public:
  explicit GgufWriter(const std::filesystem::path& path, uint64_t alignment = 32);
  ~GgufWriter();
  GgufWriter(const GgufWriter&) = delete;
  GgufWriter& operator=(const GgufWriter&) = delete;

  // `bytes` as in the file: numbers one after another, each string its length (u64) and UTF-8.
  // `element` and `count` are of an array, else `type` and 1.
  void AddValue(std::string_view key, GgufValueType type, GgufValueType element, uint64_t count,
                std::span<const uint8_t> bytes);
  // `shape` slowest dimension first. `type_name` as in formats/ggml_type.h.
  void AddTensor(std::string_view name, std::span<const uint64_t> shape,
                 std::string_view type_name);
  void Write(std::string_view name, std::span<const uint8_t> bytes);
  void Finish();
  // Removes the temporary file; nothing may follow.
  void Discard();

 private:
  struct Tensor {
    std::string name;
    std::vector<uint64_t> shape;
    const GgmlType* type;
    uint64_t bytes;
  };

  void BeginData();
  void Put(const void* data, size_t size);
  void Pad();
  // The next tensor that still lacks bytes, or the count of tensors.
  void StepOverComplete();

  std::filesystem::path path_, temporary_;
  std::ofstream file_;
  uint64_t alignment_;
  uint64_t position_ = 0;  // in the file
  std::string values_;     // all keys with their values, as in the file
  uint64_t value_count_ = 0;
  std::unordered_set<std::string> keys_, names_;
  std::vector<Tensor> tensors_;
  bool in_data_ = false;
  bool open_ = true;
  size_t current_ = 0;    // tensor that is being written
  uint64_t written_ = 0;  // bytes of it
};

}  // namespace tf
