// SPDX-License-Identifier: Apache-2.0
// MappedFile over mmap or CreateFileMapping.
#include "base/mapped_file.h"

#include <cerrno>

#include "base/check.h"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace tf {

#ifdef _WIN32

MappedFile::MappedFile(const std::filesystem::path& path) {
  const auto fail = [&] {
    const DWORD error = GetLastError();
    throw FileError(error == ERROR_FILE_NOT_FOUND || error == ERROR_PATH_NOT_FOUND ? ENOENT
                    : error == ERROR_ACCESS_DENIED                                 ? EACCES
                                                                                   : EIO,
                    path.string());
  };
  const HANDLE file = CreateFileW(path.c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE,
                                  nullptr, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) fail();
  LARGE_INTEGER size;
  HANDLE mapping = nullptr;
  if (GetFileSizeEx(file, &size) != 0 && size.QuadPart > 0) {
    mapping = CreateFileMappingW(file, nullptr, PAGE_READONLY, 0, 0, nullptr);
  }
  CloseHandle(file);  // the mapping keeps it
  size_ = static_cast<size_t>(size.QuadPart);
  if (size_ == 0) return;
  if (mapping == nullptr) fail();
  data_ = static_cast<const uint8_t*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
  CloseHandle(mapping);  // the view keeps it
  if (data_ == nullptr) fail();
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) UnmapViewOfFile(data_);
}

#else

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not wait
  if (file < 0) throw FileError(errno, path.string());
  struct stat status;
  int error = 0;
  void* data = nullptr;
  if (fstat(file, &status) != 0) {
    error = errno;
  } else if (!S_ISREG(status.st_mode)) {
    error = S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
  } else if (status.st_size > 0) {
    size_ = static_cast<size_t>(status.st_size);
    data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) error = errno;
  }
  close(file);  // the mapping keeps it
  if (error != 0) throw FileError(error, path.string());
  data_ = static_cast<const uint8_t*>(data);
}

MappedFile::~MappedFile() {
  if (size_ > 0) munmap(const_cast<uint8_t*>(data_), size_);
}

#endif

}  // namespace tf
