// SPDX-License-Identifier: Apache-2.0
// Cache-line aligned arrays for weights, activations and caches.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <type_traits>

namespace tf {

inline constexpr size_t kAlignment = 64;  // bytes: one cache line, one AVX-512 vector

constexpr size_t DivCeil(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }
constexpr size_t RoundUp(size_t value, size_t multiple) {
  return DivCeil(value, multiple) * multiple;
}

// Zeroed bytes, 64-byte aligned. Large ones lie in huge pages where the system has them, which
// spares kernels that stream them most look-ups of addresses, and are touched for the first time by
// whoever writes or reads them first. Throws std::bad_alloc.
void* AllocateZeroed(size_t size);
// `size` as it was allocated.
void FreeZeroed(void* bytes, size_t size);

// A fixed-size, 64-byte aligned array of trivial values, zeroed on construction. Movable, not
// copyable.
template <typename T>
class AlignedArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  AlignedArray() = default;
  explicit AlignedArray(size_t size) : size_(size) {
    if (size == 0) return;
    data_ = {static_cast<T*>(AllocateZeroed(size * sizeof(T))), Free{size * sizeof(T)}};
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  std::span<T> span() { return {data(), size_}; }
  std::span<const T> span() const { return {data(), size_}; }

 private:
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { FreeZeroed(p, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace tf
