// SPDX-License-Identifier: Apache-2.0
// How the codes of a matrix lie in bytes: names and sizes of every layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "formats/ternary.h"

namespace tf {

enum class Layout : uint8_t {
  kF32,           // row-major floats
  kF16,           // row-major IEEE binary16
  kBf16,          // row-major bfloat16
  kInt8,          // row-major signed bytes
  kHfPacked,      // Hugging Face "bitnet": uint8 [rows / 4, cols], see formats/hf_packed.h
  kOnebit,        // 2 bits a weight, as in .1bit files, see formats/onebit.h
  kOnebitBinary,  // 1 bit a weight, as in .1bit files
  kT16,           // run-time tiles of 16 rows x 16 columns, see formats/t16.h
  kT20,           // run-time tiles of 16 rows x 20 columns, see formats/t20.h
  kTwoPlane,      // two tied trit planes in files, see formats/two_plane.h
  kT8,            // the same in run-time tiles of 16 rows x 8 columns, see formats/t8.h
  // Files of other engines: codes and scales, see the file of the same name in formats/.
  kI2S,
  kI2S64,
  kI2SRows4,
  kTq10,
  kTq20,
  kQ10,
  kQ20,
  kPq20,
  kPtq10,
  kQ2K,  // as exact ternary
  kQ40,  // as exact ternary
  kIq1Bn,
  kIq2Bn,
};

// The alphabet whose codes this layout holds.
Alphabet AlphabetOf(Layout layout);

// Whether the bytes hold the scales too: a TernaryCodec reads them.
bool HoldsScales(Layout layout);

// The lower-case public name ("f32", "hf_packed", "t16", ...), and back; `LayoutFromName` throws
// std::invalid_argument that lists the known names.
std::string_view LayoutName(Layout layout);
Layout LayoutFromName(std::string_view name);

// Whether it is 16-row tiles of trits, t16 or t20, of which either can become the other.
constexpr bool IsTernaryTiles(Layout layout) {
  return layout == Layout::kT16 || layout == Layout::kT20;
}

// Whether the integer kernels run on it: 16-row tiles of trits or of two planes of them.
constexpr bool IsTiles(Layout layout) { return IsTernaryTiles(layout) || layout == Layout::kT8; }

// Bytes that a rows x cols matrix takes; group_size: 0 unless scales are per group (t20 depends on
// it). Throws std::invalid_argument where the layout cannot hold the shape or the size overflows.
size_t LayoutBytes(Layout layout, size_t rows, size_t cols, size_t group_size = 0);

}  // namespace tf
