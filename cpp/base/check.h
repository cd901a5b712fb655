// SPDX-License-Identifier: Apache-2.0
// Errors of the core: one throwing check, and the exceptions for bad files and for the file system.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tf {

// A file, or bytes that came from one, break the rules of their format. Python sees
// `ternaryforge.FormatError`.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The file system refused. Python sees the OSError of this number (FileNotFoundError and so on).
class FileError : public std::runtime_error {
 public:
  FileError(int number, const std::string& path)
      : std::runtime_error(path), number_(number), path_(path) {}
  int number() const { return number_; }  // an errno
  const std::string& path() const { return path_; }

 private:
  int number_;
  std::string path_;
};

// Concatenates its arguments as `operator<<` prints them.
template <typename... Args>
std::string StrCat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// Throws std::invalid_argument with the concatenated message unless `condition` holds.
// Messages read "[op] rule, actual value".
template <typename... Args>
void Check(bool condition, const Args&... message) {
  if (!condition) throw std::invalid_argument(StrCat(message...));
}

}  // namespace tf
