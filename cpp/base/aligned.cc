// SPDX-License-Identifier: Apache-2.0
// Memory of large arrays; see aligned.h.
#include "base/aligned.h"

#include <cstdint>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tf {
namespace {

#ifdef __linux__
constexpr size_t kHugePage = size_t{1} << 21;

// Fresh pages, from the start of a huge page on, in huge pages where the system has them to give.
void* MapZeroed(size_t size) {
  const size_t room = size + kHugePage;
  void* const mapped =
      ::mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  uint8_t* const begin = static_cast<uint8_t*>(mapped);
  const size_t before =
      RoundUp(reinterpret_cast<uintptr_t>(mapped), kHugePage) - reinterpret_cast<uintptr_t>(mapped);
  if (before != 0) ::munmap(begin, before);
  if (room - before != size) ::munmap(begin + before + size, room - before - size);
  ::madvise(begin + before, size, MADV_HUGEPAGE);  // a wish: fails where there are none
  return begin + before;
}
#endif

// Whole pages of a large array; 0 for a small one.
size_t MappedSize(size_t size) {
#ifdef __linux__
  if (size >= kHugePage) return RoundUp(size, 1 << 16);  // the largest page of any Linux
#endif
  (void)size;
  return 0;
}

}  // namespace

void* AllocateZeroed(size_t size) {
#ifdef __linux__
  if (MappedSize(size) != 0) return MapZeroed(MappedSize(size));
#endif
  void* bytes = ::operator new(size, std::align_val_t{kAlignment});
  std::memset(bytes, 0, size);
  return bytes;
}

void FreeZeroed(void* bytes, size_t size) {
#ifdef __linux__
  if (MappedSize(size) != 0) {
    ::munmap(bytes, MappedSize(size));
    return;
  }
#endif
  ::operator delete(bytes, std::align_val_t{kAlignment});
}

}  // namespace tf
