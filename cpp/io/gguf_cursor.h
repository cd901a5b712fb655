// SPDX-License-Identifier: Apache-2.0
// Bounds-checked reading of a GGUF header.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "base/check.h"

namespace tf {

// Whether the bytes are UTF-8: shortest forms only, no surrogates, nothing above U+10FFFF.
bool IsUtf8(std::string_view text);

// A text of a file as a message shows it: control characters, which could steer a terminal, as
// \xNN, and "..." for what is beyond 1000 bytes.
std::string Printable(std::string_view text);

// The error that names a file; `message` may hold texts of the file.
template <typename... Args>
[[noreturn]] void FailGguf(const std::string& path, const Args&... message) {
  throw FormatError(StrCat("[gguf] ", path, ": ", Printable(StrCat(message...))));
}

// Walks over the bytes of one file; every step is checked against their end. Errors are FormatError
// that name the file.
class GgufCursor {
 public:
  GgufCursor(std::span<const uint8_t> bytes, std::string path)
      : bytes_(bytes), path_(std::move(path)) {}

  size_t position() const { return position_; }
  size_t remaining() const { return bytes_.size() - position_; }
  const std::string& path() const { return path_; }

  template <typename... Args>
  [[noreturn]] void Fail(const Args&... message) const {
    FailGguf(path_, message...);
  }

  // The next `size` bytes; `what` they are, for the error.
  std::span<const uint8_t> Take(uint64_t size, std::string_view what) {
    if (size > remaining())
      Fail(what, " takes ", size, " bytes at byte ", position_, ", and the file ends after ",
           remaining(), ": it was cut off or is damaged");
    const auto taken = bytes_.subspan(position_, static_cast<size_t>(size));
    position_ += static_cast<size_t>(size);
    return taken;
  }

  // A little-endian number.
  template <typename T>
  T Number(std::string_view what) {
    static_assert(std::endian::native == std::endian::little);
    T value;
    std::memcpy(&value, Take(sizeof(T), what).data(), sizeof(T));
    return value;
  }

  // A length, then so many bytes of UTF-8.
  std::string_view String(std::string_view what) {
    const auto size = Number<uint64_t>(what);
    const auto text = Take(size, what);
    const std::string_view view(reinterpret_cast<const char*>(text.data()), text.size());
    if (!IsUtf8(view)) Fail(what, " at byte ", position_ - text.size(), " is no UTF-8");
    return view;
  }

 private:
  std::span<const uint8_t> bytes_;
  std::string path_;
  size_t position_ = 0;
};

}  // namespace tf
