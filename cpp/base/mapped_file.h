// SPDX-License-Identifier: Apache-2.0
// A whole file as read-only memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace tf {

// Maps a file read-only; its pages are read when they are first touched, and count as cache, not as
// memory of the process. The file must not shrink while it is mapped: touching what is gone ends
// the process (POSIX has no other way), so writers replace files by renaming, which is safe.
class MappedFile {
 public:
  // Throws FileError when the file cannot be opened or is no regular file.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Aligned to a page; empty for an empty file.
  std::span<const uint8_t> bytes() const { return {data_, size_}; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tf
